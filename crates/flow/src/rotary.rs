//! Rotary position embedding over several axes.
//!
//! Source: diffusers, `FluxPosEmbed` and `apply_rotary_emb` with `use_real_unbind_dim=-1`: each axis has its own
//! channels of every head, each pair of neighbouring channels is turned by `position * theta^(-2i / channels)`.

use candle_core::{Device, Result, Tensor};
use retouch_kernels::Rotation;

use crate::tokens::Position;

const THETA: f64 = 10_000.0;

/// The angles of a sequence of positions.
///
/// Computed in f64: neither bf16 nor f16 can tell neighbouring positions past 256 apart.
pub fn rotation(positions: &[Position], axes: [usize; 3], device: &Device) -> Result<Rotation> {
    let pairs: usize = axes.iter().sum::<usize>() / 2;
    let frequencies: Vec<(usize, f64)> = axes
        .iter()
        .enumerate()
        .flat_map(|(axis, &channels)| {
            (0..channels / 2).map(move |i| (axis, THETA.powf(-2.0 * i as f64 / channels as f64)))
        })
        .collect();
    let mut cos = Vec::with_capacity(positions.len() * pairs);
    let mut sin = Vec::with_capacity(positions.len() * pairs);
    for position in positions {
        for &(axis, frequency) in &frequencies {
            let (s, c) = (f64::from(position[axis]) * frequency).sin_cos();
            cos.push(c as f32);
            sin.push(s as f32);
        }
    }
    let shape = (positions.len(), pairs);
    Ok(Rotation { cos: Tensor::from_vec(cos, shape, device)?, sin: Tensor::from_vec(sin, shape, device)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_equal_the_reference_past_position_256() -> Result<()> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/small/embeddings.safetensors");
        let stored = candle_core::safetensors::load(file, &Device::Cpu)?;
        let positions: Vec<Position> = stored["rotary.ids"]
            .to_vec2::<i64>()?
            .iter()
            .map(|id| std::array::from_fn(|axis| id[axis] as u32))
            .collect();
        for (name, axes) in [("rotary", [16, 56, 56]), ("rotary_tiny", [8, 12, 12])] {
            let rotary = rotation(&positions, axes, &Device::Cpu)?;
            for (table, kind) in [(rotary.cos, "cos"), (rotary.sin, "sin")] {
                // The reference keeps each value twice, for both members of its pair.
                let expected = stored[&format!("{name}.{kind}")].to_vec2::<f32>()?;
                let expected: Vec<f32> = expected.iter().flat_map(|row| row.iter().step_by(2).copied()).collect();
                let found = table.flatten_all()?.to_vec1::<f32>()?;
                assert_eq!(found.len(), expected.len());
                let worst = found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).fold(0f32, f32::max);
                assert!(worst <= f32::EPSILON, "{name}.{kind}: {worst:e}");
            }
        }
        Ok(())
    }
}
