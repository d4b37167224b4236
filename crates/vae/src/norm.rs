//! Group normalisation.

use candle_core::{Module, Result, Tensor};
use retouch_weights::Weights;

/// Source: `eps=1e-6` in every normalisation of diffusers' `models/autoencoders/vae.py`.
const EPSILON: f64 = 1e-6;

/// Each group of channels brought to mean 0 and variance 1 over the whole image, then a scale and a shift per channel.
pub struct GroupNorm {
    norm: candle_nn::GroupNorm,
}

impl GroupNorm {
    /// Reads `weight` `[channels]` and `bias` `[channels]`.
    pub fn load(weights: &Weights, groups: usize, channels: usize) -> retouch_weights::Result<Self> {
        let (weight, bias) = (weights.get(channels, "weight")?, weights.get(channels, "bias")?);
        Ok(Self { norm: candle_nn::GroupNorm::new(weight, bias, channels, groups, EPSILON)? })
    }

    /// `[b, channels, h, w]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(x)
    }

    /// The same followed by SiLU, `x * sigmoid(x)`.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.norm.forward(x)?.silu()
    }
}
