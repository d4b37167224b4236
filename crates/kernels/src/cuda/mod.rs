//! CUDA: kernels of our own, in the folder `kernels`, one file per idea, compiled for the GPUs of compute capability 8.0 and
//! newer when the crate is built (`build.rs`); matrix products by cublasLt; where it is installed, the large attentions and
//! convolutions by cuDNN, whose results are first held against ours.
//!
//! An operation here checks shapes and strides, allocates and launches. What it does not take (another dtype, a head size
//! without a kernel, shapes that do not fit) it leaves to the definition, which computes it or says what is wrong.
//!
//! Nothing but [`Gpu`] needs a GPU: the tests put an emulation in its place, which runs the same kernels, compiled for the
//! host, through the same launches.

mod attention;
mod conv;
#[cfg(feature = "cuda")]
mod cublaslt;
#[cfg(any(feature = "cuda", test))]
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "what only runs on a GPU"))]
mod cudnn;
mod dequantise;
#[cfg(feature = "cuda")]
mod device;
mod fp8;
mod group_norm;
mod heads;
#[cfg(feature = "cuda")]
mod lanes;
mod linear;
mod modulated_norm;
mod pointwise;
#[cfg(any(feature = "cuda", test))]
mod requirements;
mod rows;
#[cfg(any(feature = "cuda", test))]
mod slots;
#[cfg(any(feature = "cuda", test))]
mod staging;
mod tasks;
#[cfg(feature = "cuda")]
mod upload;

use std::fmt::Debug;

use candle_core::{DType, Device, Result, Shape, Tensor, quantized::QTensor};

#[cfg(feature = "cuda")]
pub use cudnn::Use;
#[cfg(feature = "cuda")]
pub(crate) use device::check_fp8;
#[cfg(feature = "cuda")]
pub(crate) use device::kernels;
#[cfg(feature = "cuda")]
pub use device::{cudnn_status, open, out_of_memory, with_cudnn};
#[cfg(feature = "cuda")]
pub(crate) use lanes::feed;
pub use linear::{Operands, Product, Scales};
pub use tasks::{Attention, Convolution, Standing, Task, Verdict};
#[cfg(feature = "cuda")]
pub(crate) use upload::upload;

use crate::{Activation, Fp8Rows, Kernels, Moments, Packed, Rotation, Stream, Window, portable};

/// What the operations run on.
pub trait Gpu: Debug + Send + Sync {
    /// The address of a tensor's first element.
    fn address(&self, x: &Tensor) -> Result<u64>;

    /// The address of the first of a matrix's blocks.
    fn blocks(&self, blocks: &QTensor) -> Result<u64>;

    /// A tensor for a kernel to write.
    fn uninitialised(&self, shape: Shape, dtype: DType, device: &Device) -> Result<Tensor>;

    /// Bytes of shared memory that the blocks on one multiprocessor have together.
    fn shared_memory(&self) -> usize;

    /// Starts a kernel with `params`, which is laid out as the kernel's C++ struct.
    fn launch<P: Params>(&self, launch: &Launch<'_>, params: &P) -> Result<()>;

    /// Writes a matrix product; false if the GPU's library does not compute it.
    fn multiply(&self, product: Product, operands: Operands<'_>) -> Result<bool>;

    /// Whether the GPU's library has a plan for a task that is expected to be faster than what is here, which it makes if it has
    /// not yet.
    fn planned(&self, task: &Task) -> Option<Standing>;

    /// Writes the task's result `y` by that plan; false if it does not work.
    fn run(&self, task: &Task, operands: &[&Tensor], y: &Tensor) -> Result<bool>;

    /// Notes how a plan's first result compared with ours. A library whose result differs is not asked again.
    fn judge(&self, task: &Task, verdict: Verdict);
}

/// A kernel's arguments.
///
/// # Safety
/// The type is `repr(C)`, equals the C++ struct field by field, and consists of plain numbers.
pub unsafe trait Params {}

/// How a kernel is started.
#[derive(Debug)]
pub struct Launch<'a> {
    /// The file in the folder `kernels`, without its extension.
    pub file: &'static str,
    /// The kernel's name before its dtype.
    pub kernel: &'a str,
    pub dtype: DType,
    pub blocks: [usize; 3],
    pub threads: u32,
    /// Bytes per block that the launch decides on.
    pub shared_memory: usize,
    pub reads: &'a [&'a Tensor],
    /// Blocks that it reads beside them.
    pub packed: Option<&'a QTensor>,
    pub writes: &'a [&'a Tensor],
}

