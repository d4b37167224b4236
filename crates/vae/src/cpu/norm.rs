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
            let shift = f64::from(bias[channel]) - mean * scale;
            normalise(x, y, scale as f32, shift as f32, self.silu);
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

/// `x * scale + shift`, and its SiLU if asked for.
fn normalise(x: &[f32], y: &mut [f32], scale: f32, shift: f32, silu_too: bool) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { normalise_avx2(x, y, scale, shift, silu_too) };
    }
    normalise_lines(x, y, scale, shift, silu_too)
}

/// The same compiled for AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn normalise_avx2(x: &[f32], y: &mut [f32], scale: f32, shift: f32, silu_too: bool) {
    normalise_lines(x, y, scale, shift, silu_too)
}

#[inline(always)]
fn normalise_lines(x: &[f32], y: &mut [f32], scale: f32, shift: f32, silu_too: bool) {
    if silu_too {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = silu(x * scale + shift));
    } else {
        y.iter_mut().zip(x).for_each(|(y, x)| *y = x * scale + shift);
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
    // The Taylor series of 2^part; its next term is below 2e-9.
    let series =
        [1.0, 0.693_147_2, 0.240_226_5, 0.055_504_11, 0.009_618_129, 0.001_333_355_8, 0.000_154_035_3, 1.525_273_4e-5];
    let part = series.iter().rev().fold(0.0, |sum, factor| sum * part + factor);
    part * f32::from_bits(((whole as i32 + 127) as u32) << 23)
}
