//! Layer norm with a scale and a shift: kernels/modulated_norm.cu.

use candle_core::{Result, Tensor};

use super::{
    Gpu, Launch, MOST_BLOCKS, Params,
    rows::{Rows, View},
    wide,
};
use crate::portable::EPSILON;

#[repr(C)]
struct ModulatedNorm {
    x: Rows,
    shift: u64,
    scale: u64,
    y: u64,
    inner: i64,
    width: i64,
    wide: i64,
    epsilon: f64,
}

// SAFETY: modulated_norm.cu, `struct ModulatedNorm`.
unsafe impl Params for ModulatedNorm {}

pub fn modulated_norm(gpu: &impl Gpu, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Option<Tensor>> {
    let dtype = x.dtype();
    let Some(wide) = wide(dtype) else { return Ok(None) };
    let width = x.dims().last().copied().unwrap_or(0);
    let fits = |vector: &Tensor| vector.elem_count() == width && vector.dims().last() == Some(&width);
    if !fits(shift) || !fits(scale) || [shift.dtype(), scale.dtype()] != [dtype; 2] || x.elem_count() == 0 {
        return Ok(None);
    }
    let view = View::of(gpu, x)?;
    if view.count() > MOST_BLOCKS {
        return Ok(None);
    }
    let (shift, scale) = (shift.contiguous()?, scale.contiguous()?);
    let y = gpu.uninitialised(x.shape().clone(), dtype, x.device())?;
    let params = ModulatedNorm {
        x: view.rows,
        shift: gpu.address(&shift)?,
        scale: gpu.address(&scale)?,
        y: gpu.address(&y)?,
        inner: view.inner as i64,
        width: width as i64,
        wide: 0,
        epsilon: EPSILON,
    };
    let addresses = params.shift | params.scale | params.y;
    let whole = width % wide == 0 && view.rows.aligned(dtype) && addresses.is_multiple_of(16);
    let launch = Launch {
        file: "modulated_norm",
        kernel: "modulated_norm",
        dtype,
        blocks: [view.count(), 1, 1],
        threads: 128,
        shared_memory: 0,
        reads: &[&view.tensor, &shift, &scale],
        packed: None,
        writes: &[&y],
    };
    gpu.launch(&launch, &ModulatedNorm { wide: whole.into(), ..params })?;
    Ok(Some(y))
}
