//! The linear layer.

use candle_core::{D, DType, Result, Storage, Tensor, bail};
use rayon::prelude::*;

use super::{
    matrix::{Matrix, Parallelism, Product, multiply},
    simd::{gelu, vectorised},
    view::{Rows, View, narrowed, vector, widen},
};
use crate::Activation;

/// Rows of a narrow weight matrix that are widened at a time: enough for the product to be limited by arithmetic.
const WEIGHT_ROWS: usize = 1024;

pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let (outputs, depth) = weight.dims2()?;
    if x.dim(D::Minus1)? != depth {
        bail!("a linear layer of {depth} inputs was given {:?}", x.shape())
    }
    let rows = Rows::of(x)?;
    let view = View::of(&rows.tensor);
    let input = Matrix { data: view.floats()?, row_stride: rows.stride, column_stride: 1 };
    let bias = bias.map(|bias| vector(bias, outputs, "a bias")).transpose()?;
    let mut y = vec![0f32; rows.count * outputs];
    // Without an activation the bias is what the product is added to; with one it is added in that pass.
    let add = bias.as_ref().filter(|_| activation == Activation::None);
    if let Some(bias) = add {
        y.par_chunks_mut(outputs).for_each(|y| y.copy_from_slice(bias));
    }
    let mut product = |first: usize, count: usize, weight: &[f32]| {
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
    };
    let weight = weight.contiguous()?;
    if weight.dtype() == DType::F32 {
        product(0, outputs, View::of(&weight).floats()?);
    } else {
        let (storage, layout) = weight.storage_and_layout();
        let Storage::Cpu(storage) = &*storage else { bail!("a CPU kernel was given a weight of another device") };
        let mut block = vec![0f32; WEIGHT_ROWS.min(outputs) * depth];
        for first in (0..outputs).step_by(WEIGHT_ROWS) {
            let count = WEIGHT_ROWS.min(outputs - first);
            let block = &mut block[..count * depth];
            widen(storage, layout.start_offset() + first * depth, block)?;
            product(first, count, block);
        }
    }
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
    narrowed(y, shape, x.dtype())
}
