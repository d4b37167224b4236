//! The linear layer, the one place where a weight matrix's storage (dense today) meets the arithmetic.

use candle_core::{Module, Tensor};

use crate::{Result, Weights};

/// `y = x W^T + b` over the last axis.
#[derive(Clone)]
pub struct Linear(candle_nn::Linear);

impl Linear {
    /// Reads `weight` `[out, in]` and `bias` `[out]`.
    pub fn load(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        let weight = weights.get((output, input), "weight")?;
        let bias = weights.get(output, "bias")?;
        Ok(Self(candle_nn::Linear::new(weight, Some(bias))))
    }

    /// Reads `weight` `[out, in]` only.
    pub fn load_no_bias(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        Ok(Self(candle_nn::Linear::new(weights.get((output, input), "weight")?, None)))
    }
}

impl Module for Linear {
    /// `[..., in]` to `[..., out]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        self.0.forward(x)
    }
}
