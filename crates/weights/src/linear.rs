//! The linear layer, the one place where a weight matrix's storage meets the arithmetic.

use std::ops::Range;

use candle_core::{Module, Tensor};
use retouch_kernels::{Activation, Fp8Rows, Kernels};

use crate::{Matrix, Result, Weights, lora::Added};

/// `y = x W^T + b` over the last axis.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Weight,
    /// `[out]`.
    bias: Option<Tensor>,
    /// Of LoRAs that are not merged into `weight`.
    added: Option<Added>,
    kernels: &'static dyn Kernels,
}

/// A matrix `[out, in]`, and what is multiplied.
#[derive(Debug, Clone)]
enum Weight {
    /// Values in the dtype of the layer's input, to which narrower ones are widened.
    Matrix(Matrix),
    /// 8-bit floats, to which the layer's input is rounded.
    Fp8(Fp8Rows),
}

impl Weight {
    fn rows(&self, range: Range<usize>) -> candle_core::Result<Self> {
        Ok(match self {
            Self::Matrix(matrix) => Self::Matrix(matrix.rows(range)?),
            Self::Fp8(rows) => Self::Fp8(rows.narrow(range)?),
        })
    }
}

impl Linear {
    /// Reads `weight` `[out, in]` and `bias` `[out]`.
    pub fn load(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        let linear = Self::load_no_bias(weights, input, output)?;
        Ok(Self { bias: Some(weights.get(output, "bias")?), ..linear })
    }

    /// Reads `weight` `[out, in]` only.
    pub fn load_no_bias(weights: &Weights, input: usize, output: usize) -> Result<Self> {
        let weight = match weights.fp8_rows((output, input), "weight")? {
            Some(rows) => Weight::Fp8(rows),
            None => Weight::Matrix(weights.matrix((output, input), "weight")?),
        };
        let added = match &weight {
            Weight::Matrix(Matrix::Dense(_)) => None,
            Weight::Matrix(Matrix::Packed(_)) | Weight::Fp8(_) => weights.added(output)?,
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
            None => self.product(x, Activation::Gelu),
            Some(_) => self.forward(x)?.gelu(),
        }
    }

    /// Without what LoRAs add.
    fn product(&self, x: &Tensor, activation: Activation) -> candle_core::Result<Tensor> {
        let bias = self.bias.as_ref();
        match &self.weight {
            Weight::Matrix(matrix) => matrix.linear(self.kernels, x, bias, activation),
            Weight::Fp8(rows) => self.kernels.linear_fp8(x, rows, bias, activation),
        }
    }
}

impl Module for Linear {
    /// `[..., in]` to `[..., out]`.
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = self.product(x, Activation::None)?;
        match &self.added {
            None => Ok(y),
            Some(added) => added.add_to(y, x, self.kernels),
        }
    }
}
