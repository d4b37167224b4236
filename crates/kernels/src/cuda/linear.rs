//! The linear layer: one matrix product, which the GPU's library computes with the bias and the GELU in it.

use candle_core::{D, DType, Result, Tensor};

use super::{Gpu, pointwise, rows::View, wide};

/// `y = x W^T + b`, and its GELU (tanh form) if asked for. Strides are distances of rows in elements; those of `y` touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Product {
    /// Of `x` and `W`; u8 are 8-bit floats of 4 bits of exponent.
    pub dtype: DType,
    /// Of `y` and `b`.
    pub result: DType,
    /// Of `x` and `y`.
    pub rows: usize,
    /// Rows of `W`, columns of `y`.
    pub outputs: usize,
    /// Columns of `x` and `W`.
    pub depth: usize,
    pub x_stride: usize,
    pub weight_stride: usize,
    pub gelu: bool,
}

/// The tensors of a product.
#[derive(Debug, Clone, Copy)]
pub struct Operands<'a> {
    pub x: &'a Tensor,
    pub weight: &'a Tensor,
    pub bias: Option<&'a Tensor>,
    /// Of 8-bit floats; none are ones.
    pub scales: Option<Scales<'a>>,
    /// To be written.
    pub y: &'a Tensor,
}

/// What each row of `x` and `W` is multiplied by, in f32.
#[derive(Debug, Clone, Copy)]
pub struct Scales<'a> {
    pub x: &'a Tensor,
    pub weight: &'a Tensor,
}

/// None if shapes do not fit, or if the library does not compute such a product.
pub fn linear(
    gpu: &impl Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    gelu: bool,
) -> Result<Option<Tensor>> {
    let (outputs, depth) = weight.dims2()?;
    let dtype = x.dtype();
    let dtypes_fit = weight.dtype() == dtype && bias.is_none_or(|bias| bias.dtype() == dtype);
    let shapes_fit = x.dim(D::Minus1)? == depth && bias.is_none_or(|bias| bias.dims() == [outputs]);
    if wide(dtype).is_none() || !dtypes_fit || !shapes_fit || x.elem_count() == 0 || outputs == 0 {
        return Ok(None);
    }
    let (x, x_stride) = matrix(gpu, x)?;
    let (weight, weight_stride) = matrix(gpu, weight)?;
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = outputs;
    let y = gpu.uninitialised(shape.into(), dtype, x.device())?;
    // cublasLt does not say how exact its GELU is: in f32 one of our own follows.
    let own_gelu = gelu && dtype == DType::F32;
    let rows = x.elem_count() / depth;
    let gelu = gelu && !own_gelu;
    let product = Product { dtype, result: dtype, rows, outputs, depth, x_stride, weight_stride, gelu };
    let operands = Operands { x: &x, weight: &weight, bias: bias.as_ref(), scales: None, y: &y };
    if !gpu.multiply(product, operands)? {
        return Ok(None);
    }
    Ok(Some(if own_gelu { pointwise::gelu(gpu, &y)? } else { y }))
}

/// A tensor as rows at one distance, at least as large as a row; copied if it is not that.
fn matrix(gpu: &impl Gpu, x: &Tensor) -> Result<(Tensor, usize)> {
    let view = View::of(gpu, x)?;
    let [outer, inner] = [view.rows.outer_stride as usize, view.rows.inner_stride as usize];
    let stride = match (view.outer, view.inner) {
        (1, 1) => Some(view.width),
        (1, _) => Some(inner),
        (_, 1) => Some(outer),
        (_, count) => (outer == count * inner).then_some(inner),
    };
    match stride {
        Some(stride) if stride >= view.width => Ok((view.tensor, stride)),
        _ => Ok((view.tensor.force_contiguous()?, view.width)),
    }
}
