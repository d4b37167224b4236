//! The CPU: f32 loops over all threads around the `gemm` crate's matrix products.
//!
//! bf16 and f16 tensors are widened as they are read and rounded once when the result is written; of weights only a
//! block of rows is ever widened at a time.

mod attention;
mod buffer;
mod conv;
mod elementwise;
mod group_norm;
mod heads;
mod linear;
mod matrix;
mod packed;
mod simd;
mod view;

use candle_core::{Result, Tensor};

use crate::{Activation, Fp8Rows, Kernels, Moments, Packed, Rotation, Stream, Window};

#[derive(Debug)]
pub struct Cpu;

impl Kernels for Cpu {
    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        linear::linear(x, weight, bias, activation)
    }

    fn linear_packed(
        &self,
        x: &Tensor,
        weight: &Packed,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        linear::linear_packed(x, weight, bias, activation)
    }

    fn linear_fp8(
        &self,
        x: &Tensor,
        weight: &Fp8Rows,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        linear::linear_fp8(x, weight, bias, activation)
    }

    fn modulated_norm(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        elementwise::modulated_norm(x, shift, scale)
    }

    fn gated_residual(&self, x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
        elementwise::gated_residual(x, y, gate)
    }

    fn heads(&self, streams: &[Stream<'_>], rotation: &Rotation) -> Result<Tensor> {
        heads::heads(streams, rotation)
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
        attention::attention(q, k, v, bias, scale, None)
    }

    fn attention_beside_gelu(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, inner: &Tensor) -> Result<Tensor> {
        attention::attention(q, k, v, None, scale, Some(inner))
    }

    fn gated_gelu(&self, gate: &Tensor, value: &Tensor) -> Result<Tensor> {
        elementwise::gated_gelu(gate, value)
    }

    fn group_norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        groups: usize,
        epsilon: f64,
        silu: bool,
    ) -> Result<Tensor> {
        group_norm::group_norm(x, weight, bias, groups, epsilon, silu)
    }

    fn group_moments(&self, x: &Tensor, groups: usize) -> Result<Moments> {
        group_norm::group_moments(x, groups)
    }

    fn group_norm_by(
        &self,
        x: &Tensor,
        moments: &Moments,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
        silu: bool,
    ) -> Result<Tensor> {
        group_norm::group_norm_by(x, moments, weight, bias, epsilon, silu)
    }

    fn conv2d(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        residual: Option<&Tensor>,
        window: Window,
    ) -> Result<Tensor> {
        conv::conv2d(x, weight, bias, residual, window)
    }
}
