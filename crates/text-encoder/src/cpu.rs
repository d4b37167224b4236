//! The activation of T5's feed-forward for f32 on the CPU, where candle's own takes one thread and a pass of its own.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

/// `gelu(gate) * value` (the tanh form), both contiguous f32 of one shape on the CPU.
pub fn gated_gelu(gate: &Tensor, value: &Tensor) -> Result<Tensor> {
    gate.apply_op2_no_bwd(value, &GatedGelu)
}

struct GatedGelu;

/// Elements that a thread takes at a time.
const CHUNK: usize = 1 << 14;

impl CustomOp2 for GatedGelu {
    fn name(&self) -> &'static str {
        "gated-gelu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        value: &CpuStorage,
        value_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, value) = (floats(gate, gate_layout)?, floats(value, value_layout)?);
        if gate_layout.shape() != value_layout.shape() {
            bail!("a gate of {:?} for {:?}", gate_layout.shape(), value_layout.shape())
        }
        let mut result = vec![0f32; gate.len()];
        let inputs = gate.par_chunks(CHUNK).zip(value.par_chunks(CHUNK));
        result.par_chunks_mut(CHUNK).zip(inputs).for_each(|(result, (gate, value))| {
            for (result, (&gate, &value)) in result.iter_mut().zip(gate.iter().zip(value)) {
                *result = gelu(gate) * value;
            }
        });
        Ok((CpuStorage::F32(result), gate_layout.shape().clone()))
    }
}

fn floats<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&storage.as_slice::<f32>()?[start..end]),
        None => bail!("the gated activation takes contiguous tensors"),
    }
}

/// `x/2 (1 + tanh(z))` with `z = sqrt(2/pi) (x + 0.044715 x^3)`, which is `x / (1 + e^(-2z))`.
///
/// Source: `NewGELUActivation` in transformers' `activations.py`.
fn gelu(x: f32) -> f32 {
    const TWICE_ROOT: f32 = std::f32::consts::SQRT_2 * std::f32::consts::FRAC_2_SQRT_PI; // 2 sqrt(2/pi)
    x / (1.0 + (-TWICE_ROOT * (x + 0.044_715 * x * x * x)).exp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn it_equals_candles_gelu() -> Result<()> {
        let gate = Tensor::arange_step(-30f32, 30., 0.001, &Device::Cpu)?;
        let value = Tensor::randn(0f32, 1., gate.shape(), &Device::Cpu)?;
        let difference = (gated_gelu(&gate, &value)? - (gate.gelu()? * &value)?)?;
        let difference = difference.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(difference < 2e-5, "{difference}");
        assert!(gated_gelu(&gate, &value.narrow(0, 0, 3)?).is_err());
        Ok(())
    }
}
