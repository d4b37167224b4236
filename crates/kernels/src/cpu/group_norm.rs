//! Group normalisation in two passes over the image: one reads it for mean and variance, one writes the result.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    buffer::zeros,
    simd::{silu, vectorised},
    view::{View, narrowed, vector, widened},
};
use crate::Moments;

pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    let wide = widened(x)?.contiguous()?;
    let moments = group_moments(&wide, groups)?;
    let y = normalised(&wide, &moments, weight, bias, epsilon, silu)?;
    narrowed(y, x.shape(), x.dtype())
}

pub fn group_norm_by(
    x: &Tensor,
    moments: &Moments,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    let y = normalised(&widened(x)?.contiguous()?, moments, weight, bias, epsilon, silu)?;
    narrowed(y, x.shape(), x.dtype())
}

pub fn group_moments(x: &Tensor, groups: usize) -> Result<Moments> {
    let (_, channels, height, width) = x.dims4()?;
    if groups == 0 || channels % groups != 0 {
        bail!("{groups} groups over {channels} channels")
    }
    let group = channels / groups * height * width;
    let wide = widened(x)?.contiguous()?;
    let view = View::of(&wide);
    let data = &view.floats()?[..x.elem_count()];
    let groups = data.par_chunks(group).map(|group| vectorised(|| mean_and_variance(group))).collect();
    Ok(Moments { count: group as f64, groups })
}

/// `x` is contiguous and f32.
fn normalised(
    x: &Tensor,
    moments: &Moments,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    silu: bool,
) -> Result<Vec<f32>> {
    let (batch, channels, height, width) = x.dims4()?;
    let groups = moments.groups.len() / batch.max(1);
    if groups == 0 || channels % groups != 0 {
        bail!("{groups} groups over {channels} channels")
    }
    let (weight, bias) = (vector(weight, channels, "a scale")?, vector(bias, channels, "a shift")?);
    let view = View::of(x);
    let data = &view.floats()?[..x.elem_count()];
    let normalisers: Vec<(f64, f64)> = moments.normalisers(epsilon).collect();
    let (plane, channels_per_group) = (height * width, channels / groups);
    let mut y = zeros(data.len());
    y.par_chunks_mut(plane).zip(data.par_chunks(plane)).enumerate().for_each(|(i, (y, x))| {
        let (mean, inverse) = normalisers[i / channels_per_group];
        let channel = i % channels;
        let scale = f64::from(weight[channel]) * inverse;
        let affine = Affine { mean: mean as f32, scale: scale as f32, shift: bias[channel] };
        vectorised(|| normalise(x, y, affine, silu));
    });
    Ok(y)
}

/// Sums are kept in f64 for every lane, which holds far more than the million values of f32 that a group has.
const LANES: usize = 16;

#[inline(always)]
fn mean_and_variance(x: &[f32]) -> (f64, f64) {
    let (mut sums, mut squares) = ([0f64; LANES], [0f64; LANES]);
    let chunks = x.chunks_exact(LANES);
    for &x in chunks.remainder() {
        sums[0] += f64::from(x);
        squares[0] += f64::from(x) * f64::from(x);
    }
    for chunk in chunks {
        for (lane, &x) in chunk.iter().enumerate() {
            let x = f64::from(x);
            sums[lane] += x;
            squares[lane] += x * x;
        }
    }
    let count = x.len() as f64;
    let mean = sums.iter().sum::<f64>() / count;
    let variance = (squares.iter().sum::<f64>() / count - mean * mean).max(0.0);
    (mean, variance)
}

/// `(x - mean) * scale + shift`. Subtracting first keeps the precision where the mean is far from 0.
#[derive(Clone, Copy)]
struct Affine {
    mean: f32,
    scale: f32,
    shift: f32,
}

impl Affine {
    #[inline(always)]
    fn of(self, x: f32) -> f32 {
        (x - self.mean) * self.scale + self.shift
    }
}

/// Writes the affine map of `x` to `y`, and its SiLU if asked for.
#[inline(always)]
fn normalise(x: &[f32], y: &mut [f32], affine: Affine, silu_too: bool) {
    if silu_too {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = silu(affine.of(x)));
    } else {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = affine.of(x));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;
    use candle_core::Module;

    #[test]
    fn it_equals_candles_normalisation() -> Result<()> {
        for (channels, groups, height, width) in [(4, 2, 3, 5), (8, 8, 1, 1), (6, 1, 16, 16), (32, 4, 7, 9)] {
            // A mean far from 0, which a sum of squares in f32 would not survive.
            let x = (random((2, channels, height, width)) + 100.)?;
            let (weight, bias) = (random(channels), random(channels));
            let expected =
                candle_nn::GroupNorm::new(weight.clone(), bias.clone(), channels, groups, 1e-6)?.forward(&x)?;
            for silu in [false, true] {
                let expected = if silu { expected.silu()? } else { expected.clone() };
                let found = group_norm(&x, &weight, &bias, groups, 1e-6, silu)?;
                let difference = (found - expected)?.abs()?.max_all()?.to_scalar::<f32>()?;
                assert!(difference < 2e-4, "{channels} channels in {groups} groups: {difference}");
            }
        }
        Ok(())
    }
}
