//! Packed matrices in the dtype that is computed with: kernels/dequantise.cu writes each part's rows to their place.
//!
//! For each value its bits are read (4.5 of Q4_K, 8.5 of Q8_0, 8 of an 8-bit float) and 16 written, and nothing else: 2.6 to
//! 3.1 bytes. A value of blocks takes 10 to 16 instructions: at the full rate of its memory an RTX 4090 is at a tenth of its
//! instructions, an H100 at half of them. The memory is the limit, of whose rate 80% and more are to be expected; that has
//! not been measured.

use candle_core::{
    DType, Result, Tensor,
    quantized::{GgmlDType, QTensor},
};

use super::{Gpu, Launch, Params, wide};
use crate::{Fp8, Packed, Part};

#[repr(C)]
struct Dequantise {
    from: u64,
    y: u64,
    count: i64,
    scale: f32,
    wide: i32,
}

// SAFETY: dequantise.cu, `struct Dequantise`.
unsafe impl Params for Dequantise {}

/// Values that are dequantised at a time: no matrix of FLUX.1 has more (the largest are 21504 x 3072), and none of T5-XXL.
pub const AT_ONCE: usize = 1 << 26;

const THREADS: usize = 256;

/// Values that a thread writes.
const PIECE: usize = 8;

/// None if there is no kernel for the dtype or for a part's form.
pub fn dequantise(gpu: &impl Gpu, weight: &Packed, dtype: DType) -> Result<Option<Tensor>> {
    let parts = weight.parts();
    if let [Part::Dense(values)] = parts
        && values.dtype() == dtype
    {
        return Ok(Some(values.clone()));
    }
    let Some(device) = parts.first().map(Part::device) else { return Ok(None) };
    if wide(dtype).is_none() {
        return Ok(None);
    }
    let y = gpu.uninitialised((weight.rows(), weight.columns()).into(), dtype, &device)?;
    let mut first = 0;
    for part in parts {
        let rows = y.narrow(0, first, part.rows())?;
        if !write(gpu, part, &rows)? {
            return Ok(None);
        }
        first += part.rows();
    }
    Ok(Some(y))
}

/// Writes a part's values to `y`; false if there is no kernel for it.
fn write(gpu: &impl Gpu, part: &Part, y: &Tensor) -> Result<bool> {
    if y.elem_count() == 0 {
        return Ok(true);
    }
    let (kernel, values, scale) = match part {
        Part::Blocks { blocks, rows } => return write_blocks(gpu, blocks, rows.start, y),
        Part::Fp8 { codes, format: Fp8::E4m3, scale } => ("dequantise_e4m3", codes, *scale),
        Part::Fp8 { codes, format: Fp8::E5m2, scale } => ("dequantise_e5m2", codes, *scale),
        Part::Dense(values) => match values.dtype() {
            DType::F32 => ("dequantise_f32", values, 1.0),
            DType::BF16 => ("dequantise_bf16", values, 1.0),
            DType::F16 => ("dequantise_f16", values, 1.0),
            _ => return Ok(false),
        },
    };
    let values = values.contiguous()?;
    let (from, to, count) = (gpu.address(&values)?, gpu.address(y)?, y.elem_count());
    // Of 8-bit floats a load is as wide as a piece, 8 bytes.
    let load = (PIECE * values.dtype().size_in_bytes()).min(16) as u64;
    let whole = count.is_multiple_of(PIECE) && from.is_multiple_of(load) && to.is_multiple_of(16);
    let params = Dequantise { from, y: to, count: count as i64, scale, wide: whole.into() };
    launch(gpu, kernel, params, None, &[&values], y)?;
    Ok(true)
}

/// From row `first` on.
fn write_blocks(gpu: &impl Gpu, blocks: &QTensor, first: usize, y: &Tensor) -> Result<bool> {
    let kind = blocks.dtype();
    let Some(kernel) = of_blocks(kind) else { return Ok(false) };
    let (rows, columns) = y.dims2()?;
    let row = columns / kind.block_size() * kind.type_size();
    let (start, to) = (gpu.blocks(blocks)?, gpu.address(y)?);
    let fits = columns.is_multiple_of(kind.block_size())
        && (first + rows) * row <= blocks.storage_size_in_bytes()
        && start.is_multiple_of(16)
        && to.is_multiple_of(16);
    if !fits {
        return Ok(false);
    }
    let from = start + (first * row) as u64;
    let params = Dequantise { from, y: to, count: y.elem_count() as i64, scale: 1.0, wide: 1 };
    launch(gpu, kernel, params, Some(blocks), &[], y)?;
    Ok(true)
}

fn of_blocks(kind: GgmlDType) -> Option<&'static str> {
    Some(match kind {
        GgmlDType::Q4_0 => "dequantise_q4_0",
        GgmlDType::Q4_1 => "dequantise_q4_1",
        GgmlDType::Q5_0 => "dequantise_q5_0",
        GgmlDType::Q5_1 => "dequantise_q5_1",
        GgmlDType::Q8_0 => "dequantise_q8_0",
        GgmlDType::Q2K => "dequantise_q2k",
        GgmlDType::Q3K => "dequantise_q3k",
        GgmlDType::Q4K => "dequantise_q4k",
        GgmlDType::Q5K => "dequantise_q5k",
        GgmlDType::Q6K => "dequantise_q6k",
        _ => return None,
    })
}

fn launch(
    gpu: &impl Gpu,
    kernel: &str,
    params: Dequantise,
    blocks: Option<&QTensor>,
    reads: &[&Tensor],
    y: &Tensor,
) -> Result<()> {
    let launch = Launch {
        file: "dequantise",
        kernel,
        dtype: y.dtype(),
        blocks: [y.elem_count().div_ceil(THREADS * PIECE), 1, 1],
        threads: THREADS as u32,
        shared_memory: 0,
        reads,
        packed: blocks,
        writes: &[y],
    };
    gpu.launch(&launch, &params)
}
