//! Group normalisation in two passes over the image: one reads it for mean and variance, one writes the result.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::conv::floats;

/// `x` `[b, channels, h, w]`, `weight` and `bias` `[channels]`, all f32 on the CPU; returns the shape of `x`.
///
/// With `silu` the result `y` becomes `y * sigmoid(y)`.
pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    x.contiguous()?.apply_op3_no_bwd(weight, bias, &GroupNorm { groups, epsilon, silu })
}

struct GroupNorm {
    groups: usize,
    epsilon: f64,
    silu: bool,
}

impl CustomOp3 for GroupNorm {
    fn name(&self) -> &'static str {
        "vae-group-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (_, channels, height, width) = x_layout.shape().dims4()?;
        let (x, weight, bias) = (floats(x, x_layout)?, floats(weight, weight_layout)?, floats(bias, bias_layout)?);
        if weight.len() != channels || bias.len() != channels || self.groups == 0 || channels % self.groups != 0 {
            bail!("{} groups over {channels} channels, with {} weights", self.groups, weight.len())
        }
        let plane = height * width;
        let group = channels / self.groups * plane;
        // Per group of each image: mean, and what to multiply with.
        let statistics: Vec<(f64, f64)> = x.par_chunks(group).map(|group| self.statistics(group)).collect();
        let mut y = vec![0f32; x.len()];
        y.par_chunks_mut(plane).zip(x.par_chunks(plane)).enumerate().for_each(|(i, (y, x))| {
            let (mean, inverse) = statistics[i * plane / group];
            let channel = i % channels;
            let scale = f64::from(weight[channel]) * inverse;
            normalise(x, y, Affine { mean: mean as f32, scale: scale as f32, shift: bias[channel] }, self.silu);
        });
        Ok((CpuStorage::F32(y), x_layout.shape().clone()))
    }
}

/// Sums are kept in f64 for every lane, which holds far more than the million values of f32 that a group has.
const LANES: usize = 16;

impl GroupNorm {
    /// Mean, and one over the standard deviation.
    fn statistics(&self, x: &[f32]) -> (f64, f64) {
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
        (mean, 1.0 / (variance + self.epsilon).sqrt())
    }
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
fn normalise(x: &[f32], y: &mut [f32], affine: Affine, silu_too: bool) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { normalise_avx2(x, y, affine, silu_too) };
    }
    normalise_plane(x, y, affine, silu_too)
}

/// The same compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn normalise_avx2(x: &[f32], y: &mut [f32], affine: Affine, silu_too: bool) {
    normalise_plane(x, y, affine, silu_too)
}

#[inline(always)]
fn normalise_plane(x: &[f32], y: &mut [f32], affine: Affine, silu_too: bool) {
    if silu_too {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = silu(affine.of(x)));
    } else {
        y.iter_mut().zip(x).for_each(|(y, &x)| *y = affine.of(x));
    }
}

/// `x / (1 + e^-x)`, within 2e-7 of `x` in f32; without branches or calls, so that it is compiled to vector instructions.
#[inline(always)]
fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `e^x` within a few units in the last place, for `x` limited to where it is a normal number.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // 2^(whole + part), part in [-0.5, 0.5]; adding and subtracting 1.5 * 2^23 rounds to the nearest whole number.
    const ROUND: f32 = 12_582_912.0;
    let power = (x * std::f32::consts::LOG2_E).clamp(-126.0, 127.0);
    let whole = (power + ROUND) - ROUND;
    let part = power - whole;
    // The Taylor series of 2^part; its next term is below 6e-9.
    let series = [
        1.0,
        std::f32::consts::LN_2,
        0.240_226_5,
        0.055_504_11,
        0.009_618_129,
        0.001_333_355_8,
        0.000_154_035_3,
        1.525_273_4e-5,
    ];
    let part = series.iter().rev().fold(0.0, |sum, factor| sum * part + factor);
    part * f32::from_bits(((whole as i32 + 127) as u32) << 23)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Module};

    #[test]
    fn it_equals_candles_normalisation() -> Result<()> {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &Device::Cpu);
        for (channels, groups, height, width) in [(4, 2, 3, 5), (8, 8, 1, 1), (6, 1, 16, 16), (32, 4, 7, 9)] {
            // A mean far from 0, which a sum of squares in f32 would not survive.
            let x = (random(&[2, channels, height, width])? + 100.)?;
            let (weight, bias) = (random(&[channels])?, random(&[channels])?);
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

    #[test]
    fn silu_is_exact_to_rounding_everywhere() {
        let mut x = -200f32;
        while x < 200.0 {
            let exact = f64::from(x) / (1.0 + (-f64::from(x)).exp());
            let error = (f64::from(silu(x)) - exact).abs();
            assert!(error <= 2e-7 * f64::from(x.abs()) + 1e-35, "{x}: {error:e}");
            x += 0.003;
        }
        assert_eq!((silu(0.0), silu(1e30)), (0.0, 1e30));
        assert!(silu(f32::NAN).is_nan());
        assert!(silu(-1e30).abs() < 1e-6);
    }
}
