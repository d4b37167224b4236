//! Operations that read each element once and write each result once.

use candle_core::{D, Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    buffer::zeros,
    simd::{gelu, sum, vectorised},
    view::{CHUNK, Rows, View, narrowed, vector, widened},
};
use crate::portable::EPSILON;

/// Rows that a thread takes at a time.
fn rows_per_task(width: usize) -> usize {
    (CHUNK / width.max(1)).max(1)
}

pub fn modulated_norm(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    let (shift, scale) = (vector(shift, width, "a shift")?, vector(scale, width, "a scale")?);
    let rows = Rows::of(x)?;
    let view = View::of(&rows.tensor);
    let data = view.floats()?;
    let mut y = zeros(rows.count * width);
    let per_task = rows_per_task(width);
    y.par_chunks_mut(per_task * width).enumerate().for_each(|(task, y)| {
        vectorised(|| {
            for (i, y) in y.chunks_exact_mut(width).enumerate() {
                let x = &data[(task * per_task + i) * rows.stride..][..width];
                let mean = sum(x, |x| x) / width as f32;
                let variance = sum(x, |x| (x - mean) * (x - mean)) / width as f32;
                let inverse = 1.0 / (variance + EPSILON as f32).sqrt();
                for ((y, &x), (&shift, &scale)) in y.iter_mut().zip(x).zip(shift.iter().zip(&scale)) {
                    *y = (x - mean) * inverse * (1.0 + scale) + shift;
                }
            }
        });
    });
    narrowed(y, x.shape(), x.dtype())
}

pub fn gated_residual(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    if x.shape() != y.shape() {
        bail!("a residual of {:?} for {:?}", y.shape(), x.shape())
    }
    let width = x.dim(D::Minus1)?;
    let gate = vector(gate, width, "a gate")?;
    let (x_rows, y_rows) = (Rows::of(x)?, Rows::of(y)?);
    let (x_view, y_view) = (View::of(&x_rows.tensor), View::of(&y_rows.tensor));
    let (x_data, y_data) = (x_view.floats()?, y_view.floats()?);
    let mut result = zeros(x_rows.count * width);
    let per_task = rows_per_task(width);
    result.par_chunks_mut(per_task * width).enumerate().for_each(|(task, result)| {
        vectorised(|| {
            for (i, result) in result.chunks_exact_mut(width).enumerate() {
                let row = task * per_task + i;
                let (x, y) = (&x_data[row * x_rows.stride..][..width], &y_data[row * y_rows.stride..][..width]);
                for ((result, &gate), (&x, &y)) in result.iter_mut().zip(&gate).zip(x.iter().zip(y)) {
                    *result = x + gate * y;
                }
            }
        });
    });
    narrowed(result, x.shape(), x.dtype())
}

pub fn gated_gelu(gate: &Tensor, value: &Tensor) -> Result<Tensor> {
    if gate.shape() != value.shape() {
        bail!("a gate of {:?} for {:?}", gate.shape(), value.shape())
    }
    let (gate_wide, value_wide) = (widened(gate)?.contiguous()?, widened(value)?.contiguous()?);
    let (gate_view, value_view) = (View::of(&gate_wide), View::of(&value_wide));
    let mut result = zeros(gate.elem_count());
    let inputs = gate_view.floats()?.par_chunks(CHUNK).zip(value_view.floats()?.par_chunks(CHUNK));
    result.par_chunks_mut(CHUNK).zip(inputs).for_each(|(result, (gate, value))| {
        vectorised(|| {
            for (result, (&gate, &value)) in result.iter_mut().zip(gate.iter().zip(value)) {
                *result = gelu(gate) * value;
            }
        });
    });
    narrowed(result, gate.shape(), gate.dtype())
}
