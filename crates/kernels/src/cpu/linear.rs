//! The linear layer.

use candle_core::{D, DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    buffer::zeros,
    matrix::{Matrix, Parallelism, Product, multiply, transpose},
    packed::{widen, widen_fp8},
    simd::{gelu, vectorised},
    view::{Rows, View, narrowed, vector},
};
use crate::{Activation, Fp8Rows, Packed, Part};

/// Rows of a narrow weight matrix that are widened at a time: enough for the product to be limited by arithmetic.
const WEIGHT_ROWS: usize = 1024;

/// Rows of `x` for which [`transposed`] is the faster way, by a quarter at 512 of them; at 2048 it gains nothing any more. One row
/// is read once and needs no packing.
const FEW_ROWS: std::ops::RangeInclusive<usize> = 2..=1024;

pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let weight = weight.contiguous()?;
    if weight.dtype() != DType::F32 {
        return linear_packed(x, &Packed::stack(vec![Part::Dense(weight)])?, bias, activation);
    }
    let (outputs, depth) = weight.dims2()?;
    by_blocks(x, (outputs, depth), bias, activation, x.dtype(), |product| {
        product(0, outputs, View::of(&weight).floats()?);
        Ok(())
    })
}

pub fn linear_packed(x: &Tensor, weight: &Packed, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let (outputs, depth) = (weight.rows(), weight.columns());
    by_blocks(x, (outputs, depth), bias, activation, x.dtype(), |product| {
        // By rows of the whole matrix: a result is the same bit for bit, however the rows lie in parts.
        let mut block = vec![0f32; WEIGHT_ROWS.min(outputs) * depth];
        for first in (0..outputs).step_by(WEIGHT_ROWS) {
            let count = WEIGHT_ROWS.min(outputs - first);
            widen(&weight.narrow(first..first + count)?, &mut block[..count * depth])?;
            product(first, count, &block[..count * depth]);
        }
        Ok(())
    })
}

/// The values that 8-bit floats stand for, multiplied in f32: other roundings than of sums that are scaled afterwards, but no
/// larger ones.
pub fn linear_fp8(x: &Tensor, weight: &Fp8Rows, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let (outputs, depth) = weight.codes.dims2()?;
    let rows = Fp8Rows::quantise(x)?;
    let mut rounded = vec![0f32; x.elem_count()];
    widen_fp8(&rows, &mut rounded)?;
    let rounded = Tensor::from_vec(rounded, x.shape(), x.device())?;
    by_blocks(&rounded, (outputs, depth), bias, activation, x.dtype(), |product| {
        let mut block = vec![0f32; WEIGHT_ROWS.min(outputs) * depth];
        for first in (0..outputs).step_by(WEIGHT_ROWS) {
            let count = WEIGHT_ROWS.min(outputs - first);
            widen_fp8(&weight.narrow(first..first + count)?, &mut block[..count * depth])?;
            product(first, count, &block[..count * depth]);
        }
        Ok(())
    })
}

/// A layer, and where its result goes.
struct Layer<'a> {
    x: Matrix<'a>,
    rows: usize,
    outputs: usize,
    depth: usize,
    bias: Option<&'a [f32]>,
    activation: Activation,
    /// `rows` x `outputs`, zeros.
    y: &'a mut [f32],
}

/// Takes a block of a layer's weights: the first output, the number of outputs, and their rows.
type TakeBlock<'a> = &'a mut dyn FnMut(usize, usize, &[f32]);

