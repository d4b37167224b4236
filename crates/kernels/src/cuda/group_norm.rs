//! Group normalisation: kernels/group_norm.cu.

use candle_core::{DType, Result, Tensor};

use super::{Gpu, Launch, MOST_BLOCKS, Params, wide};

#[repr(C)]
struct GroupNorm {
    x: u64,
    weight: u64,
    bias: u64,
    means: u64,
    squares: u64,
    y: u64,
    group: i64,
    chunk: i64,
    chunks: i64,
    plane: i64,
    channels: i64,
    wide: i64,
    silu: i64,
    epsilon: f64,
}

// SAFETY: group_norm.cu, `struct GroupNorm`.
unsafe impl Params for GroupNorm {}

/// Elements of a chunk, at least: enough that a block's sums cost little beside its reads. A multiple of every load.
const CHUNK: usize = 8192;
/// Chunks of a group, at most: a thread of a block for each when they are put together.
const CHUNKS: usize = 256;

pub fn group_norm(
    gpu: &impl Gpu,
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Result<Option<Tensor>> {
    let (batch, channels, height, width) = x.dims4()?;
    let dtype = x.dtype();
    let Some(wide) = wide(dtype) else { return Ok(None) };
    let fits = |vector: &Tensor| vector.dtype() == dtype && vector.dims() == [channels];
    if !fits(weight) || !fits(bias) || groups == 0 || channels % groups != 0 || x.elem_count() == 0 {
        return Ok(None);
    }
    let plane = height * width;
    let group = channels / groups * plane;
    let chunk = CHUNK * group.div_ceil(CHUNK * CHUNKS);
    let chunks = group.div_ceil(chunk);
    if group >= 1 << 31 || batch * groups * chunks > MOST_BLOCKS {
        return Ok(None);
    }
    let (x, weight, bias) = (x.contiguous()?, weight.contiguous()?, bias.contiguous()?);
    let partial = || gpu.uninitialised((batch * groups, chunks).into(), DType::F32, x.device());
    let (means, squares) = (partial()?, partial()?);
    let y = gpu.uninitialised(x.shape().clone(), dtype, x.device())?;
    let params = GroupNorm {
        x: gpu.address(&x)?,
        weight: gpu.address(&weight)?,
        bias: gpu.address(&bias)?,
        means: gpu.address(&means)?,
        squares: gpu.address(&squares)?,
        y: gpu.address(&y)?,
        group: group as i64,
        chunk: chunk as i64,
        chunks: chunks as i64,
        plane: plane as i64,
        channels: channels as i64,
        wide: 0,
        silu: silu.into(),
        epsilon,
    };
    let whole = plane % wide == 0 && (params.x | params.y).is_multiple_of(16);
    let params = GroupNorm { wide: whole.into(), ..params };
    let launch = |kernel, reads: &[&Tensor], writes: &[&Tensor]| {
        let blocks = [batch * groups * chunks, 1, 1];
        let launch =
            Launch { file: "group_norm", kernel, dtype, blocks, threads: 256, shared_memory: 0, reads, writes };
        gpu.launch(&launch, &params)
    };
    launch("group_norm_measure", &[&x], &[&means, &squares])?;
    launch("group_norm_apply", &[&x, &weight, &bias, &means, &squares], &[&y])?;
    Ok(Some(y))
}
