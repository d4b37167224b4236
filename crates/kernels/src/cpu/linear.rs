//! The linear layer.

use candle_core::{D, DType, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    buffer::zeros,
    matrix::{Matrix, Parallelism, Product, multiply},
    packed::{widen, widen_fp8},
    simd::{gelu, vectorised},
    view::{Rows, View, narrowed, vector},
};
use crate::{Activation, Fp8Rows, Packed, Part};

/// Rows of a narrow weight matrix that are widened at a time: enough for the product to be limited by arithmetic.
const WEIGHT_ROWS: usize = 1024;

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

/// Computes a layer of `outputs` x `depth` weights, which `weights` hands over in blocks: the first output, the number
/// of outputs, and their rows. The result is in `dtype`.
fn by_blocks(
    x: &Tensor,
    (outputs, depth): (usize, usize),
    bias: Option<&Tensor>,
    activation: Activation,
    dtype: DType,
    weights: impl FnOnce(&mut dyn FnMut(usize, usize, &[f32])) -> Result<()>,
) -> Result<Tensor> {
    if x.dim(D::Minus1)? != depth {
        bail!("a linear layer of {depth} inputs was given {:?}", x.shape())
    }
    let rows = Rows::of(x)?;
    let view = View::of(&rows.tensor);
    let input = Matrix { data: view.floats()?, row_stride: rows.stride, column_stride: 1 };
    let bias = bias.map(|bias| vector(bias, outputs, "a bias")).transpose()?;
    let mut y = zeros(rows.count * outputs);
    // Without an activation the bias is what the product is added to; with one it is added in that pass.
    let add = bias.as_ref().filter(|_| activation == Activation::None);
    if let Some(bias) = add {
        y.par_chunks_mut(outputs).for_each(|y| y.copy_from_slice(bias));
    }
    weights(&mut |first: usize, count: usize, weight: &[f32]| {
        let transposed = Matrix { data: weight, row_stride: 1, column_stride: depth };
        let product = Product {
            rows: rows.count,
            columns: count,
            depth,
            add: add.is_some(),
            factor: 1.0,
            threads: Parallelism::Rayon(0),
        };
        // SAFETY: columns `first..first + count` of `y`, which has `rows.count` rows of `outputs`; `y` is ours alone.
        unsafe { multiply(y[first..].as_mut_ptr(), outputs, product, input, transposed) };
    })?;
    if activation == Activation::Gelu {
        y.par_chunks_mut(outputs).for_each(|y| {
            vectorised(|| match &bias {
                Some(bias) => y.iter_mut().zip(bias).for_each(|(y, &bias)| *y = gelu(*y + bias)),
                None => y.iter_mut().for_each(|y| *y = gelu(*y)),
            });
        });
    }
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = outputs;
    narrowed(y, shape, dtype)
}
