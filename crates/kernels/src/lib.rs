//! The operations in which an edit spends its time, each fused into one pass over its data.
//!
//! [`Kernels`] says what each one computes; its default methods are the definition, written in candle's own operations
//! (module [`portable`]), and run on every device. A device that has something faster replaces methods:
//!
//! | operation | CPU | CUDA | Metal |
//! |---|---|---|---|
//! | attention | blocks with an online softmax | the same in tensor cores (bf16, f16; heads of 32, 64, 128), or cuDNN | candle's fused attention |
//! | linear (+ GELU) | one pass, all threads | cublasLt, which adds the bias and takes the GELU | portable |
//! | gated residual, modulated norm, heads, gated GELU | one pass, all threads | one kernel each | portable |
//! | linear with a packed matrix | widened in blocks of rows | dequantised by one kernel for each form, then as above | portable, in runs of rows |
//! | linear in 8-bit floats | rounded to them, in f32 | rows rounded by one kernel, cublasLt's 8-bit products (8.9 and newer) | portable |
//! | group norm (+ SiLU) | two passes | two kernels | portable |
//! | convolution | tiles of matrix products | cuDNN, or portable in bands of rows | portable |
//!
//! Attention in f32, with other heads, or with a bias in heads of other than 64 is portable on CUDA: scores of a run of
//! queries at a time. cuDNN, where it is installed, computes what it is expected to be faster at (module `cuda`).
//!
//! [`streaming`] brings parameters that do not stay on a GPU there while it computes.
//!
//! A model asks [`for_device`] once, when it is loaded, and keeps what it gets.
//!
//! Arithmetic inside an operation is f32 whatever the tensors' dtype; each operation rounds once, when it writes.

mod conv;
mod cpu;
pub mod cuda;
mod fp8;
mod fp8_rows;
mod metal;
mod moments;
mod packed;
pub mod portable;
mod profile;
#[cfg(test)]
#[path = "../tests/agreement/random/mod.rs"]
mod random;
pub mod streaming;

use std::fmt::Debug;

use candle_core::{DType, Device, Result, Tensor};

pub use conv::Window;
pub use fp8::Fp8;
pub use fp8_rows::Fp8Rows;
pub use moments::Moments;
pub use packed::{Packed, Part};
pub use profile::{Operation, Profiled, Total};

/// What follows a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    None,
    /// `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`.
    Gelu,
}

/// One stream's queries, keys and values as a fused projection makes them, and the norms of its heads.
#[derive(Debug)]
pub struct Stream<'a> {
    /// `[batch, tokens, 3 * heads * head_dim]`; may be a view of wider rows.
    pub qkv: &'a Tensor,
    /// `[head_dim]`.
    pub query_scale: &'a Tensor,
    /// `[head_dim]`.
    pub key_scale: &'a Tensor,
}

/// Cosines and sines of each token's angles, each `[tokens, head_dim / 2]` in f32.
#[derive(Debug, Clone)]
pub struct Rotation {
    pub cos: Tensor,
    pub sin: Tensor,
}

