//! Group normalisation.

use candle_core::{Result, Tensor};
use retouch_kernels::{Kernels, Moments};
use retouch_weights::Weights;

/// Source: `eps=1e-6` in every normalisation of diffusers' `models/autoencoders/vae.py`.
const EPSILON: f64 = 1e-6;

/// Each group of channels brought to mean 0 and variance 1 over the whole image, then a scale and a shift per channel.
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
    kernels: &'static dyn Kernels,
}

impl GroupNorm {
    /// Reads `weight` `[channels]` and `bias` `[channels]`.
    pub fn load(weights: &Weights, groups: usize, channels: usize) -> retouch_weights::Result<Self> {
        let (weight, bias) = (weights.get(channels, "weight")?, weights.get(channels, "bias")?);
        Ok(Self { weight, bias, groups, kernels: weights.kernels() })
    }

    /// `[b, channels, h, w]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.kernels.group_norm(x, &self.weight, &self.bias, self.groups, EPSILON, false)
    }

    /// The same followed by SiLU, `x * sigmoid(x)`.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.kernels.group_norm(x, &self.weight, &self.bias, self.groups, EPSILON, true)
    }

    /// [`Self::forward_silu`] of a part of an image, by the moments of the whole one.
    pub fn forward_silu_by(&self, x: &Tensor, moments: &Moments) -> Result<Tensor> {
        self.kernels.group_norm_by(x, moments, &self.weight, &self.bias, EPSILON, true)
    }

    pub fn groups(&self) -> usize {
        self.groups
    }
}
