//! The linear layer, the one place where a weight matrix's storage meets the arithmetic.

use std::ops::Range;

use candle_core::{Module, Tensor};
use retouch_kernels::{Activation, Kernels};

use crate::{Matrix, Result, Weights, lora::Added};

/// `y = x W^T + b` over the last axis.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`.
    weight: Matrix,
    /// `[out]`.
    bias: Option<Tensor>,
    /// Of LoRAs that are not merged into `weight`.
    added: Option<Added>,
    kernels: &'static dyn Kernels,
}

impl Linear {
    /// Reads `weight` `[out, in]` and `bias` `[out]`.
    pub fn load(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        let linear = Self::load_no_bias(weights, input, output)?;
        Ok(Self { bias: Some(weights.get(output, "bias")?), ..linear })
    }

    /// Reads `weight` `[out, in]` only.
    pub fn load_no_bias(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        let weight = weights.matrix((output, input), "weight")?;
        let added = match &weight {
            Matrix::Dense(_) => None,
            Matrix::Packed(_) => weights.added(output)?,
        };
        Ok(Self { weight, bias: None, added, kernels: weights.kernels() })
    }

    /// The layer that computes a range of the outputs alone; shares the parameters.
    pub fn outputs(&self, range: Range<usize>) -> candle_core::Result<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.narrow(0, range.start, range.len())).transpose()?;
        let added = self.added.as_ref().map(|added| added.outputs(&range)).transpose()?;
        Ok(Self { weight: self.weight.rows(range)?, bias, added, kernels: self.kernels })
    }

    /// GELU (tanh form) of the layer's output.
    pub fn forward_gelu(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        match &self.added {
            None => self.weight.linear(self.kernels, x, self.bias.as_ref(), Activation::Gelu),
            Some(_) => self.forward(x)?.gelu(),
        }
    }
}

impl Module for Linear {
    /// `[..., in]` to `[..., out]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.weight.linear(self.kernels, x, self.bias.as_ref(), Activation::None)?;
        match &self.added {
            None => Ok(y),
            Some(added) => added.add_to(y, x, self.kernels),
        }
    }
}
