//! Operations of one result per element: kernels/pointwise.cu.

use candle_core::{DType, Result, Tensor};

use super::{
    Gpu, Launch, MOST_BLOCKS, Params,
    rows::{Rows, View},
    wide,
};

#[repr(C)]
struct Pointwise {
    x: Rows,
    other: Rows,
    gate: u64,
    y: Rows,
    inner: i64,
    width: i64,
    wide: i64,
}

// SAFETY: pointwise.cu, `struct Pointwise`.
unsafe impl Params for Pointwise {}

pub fn gated_residual(gpu: &impl Gpu, x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Option<Tensor>> {
    let width = x.dims().last().copied().unwrap_or(0);
    if gate.elem_count() != width || gate.dims().last() != Some(&width) || gate.dtype() != x.dtype() {
        return Ok(None);
    }
    of_two(gpu, "gated_residual", x, y, Some(&gate.contiguous()?))
}

pub fn gated_gelu(gpu: &impl Gpu, gate: &Tensor, value: &Tensor) -> Result<Option<Tensor>> {
    of_two(gpu, "gated_gelu", gate, value, None)
}

/// An operation on two tensors of one shape, and a vector as long as their rows.
fn of_two(gpu: &impl Gpu, kernel: &str, x: &Tensor, other: &Tensor, gate: Option<&Tensor>) -> Result<Option<Tensor>> {
    let dtype = x.dtype();
    if wide(dtype).is_none() || other.dtype() != dtype || x.dims() != other.dims() || x.elem_count() == 0 {
        return Ok(None);
    }
    let (x, other) = (View::of(gpu, x)?, View::of(gpu, other)?);
    if x.count() > MOST_BLOCKS {
        return Ok(None);
    }
    let result = gpu.uninitialised(x.tensor.shape().clone(), dtype, x.tensor.device())?;
    let y = View::of(gpu, &result)?;
    let gate_address = gate.map(|gate| gpu.address(gate)).transpose()?.unwrap_or(0);
    let mut reads = vec![&x.tensor, &other.tensor];
    reads.extend(gate);
    let operands = Operands { x: &x, other: other.rows, gate: gate_address, y: y.rows };
    run(gpu, kernel, dtype, operands, &reads, &result)?;
    Ok(Some(result))
}

/// GELU of `x`, which is not empty.
pub fn gelu(gpu: &impl Gpu, x: &Tensor) -> Result<Tensor> {
    let result = gpu.uninitialised(x.shape().clone(), x.dtype(), x.device())?;
    gelu_into(gpu, &View::of(gpu, x)?, View::of(gpu, &result)?.rows, &result)?;
    Ok(result)
}

/// GELU of each row of `x`, in as many rows at `y` in `result`.
pub fn gelu_into(gpu: &impl Gpu, x: &View, y: Rows, result: &Tensor) -> Result<()> {
    let operands = Operands { x, other: Rows::NONE, gate: 0, y };
    run(gpu, "gelu_rows", result.dtype(), operands, &[&x.tensor], result)
}

struct Operands<'a> {
    x: &'a View,
    other: Rows,
    gate: u64,
    y: Rows,
}

fn run(gpu: &impl Gpu, kernel: &str, dtype: DType, of: Operands<'_>, reads: &[&Tensor], result: &Tensor) -> Result<()> {
    let Operands { x, other, gate, y } = of;
    let rows_aligned = [x.rows, other, y].iter().all(|rows| rows.aligned(dtype));
    let whole = wide(dtype).is_some_and(|wide| x.width % wide == 0) && rows_aligned && gate.is_multiple_of(16);
    let params =
        Pointwise { x: x.rows, other, gate, y, inner: x.inner as i64, width: x.width as i64, wide: whole.into() };
    let launch = Launch {
        file: "pointwise",
        kernel,
        dtype,
        blocks: [x.count(), 1, 1],
        threads: 128,
        shared_memory: 0,
        reads,
        packed: None,
        writes: &[result],
    };
    gpu.launch(&launch, &params)
}
