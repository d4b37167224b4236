//! The linear layer in 8-bit floats: kernels/fp8.cu around the library's product.

use candle_core::{D, DType, Result, Tensor};

use super::{
    Gpu, Launch, MOST_BLOCKS, Operands, Params, Product,
    linear::Scales,
    rows::{Rows, View},
    wide,
};
use crate::Fp8Rows;

#[repr(C)]
struct QuantiseRows {
    x: Rows,
    codes: u64,
    scales: u64,
    inner: i64,
    width: i64,
    wide: i64,
}

// SAFETY: fp8.cu, `struct QuantiseRows`.
unsafe impl Params for QuantiseRows {}

#[repr(C)]
struct ScaledSums {
    sums: u64,
    row_scales: u64,
    column_scales: u64,
    bias: u64,
    y: u64,
    width: i64,
    wide: i64,
    gelu: i64,
}

// SAFETY: fp8.cu, `struct ScaledSums`.
unsafe impl Params for ScaledSums {}

/// Tensor cores read 8-bit rows in pieces of this many bytes, of which cublasLt wants rows and outputs to be made.
const PIECE: usize = 16;

pub fn quantise_rows(gpu: &impl Gpu, x: &Tensor) -> Result<Option<Fp8Rows>> {
    let dtype = x.dtype();
    let Some(wide) = wide(dtype) else { return Ok(None) };
    if x.rank() < 2 || x.elem_count() == 0 {
        return Ok(None);
    }
    let view = View::of(gpu, x)?;
    if view.count() > MOST_BLOCKS {
        return Ok(None);
    }
    let codes = gpu.uninitialised(x.shape().clone(), DType::U8, x.device())?;
    let scales = gpu.uninitialised(x.dims()[..x.rank() - 1].into(), DType::F32, x.device())?;
    let params = QuantiseRows {
        x: view.rows,
        codes: gpu.address(&codes)?,
        scales: gpu.address(&scales)?,
        inner: view.inner as i64,
        width: view.width as i64,
        wide: 0,
    };
    let whole = view.width % wide == 0 && view.rows.aligned(dtype) && params.codes.is_multiple_of(16);
    let launch = Launch {
        file: "fp8",
        kernel: "quantise_rows",
        dtype,
        blocks: [view.count(), 1, 1],
        threads: 128,
        shared_memory: 0,
        reads: &[&view.tensor],
        packed: None,
        writes: &[&codes, &scales],
    };
    gpu.launch(&launch, &QuantiseRows { wide: whole.into(), ..params })?;
    Ok(Some(Fp8Rows { codes, scales }))
}

/// None if shapes do not fit, or if the library does not compute such a product.
pub fn linear(
    gpu: &impl Gpu,
    x: &Tensor,
    weight: &Fp8Rows,
    bias: Option<&Tensor>,
    gelu: bool,
) -> Result<Option<Tensor>> {
    let (outputs, depth) = weight.codes.dims2()?;
    let dtype = x.dtype();
    let fits = x.rank() > 1
        && x.dim(D::Minus1)? == depth
        && depth % PIECE == 0
        && outputs % PIECE == 0
        && weight.scales.dims() == [outputs]
        && bias.is_none_or(|bias| bias.dtype() == dtype && bias.dims() == [outputs]);
    if !fits || outputs == 0 {
        return Ok(None);
    }
    let Some(rows) = quantise_rows(gpu, x)? else { return Ok(None) };
    let (codes, scales) = (weight.codes.contiguous()?, weight.scales.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = outputs;
    let product = Product {
        dtype: DType::U8,
        result: dtype,
        rows: x.elem_count() / depth,
        outputs,
        depth,
        x_stride: depth,
        weight_stride: depth,
        gelu,
    };
    let y = gpu.uninitialised(shape.clone().into(), dtype, x.device())?;
    let operands = Operands {
        x: &rows.codes,
        weight: &codes,
        bias: bias.as_ref(),
        scales: Some(Scales { x: &rows.scales, weight: &scales }),
        y: &y,
    };
    // As for `linear`: of the library's GELU it is not known how exact it is in f32.
    if dtype != DType::F32 && gpu.multiply(product, operands)? {
        return Ok(Some(y));
    }
    // A library that does not take the scales leaves sums, which a kernel of ours scales.
    let sums = gpu.uninitialised(shape.into(), DType::F32, x.device())?;
    let bare = Product { result: DType::F32, gelu: false, ..product };
    if !gpu.multiply(bare, Operands { bias: None, scales: None, y: &sums, ..operands })? {
        return Ok(None);
    }
    scale(gpu, &sums, &rows.scales, &scales, bias.as_ref(), gelu, &y)?;
    Ok(Some(y))
}

/// Writes the sums times both scales, with the bias and the GELU, to `y`.
fn scale(
    gpu: &impl Gpu,
    sums: &Tensor,
    row_scales: &Tensor,
    column_scales: &Tensor,
    bias: Option<&Tensor>,
    gelu: bool,
    y: &Tensor,
) -> Result<()> {
    let params = ScaledSums {
        sums: gpu.address(sums)?,
        row_scales: gpu.address(row_scales)?,
        column_scales: gpu.address(column_scales)?,
        bias: bias.map(|bias| gpu.address(bias)).transpose()?.unwrap_or(0),
        y: gpu.address(y)?,
        width: y.dim(D::Minus1)? as i64,
        wide: 0,
        gelu: gelu.into(),
    };
    // Rows are whole pieces.
    let whole = (params.sums | params.column_scales | params.bias | params.y).is_multiple_of(16);
    let mut reads = vec![sums, row_scales, column_scales];
    reads.extend(bias);
    let launch = Launch {
        file: "fp8",
        kernel: "scaled_sums",
        dtype: y.dtype(),
        blocks: [row_scales.elem_count(), 1, 1],
        threads: 128,
        shared_memory: 0,
        reads: &reads,
        packed: None,
        writes: &[y],
    };
    gpu.launch(&launch, &ScaledSums { wide: whole.into(), ..params })
}
