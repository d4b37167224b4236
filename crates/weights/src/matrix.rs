//! A weight matrix in whichever form its file has it.

use std::ops::Range;

use candle_core::Tensor;
use retouch_kernels::{Activation, Kernels, Packed};

/// A matrix `[out, in]`; cheap to clone.
#[derive(Debug, Clone)]
pub enum Matrix {
    /// In the dtype that is computed with.
    Dense(Tensor),
    /// In fewer bits.
    Packed(Packed),
}

impl Matrix {
    /// A range of the outputs, without a copy.
    pub fn rows(&self, range: Range<usize>) -> candle_core::Result<Self> {
        Ok(match self {
            Self::Dense(tensor) => Self::Dense(tensor.narrow(0, range.start, range.len())?),
            Self::Packed(packed) => Self::Packed(packed.narrow(range)?),
        })
    }

    /// `x W^T + b` over the last axis, then `activation`.
    pub fn linear(
        &self,
        kernels: &dyn Kernels,
        x: &Tensor,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(weight) => kernels.linear(x, weight, bias, activation),
            Self::Packed(weight) => kernels.linear_packed(x, weight, bias, activation),
        }
    }
}
