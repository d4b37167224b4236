//! Head split, query and key norm, rotary embedding and joining of streams: kernels/heads.cu.

use candle_core::{DType, Result, Tensor};

use super::{
    Gpu, Launch, MOST_BLOCKS, Params,
    rows::{Rows, View},
    wide,
};
use crate::{Rotation, Stream, portable::EPSILON};

#[repr(C)]
struct Heads {
    x: Rows,
    query_scale: u64,
    key_scale: u64,
    cos: u64,
    sin: u64,
    y: u64,
    tokens: i64,
    first: i64,
    joined: i64,
    heads: i64,
    head_dim: i64,
    wide: i64,
    epsilon: f64,
}

// SAFETY: heads.cu, `struct Heads`.
unsafe impl Params for Heads {}

pub fn heads(gpu: &impl Gpu, streams: &[Stream<'_>], rotation: &Rotation) -> Result<Option<Tensor>> {
    let Some(one) = streams.first() else { return Ok(None) };
    let (batch, _, width) = one.qkv.dims3()?;
    let (dtype, device) = (one.qkv.dtype(), one.qkv.device());
    let (Some(wide), head_dim) = (wide(dtype), one.query_scale.elem_count()) else { return Ok(None) };
    let tokens: usize = streams.iter().map(|stream| stream.qkv.dim(1)).sum::<Result<usize>>()?;
    let fits = |stream: &Stream<'_>| {
        let (qkv, scales) = (stream.qkv, [stream.query_scale, stream.key_scale]);
        qkv.dtype() == dtype
            && qkv.dims() == [batch, qkv.dims()[1], width]
            && qkv.elem_count() > 0
            && scales.iter().all(|scale| scale.dtype() == dtype && scale.elem_count() == head_dim)
    };
    let angles = [&rotation.cos, &rotation.sin];
    let turns =
        |x: &&Tensor| x.dtype() == DType::F32 && x.rank() == 2 && x.dims()[0] >= tokens && 2 * x.dims()[1] == head_dim;
    let whole_heads = head_dim > 0 && width % (3 * head_dim) == 0;
    if !whole_heads || !streams.iter().all(fits) || !angles.iter().all(turns) || batch * tokens > MOST_BLOCKS {
        return Ok(None);
    }
    let (cos, sin) = (rotation.cos.contiguous()?, rotation.sin.contiguous()?);
    let heads = width / (3 * head_dim);
    let y = gpu.uninitialised((batch, tokens, 3, heads, head_dim).into(), dtype, device)?;
    // A head by a power of two of threads, up to a warp.
    let even = head_dim % wide == 0 && (head_dim / wide).is_power_of_two() && head_dim / wide <= 32;
    let mut first = 0;
    for stream in streams {
        let (query_scale, key_scale) = (stream.query_scale.contiguous()?, stream.key_scale.contiguous()?);
        let view = View::of(gpu, stream.qkv)?;
        let params = Heads {
            x: view.rows,
            query_scale: gpu.address(&query_scale)?,
            key_scale: gpu.address(&key_scale)?,
            cos: gpu.address(&cos)?,
            sin: gpu.address(&sin)?,
            y: gpu.address(&y)?,
            tokens: view.inner as i64,
            first: first as i64,
            joined: tokens as i64,
            heads: heads as i64,
            head_dim: head_dim as i64,
            wide: 0,
            epsilon: EPSILON,
        };
        let addresses = params.query_scale | params.key_scale | params.cos | params.sin | params.y;
        let whole = even && view.rows.aligned(dtype) && addresses.is_multiple_of(16);
        let launch = Launch {
            file: "heads",
            kernel: "heads",
            dtype,
            blocks: [view.count(), 1, 1],
            threads: 128,
            shared_memory: 0,
            reads: &[&view.tensor, &query_scale, &key_scale, &cos, &sin],
            packed: None,
            writes: &[&y],
        };
        first += view.inner;
        gpu.launch(&launch, &Heads { wide: whole.into(), ..params })?;
    }
    Ok(Some(y))
}
