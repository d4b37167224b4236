//! A parameter's values, some rows at a time.

use std::ops::Range;

use retouch_kernels::{Fp8, Packed};

use super::Target;
use crate::{
    Encoding, Result, Weights,
    format::{encode, part},
};

/// Values that are in memory at a time: 8 MB of f32.
const VALUES: usize = 1 << 21;

/// Rows of a part of a matrix on the CPU: as many as are widened at a time there, so that parts cost nothing.
const PART_ROWS: usize = 1024;

/// Hands over the values of the parameter `name` of `shape`.
pub fn each_run(weights: &Weights, name: &str, shape: &[usize], f: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let rows = shape.first().copied().unwrap_or(1);
    each_run_of(weights, name, 0..rows, shape.iter().skip(1).product(), f)
}

/// Of some of its rows, which have so many columns.
fn each_run_of(
    weights: &Weights,
    name: &str,
    rows: Range<usize>,
    columns: usize,
    mut f: impl FnMut(&[f32]) -> Result<()>,
) -> Result<()> {
    let run = (VALUES / columns.max(1)).max(1);
    for first in rows.clone().step_by(run) {
        let values = weights.rows(name, first..rows.end.min(first + run))?;
        f(&values.flatten_all()?.to_vec1()?)?;
    }
    Ok(())
}

/// The scale by which a parameter's largest value becomes the largest 8-bit float.
pub fn scale_for(weights: &Weights, name: &str, shape: &[usize], format: Fp8) -> Result<f32> {
    let mut largest = 0_f32;
    each_run(weights, name, shape, |values| {
        largest = values.iter().fold(largest, |largest, value| largest.max(value.abs()));
        Ok(())
    })?;
    Ok(if largest > 0.0 { largest / format.largest() } else { 1.0 })
}

/// The matrix `name` as `target`, on the weights' device.
///
/// On the CPU in parts, of which one at a time is there twice while candle takes it; a GPU has one part, for few and long products.
pub(crate) fn quantised(weights: &Weights, name: &str, shape: (usize, usize), target: Target) -> Result<Packed> {
    let (rows, columns) = shape;
    let encoding = target.encoding_for(columns);
    let scale = match (target, &encoding) {
        (Target::Fp8Scaled, Encoding::Fp8(format)) => scale_for(weights, name, &[rows, columns], *format)?,
        _ => 1.0,
    };
    let part_rows = if weights.stays_on_cpu() { PART_ROWS } else { rows.max(1) };
    let mut parts = Vec::with_capacity(rows.div_ceil(part_rows));
    for first in (0..rows).step_by(part_rows) {
        let range = first..rows.min(first + part_rows);
        let shape = (range.len(), columns);
        let mut bytes = Vec::with_capacity(encoding.bytes(&[range.len(), columns]).unwrap_or_default());
        each_run_of(weights, name, range, columns, |values| {
            bytes.extend(encode(&encoding, values, columns, scale)?);
            Ok(())
        })?;
        parts.push(part(&encoding, &bytes, shape, scale, weights.device())?);
    }
    Ok(Packed::stack(parts)?)
}
