//! Group normalisation.

use candle_core::{Device, Module, Result, Tensor};
use retouch_weights::Weights;

use crate::cpu;

/// Source: `eps=1e-6` in every normalisation of diffusers' `models/autoencoders/vae.py`.
const EPSILON: f64 = 1e-6;

/// Each group of channels brought to mean 0 and variance 1 over the whole image, then a scale and a shift per channel.
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: usize,
}

impl GroupNorm {
    /// Reads `weight` `[channels]` and `bias` `[channels]`.
    pub fn load(weights: &Weights, groups: usize, channels: usize) -> retouch_weights::Result<Self> {
        Ok(Self { weight: weights.get(channels, "weight")?, bias: weights.get(channels, "bias")?, groups })
    }

    /// `[b, channels, h, w]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.compute(x, false)
    }

    /// The same followed by SiLU, `x * sigmoid(x)`.
    pub fn forward_silu(&self, x: &Tensor) -> Result<Tensor> {
        self.compute(x, true)
    }

    fn compute(&self, x: &Tensor, silu: bool) -> Result<Tensor> {
        if matches!(x.device(), Device::Cpu) {
            return cpu::group_norm(x, &self.weight, &self.bias, self.groups, EPSILON, silu);
        }
        let (weight, bias, channels) = (self.weight.clone(), self.bias.clone(), self.weight.elem_count());
        let y = candle_nn::GroupNorm::new(weight, bias, channels, self.groups, EPSILON)?.forward(x)?;
        if silu { y.silu() } else { Ok(y) }
    }
}