/// Computes a layer of `outputs` x `depth` weights, which `weights` hands over in blocks. The result is in `dtype`.
fn by_blocks(
    x: &Tensor,
    (outputs, depth): (usize, usize),
    bias: Option<&Tensor>,
    activation: Activation,
    dtype: DType,
    weights: impl FnOnce(TakeBlock<'_>) -> Result<()>,
) -> Result<Tensor> {
    if x.dim(D::Minus1)? != depth {
        bail!("a linear layer of {depth} inputs was given {:?}", x.shape())
    }
    let rows = Rows::of(x)?;
    let view = View::of(&rows.tensor);
    let input = Matrix { data: view.floats()?, row_stride: rows.stride, column_stride: 1 };
    let bias = bias.map(|bias| vector(bias, outputs, "a bias")).transpose()?;
    let mut y = zeros(rows.count * outputs);
    let layer = Layer { x: input, rows: rows.count, outputs, depth, bias: bias.as_deref(), activation, y: &mut y };
    if FEW_ROWS.contains(&rows.count) && depth > 0 {
        transposed(layer, weights)?;
    } else {
        direct(layer, weights)?;
    }
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = outputs;
    narrowed(y, shape, dtype)
}

fn direct(layer: Layer<'_>, weights: impl FnOnce(TakeBlock<'_>) -> Result<()>) -> Result<()> {
    let Layer { x, rows, outputs, depth, bias, activation, y } = layer;
    // Without an activation the bias is what the product is added to; with one it is added in that pass.
    let add = bias.filter(|_| activation == Activation::None);
    if let Some(bias) = add {
        y.par_chunks_mut(outputs).for_each(|y| y.copy_from_slice(bias));
    }
    weights(&mut |first, count, weight| {
        let weight = Matrix { data: weight, row_stride: 1, column_stride: depth };
        let product =
            Product { rows, columns: count, depth, add: add.is_some(), factor: 1.0, threads: Parallelism::Rayon(0) };
        // SAFETY: columns `first..first + count` of `y`, which has `rows` rows of `outputs`; `y` is ours alone.
        unsafe { multiply(y[first..].as_mut_ptr(), outputs, product, x, weight) };
    })?;
    if activation == Activation::Gelu {
        y.par_chunks_mut(outputs).for_each(|y| finish(y, bias, activation));
    }
    Ok(())
}

/// Computes the result's transpose from that of `x`.
///
/// gemm packs its factors, and the one whose rows lie along the result's adjacent elements quickly only if it is itself adjacent
/// that way. In [`direct`] that one is the weights, which are not: element by element, at addresses a power of two apart, the
/// packing costs as much as it costs to multiply by hundreds of rows. Here it is `x`, and the transpositions are of the small matrices.
fn transposed(layer: Layer<'_>, weights: impl FnOnce(TakeBlock<'_>) -> Result<()>) -> Result<()> {
    let Layer { x, rows, outputs, depth, bias, activation, y } = layer;
    let mut x_transposed = zeros(depth * rows);
    transpose(x, (rows, depth), &mut x_transposed, rows, |_| ());
    let x = Matrix { data: &x_transposed, row_stride: rows, column_stride: 1 };
    let mut result = zeros(WEIGHT_ROWS.min(outputs) * rows);
    weights(&mut |first, count, weight| {
        for (i, weight) in weight[..count * depth].chunks(WEIGHT_ROWS * depth).enumerate() {
            let (first, count) = (first + i * WEIGHT_ROWS, weight.len() / depth);
            let weight = Matrix { data: weight, row_stride: depth, column_stride: 1 };
            let product =
                Product { rows: count, columns: rows, depth, add: false, factor: 1.0, threads: Parallelism::Rayon(0) };
            // SAFETY: `count` rows of `rows`, and `count` is at most the `WEIGHT_ROWS` that there is room for.
            unsafe { multiply(result.as_mut_ptr(), rows, product, weight, x) };
            let result = Matrix { data: &result, row_stride: rows, column_stride: 1 };
            let bias = bias.map(|bias| &bias[first..][..count]);
            transpose(result, (count, rows), &mut y[first..], outputs, |y| finish(y, bias, activation));
        }
    })
}

/// Adds the bias and applies the activation.
fn finish(y: &mut [f32], bias: Option<&[f32]>, activation: Activation) {
    let of = |y: f32| if activation == Activation::Gelu { gelu(y) } else { y };
    vectorised(|| match bias {
        Some(bias) => y.iter_mut().zip(bias).for_each(|(y, &bias)| *y = of(*y + bias)),
        None => y.iter_mut().for_each(|y| *y = of(*y)),
    });
}