/// The fused operations. All tensors of a call are on one device; they have one dtype where nothing else is said.
pub trait Kernels: Debug + Send + Sync {
    /// `x W^T + b`, then `activation`: `x` `[..., in]`, `weight` `[out, in]`, `bias` `[out]`; returns `[..., out]`.
    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        portable::linear(x, weight, bias, activation)
    }

    /// [`Self::linear`] with a matrix in fewer bits than `x`, which are widened exactly and rounded to no less than the
    /// dtype of `x`.
    fn linear_packed(
        &self,
        x: &Tensor,
        weight: &Packed,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        portable::linear_packed(x, weight, bias, activation)
    }

    /// The values of a packed matrix in `dtype`, each rounded once: `[rows, columns]`.
    fn dequantise(&self, weight: &Packed, dtype: DType) -> Result<Tensor> {
        weight.dequantise(dtype)
    }

    /// Each row of `x` `[..., columns]` divided by its scale, which brings its largest magnitude to 448, and rounded to the
    /// nearest 8-bit float of 4 bits of exponent, of two equally near ones to the even one. What is not a number stays so.
    fn quantise_rows(&self, x: &Tensor) -> Result<Fp8Rows> {
        Fp8Rows::quantise(x)
    }

    /// [`Self::linear`] in 8-bit floats: the rows of `x` as [`Self::quantise_rows`] makes them times those of `weight`. Products of
    /// codes are added up in f32, then multiplied by the scales of both rows; `bias` is in the dtype of `x`.
    fn linear_fp8(
        &self,
        x: &Tensor,
        weight: &Fp8Rows,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        portable::linear_fp8(x, weight, bias, activation)
    }

    /// Layer norm over the last axis without learned parameters (eps 1e-6), then `* (1 + scale) + shift`.
    ///
    /// `x` `[batch, tokens, hidden]`; `shift` and `scale` `[1, hidden]`; returns the shape of `x`.
    fn modulated_norm(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        portable::modulated_norm(x, shift, scale)
    }

    /// `x + gate * y`: `x` and `y` `[batch, tokens, hidden]`, `gate` `[1, hidden]`.
    fn gated_residual(&self, x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
        portable::gated_residual(x, y, gate)
    }

    /// Splits the streams' projections into heads, brings each query and key to a root mean square of 1 (eps 1e-6) times
    /// the learned scale, turns each pair of neighbouring channels by the token's angles, and joins the streams.
    ///
    /// Returns `[batch, tokens of all streams, 3, heads, head_dim]`: queries, keys, values. The angles count through
    /// the streams' tokens in order.
    fn heads(&self, streams: &[Stream<'_>], rotation: &Rotation) -> Result<Tensor> {
        portable::heads(streams, rotation)
    }

    /// `softmax(scale * q k^T + bias) v` for every head.
    ///
    /// `q` `[batch, queries, heads, head_dim]`, `k` and `v` `[batch, keys, heads, head_dim]`, any strides but the last;
    /// `bias` `[1, heads or 1, queries, keys]`, any strides, minus infinity where a query must not see a key; one that sees none
    /// gets NaN. Returns `[batch, queries, heads * head_dim]`.
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
        portable::attention(q, k, v, bias, scale)
    }

    /// [`Self::attention`] without bias, and beside it in each row `GELU(inner)`, the two inputs of a single block's output.
    ///
    /// `inner` `[batch, queries, mlp]`, may be a view; returns `[batch, queries, heads * head_dim + mlp]`.
    fn attention_beside_gelu(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, inner: &Tensor) -> Result<Tensor> {
        portable::attention_beside_gelu(q, k, v, scale, inner)
    }

    /// `GELU(gate) * value` for two tensors of one shape.
    fn gated_gelu(&self, gate: &Tensor, value: &Tensor) -> Result<Tensor> {
        portable::gated_gelu(gate, value)
    }

    /// Each of `groups` groups of channels brought to mean 0 and variance 1 over its image, then a scale and a shift per
    /// channel, then `y * sigmoid(y)` if `silu`.
    ///
    /// `x` `[batch, channels, height, width]`, `weight` and `bias` `[channels]`.
    fn group_norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        groups: usize,
        epsilon: f64,
        silu: bool,
    ) -> Result<Tensor> {
        portable::group_norm(x, weight, bias, groups, epsilon, silu)
    }

    /// What [`Self::group_norm`] gathers of `x` before it writes anything.
    ///
    /// `x` `[batch, channels, height, width]`, whole images or a part of their rows.
    fn group_moments(&self, x: &Tensor, groups: usize) -> Result<Moments> {
        portable::group_moments(x, groups)
    }

    /// [`Self::group_norm`] of a part of an image, by the moments of the whole one.
    fn group_norm_by(
        &self,
        x: &Tensor,
        moments: &Moments,
        weight: &Tensor,
        bias: &Tensor,
        epsilon: f64,
        silu: bool,
    ) -> Result<Tensor> {
        portable::group_norm_by(x, moments, weight, bias, epsilon, silu)
    }

    /// A convolution plus `residual` (of the output's shape).
    ///
    /// `x` `[batch, in, height, width]`, `weight` `[out, in, k, k]`, `bias` `[out]`; returns `[batch, out, ...]` of the size
    /// that `window` makes.
    fn conv2d(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        residual: Option<&Tensor>,
        window: Window,
    ) -> Result<Tensor> {
        portable::conv2d(x, weight, bias, residual, window)
    }
}

/// A tensor of the values that `bytes` hold, as a file of weights has them, on `device`.
pub fn upload(bytes: &[u8], dtype: DType, shape: &[usize], device: &Device) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device
        && let Some(x) = cuda::upload(bytes, dtype, shape, device)?
    {
        return Ok(x);
    }
    Tensor::from_raw_buffer(bytes, dtype, shape, device)
}

/// Each element, or the nearer of `low` and `high` where it is not between them.
///
/// Not candle's `clamp`: that is generic, and leaves the source of candle's CUDA kernels, 2.4 MB, in each crate that calls it.
pub fn clamp(x: &Tensor, low: f32, high: f32) -> Result<Tensor> {
    let bound = |value: f32| Tensor::new(value, &Device::Cpu)?.to_dtype(x.dtype())?.to_device(x.device());
    x.broadcast_maximum(&bound(low)?)?.broadcast_minimum(&bound(high)?)
}

/// The definitions and nothing else.
#[derive(Debug)]
pub struct Portable;

impl Kernels for Portable {}

/// Whether [`Kernels::linear_fp8`] is worth having on a device: where it is not computed in tensor cores or, slowly but with the
/// same results, on the CPU, an error is one sentence that says what to do.
pub fn check_fp8(device: &Device) -> std::result::Result<(), String> {
    match device {
        Device::Cpu => Ok(()),
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::check_fp8(device),
        _ => {
            Err("it has no products of 8-bit floats; use --dtype bf16, with --quantize q8_0 to hold weights in 8 bits"
                .into())
        }
    }
}

/// The fastest that there is for a device.
pub fn for_device(device: &Device) -> &'static dyn Kernels {
    match device {
        Device::Cpu => &cpu::Cpu,
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => cuda::kernels(device),
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => &Portable,
        Device::Metal(_) => &metal::Metal,
    }
}
