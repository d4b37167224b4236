//! A parameter's values, some rows at a time.

use retouch_kernels::{Fp8, Packed};

use super::Target;
use crate::{
    Encoding, Result, Weights,
    format::{encode, part},
};

/// Values that are in memory at a time: 16 MB of f32, of which there are several copies on the way.
const VALUES: usize = 1 << 22;

/// Hands over the values of the parameter `name` of `shape`.
pub fn each_run(weights: &Weights, name: &str, shape: &[usize], mut f: impl FnMut(&[f32]) -> Result<()>) -> Result<()> {
    let rows = shape.first().copied().unwrap_or(1);
    let row: usize = shape.iter().skip(1).product();
    let run = (VALUES / row.max(1)).max(1);
    for first in (0..rows).step_by(run) {
        let values = weights.rows(name, first..rows.min(first + run))?;
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
pub(crate) fn quantised(weights: &Weights, name: &str, shape: (usize, usize), target: Target) -> Result<Packed> {
    let encoding = target.encoding_for(shape.1);
    let dims = [shape.0, shape.1];
    let scale = match (target, &encoding) {
        (Target::Fp8Scaled, Encoding::Fp8(format)) => scale_for(weights, name, &dims, *format)?,
        _ => 1.0,
    };
    let mut bytes = Vec::with_capacity(encoding.bytes(&dims).unwrap_or_default());
    each_run(weights, name, &dims, |values| {
        bytes.extend(encode(&encoding, values, shape.1, scale)?);
        Ok(())
    })?;
    Ok(Packed::stack(vec![part(&encoding, &bytes, shape, scale, weights.device())?])?)
}