impl Launch<'_> {
    /// The whole name of the kernel.
    pub fn name(&self) -> String {
        format!("{}_{}", self.kernel, self.dtype.as_str())
    }
}

/// The most blocks along the first axis of a launch; the others take up to 65535.
const MOST_BLOCKS: usize = (1 << 31) - 1;

/// Elements of the widest load, 16 bytes; none if there are no kernels for the dtype.
fn wide(dtype: DType) -> Option<usize> {
    matches!(dtype, DType::F32 | DType::BF16 | DType::F16).then(|| 16 / dtype.size_in_bytes())
}

/// The operations on a GPU.
#[derive(Debug)]
pub struct Cuda<G>(pub G);

impl<G: Gpu> Kernels for Cuda<G> {
    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
        let y = linear::linear(&self.0, x, weight, bias, activation == Activation::Gelu)?;
        y.map_or_else(|| portable::linear(x, weight, bias, activation), Ok)
    }

    fn linear_packed(
        &self,
        x: &Tensor,
        weight: &Packed,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        portable::in_runs(x, weight, bias, dequantise::AT_ONCE, |x, weight, bias| {
            self.linear(x, &self.dequantise(weight, x.dtype())?, bias, activation)
        })
    }

    fn dequantise(&self, weight: &Packed, dtype: DType) -> Result<Tensor> {
        dequantise::dequantise(&self.0, weight, dtype)?.map_or_else(|| weight.dequantise(dtype), Ok)
    }

    fn quantise_rows(&self, x: &Tensor) -> Result<Fp8Rows> {
        fp8::quantise_rows(&self.0, x)?.map_or_else(|| Fp8Rows::quantise(x), Ok)
    }

    fn linear_fp8(
        &self,
        x: &Tensor,
        weight: &Fp8Rows,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        let y = fp8::linear(&self.0, x, weight, bias, activation == Activation::Gelu)?;
        y.map_or_else(|| portable::linear_fp8(x, weight, bias, activation), Ok)
    }

    fn modulated_norm(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        let y = modulated_norm::modulated_norm(&self.0, x, shift, scale)?;
        y.map_or_else(|| portable::modulated_norm(x, shift, scale), Ok)
    }

    fn gated_residual(&self, x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
        let sum = pointwise::gated_residual(&self.0, x, y, gate)?;
        sum.map_or_else(|| portable::gated_residual(x, y, gate), Ok)
    }

    fn heads(&self, streams: &[Stream<'_>], rotation: &Rotation) -> Result<Tensor> {
        let y = heads::heads(&self.0, streams, rotation)?;
        y.map_or_else(|| portable::heads(streams, rotation), Ok)
    }

    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
        let y = attention::attention(&self.0, [q, k, v], bias, scale, None)?;
        y.map_or_else(|| portable::attention(q, k, v, bias, scale), Ok)
    }

    fn attention_beside_gelu(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, inner: &Tensor) -> Result<Tensor> {
        let y = attention::attention(&self.0, [q, k, v], None, scale, Some(inner))?;
        y.map_or_else(|| portable::attention_beside_gelu(q, k, v, scale, inner), Ok)
    }

    fn gated_gelu(&self, gate: &Tensor, value: &Tensor) -> Result<Tensor> {
        let y = pointwise::gated_gelu(&self.0, gate, value)?;
        y.map_or_else(|| portable::gated_gelu(gate, value), Ok)
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
        let y = group_norm::group_norm(&self.0, x, weight, bias, groups, epsilon, silu)?;
        y.map_or_else(|| portable::group_norm(x, weight, bias, groups, epsilon, silu), Ok)
    }

    fn group_moments(&self, x: &Tensor, groups: usize) -> Result<Moments> {
        group_norm::group_moments(&self.0, x, groups)?.map_or_else(|| portable::group_moments(x, groups), Ok)
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
        let y = group_norm::group_norm_by(&self.0, x, moments, weight, bias, epsilon, silu)?;
        y.map_or_else(|| portable::group_norm_by(x, moments, weight, bias, epsilon, silu), Ok)
    }

    fn conv2d(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        residual: Option<&Tensor>,
        window: Window,
    ) -> Result<Tensor> {
        conv::conv2d(&self.0, x, weight, bias, residual, window)
    }
}
