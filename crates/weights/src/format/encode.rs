//! From values to a file's bytes.

use candle_core::{
    Device, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor},
};
use half::{bf16, f16};
use rayon::prelude::*;

use super::Encoding;

/// Values that a thread quantises at a time.
const VALUES: usize = 1 << 16;

/// Rows of `columns` values in an encoding, rounded to nearest; `scale` is that of 8-bit floats.
///
/// # Errors
/// An encoding that is not read, and rows that are no whole blocks.
pub fn encode(encoding: &Encoding, values: &[f32], columns: usize, scale: f32) -> Result<Vec<u8>> {
    Ok(match encoding {
        Encoding::F64 => values.iter().flat_map(|&value| f64::from(value).to_le_bytes()).collect(),
        Encoding::F32 => values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Encoding::F16 => values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect(),
        Encoding::Bf16 => values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect(),
        Encoding::Fp8(format) => format.codes(values, scale),
        Encoding::Blocks(kind) if columns.is_multiple_of(kind.block_size()) => blocks(*kind, values, columns)?,
        other => bail!("rows of {columns} values cannot be written in {other}"),
    })
}

fn blocks(kind: GgmlDType, values: &[f32], columns: usize) -> Result<Vec<u8>> {
    let run = (VALUES / columns.max(1)).max(1) * columns;
    let quantised = values.par_chunks(run.max(1)).map(|values| {
        let values = Tensor::from_slice(values, (values.len() / columns, columns), &Device::Cpu)?;
        Ok(QTensor::quantize(&values, kind)?.data()?.into_owned())
    });
    Ok(quantised.collect::<Result<Vec<_>>>()?.concat())
}
