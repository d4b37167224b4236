//! From a packed matrix to f32, some rows at a time.

use std::ops::Range;

use candle_core::{
    CpuStorage, D, Result, Storage, Tensor, bail,
    quantized::{
        GgmlDType, GgmlType, QTensor,
        k_quants::{
            BlockQ2K, BlockQ3K, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ5_0, BlockQ5_1, BlockQ5K, BlockQ6K, BlockQ8_0,
        },
    },
};
use rayon::prelude::*;

use super::view::{CHUNK, widen as widen_halves};
use crate::{Fp8, Fp8Rows, Packed, Part};

/// Writes all of its rows to `wide`.
pub fn widen(packed: &Packed, wide: &mut [f32]) -> Result<()> {
    let mut rest = wide;
    for part in packed.parts() {
        let (rows, others) = rest.split_at_mut(part.rows() * packed.columns());
        rest = others;
        match part {
            Part::Blocks { blocks, rows: Range { start, .. } } => widen_blocks(blocks, *start, rows)?,
            Part::Fp8 { codes, format, scale } => widen_codes(codes, *format, *scale, rows)?,
            Part::Dense(half) => on_storage(half, |storage, start| widen_halves(storage, start, rows))?,
        }
    }
    Ok(())
}

/// Hands over the storage and the place of the first element.
fn on_storage(x: &Tensor, f: impl FnOnce(&CpuStorage, usize) -> Result<()>) -> Result<()> {
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(storage) = &*storage else { bail!("a CPU kernel was given a weight of another device") };
    if !layout.is_contiguous() {
        bail!("a CPU kernel was given a packed weight that is not contiguous")
    }
    f(storage, layout.start_offset())
}

/// Writes the values of rows of 8-bit floats to `wide`.
pub fn widen_fp8(rows: &Fp8Rows, wide: &mut [f32]) -> Result<()> {
    let (table, columns) = (Fp8Rows::FORMAT.table(1.0), rows.codes.dim(D::Minus1)?);
    let scales = rows.scales.flatten_all()?.to_vec1::<f32>()?;
    on_storage(&rows.codes, |storage, start| {
        let codes = &storage.as_slice::<u8>()?[start..start + wide.len()];
        let rows = wide.par_chunks_mut(columns.max(1)).zip(codes.par_chunks(columns.max(1)));
        rows.zip(&scales).for_each(|((wide, codes), scale)| {
            wide.iter_mut().zip(codes).for_each(|(wide, &code)| *wide = table[usize::from(code)] * scale);
        });
        Ok(())
    })
}

fn widen_codes(codes: &Tensor, format: Fp8, scale: f32, wide: &mut [f32]) -> Result<()> {
    let table = format.table(scale);
    on_storage(codes, |storage, start| {
        let codes = &storage.as_slice::<u8>()?[start..start + wide.len()];
        wide.par_chunks_mut(CHUNK).zip(codes.par_chunks(CHUNK)).for_each(|(wide, codes)| {
            wide.iter_mut().zip(codes).for_each(|(wide, &code)| *wide = table[usize::from(code)]);
        });
        Ok(())
    })
}

fn widen_blocks(blocks: &QTensor, first: usize, wide: &mut [f32]) -> Result<()> {
    let columns = blocks.shape().dims2()?.1;
    let kind = blocks.dtype();
    let bytes = blocks.data()?;
    match kind {
        GgmlDType::Q4_0 => to_float::<BlockQ4_0>(&bytes, columns, first, wide),
        GgmlDType::Q4_1 => to_float::<BlockQ4_1>(&bytes, columns, first, wide),
        GgmlDType::Q5_0 => to_float::<BlockQ5_0>(&bytes, columns, first, wide),
        GgmlDType::Q5_1 => to_float::<BlockQ5_1>(&bytes, columns, first, wide),
        GgmlDType::Q8_0 => to_float::<BlockQ8_0>(&bytes, columns, first, wide),
        GgmlDType::Q2K => to_float::<BlockQ2K>(&bytes, columns, first, wide),
        GgmlDType::Q3K => to_float::<BlockQ3K>(&bytes, columns, first, wide),
        GgmlDType::Q4K => to_float::<BlockQ4K>(&bytes, columns, first, wide),
        GgmlDType::Q5K => to_float::<BlockQ5K>(&bytes, columns, first, wide),
        GgmlDType::Q6K => to_float::<BlockQ6K>(&bytes, columns, first, wide),
        other => bail!("a CPU kernel was given blocks of {other:?}"),
    }
}

/// `B` is what candle holds `bytes` as.
fn to_float<B: GgmlType>(bytes: &[u8], columns: usize, first: usize, wide: &mut [f32]) -> Result<()> {
    // SAFETY: a block is plain bytes and f16s, for which all bits are allowed; `align_to` takes care of the alignment.
    let (before, blocks, after) = unsafe { bytes.align_to::<B>() };
    let per_row = columns / B::BLCK_SIZE;
    let rows = wide.len() / columns.max(1);
    let range = first * per_row..(first + rows) * per_row;
    let (true, Some(blocks)) = (before.is_empty() && after.is_empty(), blocks.get(range)) else {
        bail!("rows {first} to {} are not all in {} bytes of {:?}", first + rows, bytes.len(), B::DTYPE)
    };
    wide.par_chunks_mut(columns).zip(blocks.par_chunks(per_row)).for_each(|(wide, blocks)| B::to_float(blocks, wide));
    Ok(())
}
