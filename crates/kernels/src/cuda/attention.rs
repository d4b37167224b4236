//! Attention without its scores in memory: kernels/attention.cu.

use candle_core::{DType, Result, Tensor};

use super::{
    Gpu, Launch, Params, pointwise,
    rows::{Rows, View},
    tasks::{self, Standing, Task, Verdict, judge_attention},
};
use crate::portable;

/// `struct Attention` of attention.cu: strides in elements, of batch, token and head.
#[repr(C)]
struct Attention {
    q: u64,
    k: u64,
    v: u64,
    bias: u64,
    y: u64,
    q_strides: [i64; 3],
    k_strides: [i64; 3],
    v_strides: [i64; 3],
    bias_strides: [i64; 2],
    y_strides: [i64; 3],
    bias_pairs: i64,
    queries: i64,
    keys: i64,
    scale: f64,
}

// SAFETY: attention.cu, `struct Attention`.
unsafe impl Params for Attention {}

/// Queries of a block.
const QUERIES: usize = 128;
/// The most blocks along a launch's second and third axis.
const MOST: usize = 65535;
/// The size of heads for which there is a kernel with a bias: that of CLIP-L and T5-XXL.
const BIASED_HEAD: usize = 64;
/// What the driver keeps for itself of a block's shared memory.
const RESERVED: usize = 1024;

/// The size of heads, the keys of a tile and the block's bytes of shared memory for which there is a kernel.
///
/// As many keys as let two blocks run on a multiprocessor, so that one computes while the other waits: 64 with an A100's
/// or H100's shared memory, 32 with an RTX 30's or 40's.
fn tile(gpu: &impl Gpu, head_dim: usize) -> Option<(usize, usize)> {
    let tiles: &[usize] = match head_dim {
        32 | 64 => &[64],
        128 => &[64, 32],
        _ => return None,
    };
    let bytes = |keys: usize| (QUERIES + 2 * keys) * head_dim * 2;
    let two_fit = |&&keys: &&usize| 2 * (bytes(keys) + RESERVED) <= gpu.shared_memory();
    let keys = tiles.iter().find(two_fit).or(tiles.last())?;
    Some((*keys, bytes(*keys)))
}

/// `q`, `k` and `v` `[batch, tokens, heads, head_dim]`, `bias` `[1, heads or 1, queries, keys]`; with `inner` its GELU beside
/// the result.
pub fn attention(
    gpu: &impl Gpu,
    [q, k, v]: [&Tensor; 3],
    bias: Option<&Tensor>,
    scale: f64,
    inner: Option<&Tensor>,
) -> Result<Option<Tensor>> {
    let (batch, queries, heads, head_dim) = q.dims4()?;
    let (keys, dtype) = (k.dim(1)?, q.dtype());
    let one_dtype = [k, v].iter().chain(&bias).chain(&inner).all(|x| x.dtype() == dtype);
    let fits = [k, v].iter().all(|x| x.dims() == [batch, keys, heads, head_dim])
        && bias.is_none_or(|bias| head_dim == BIASED_HEAD && is_bias(bias, heads, queries, keys))
        && inner.is_none_or(|inner| inner.rank() == 3 && inner.dims()[..2] == [batch, queries]);
    // The kernel counts a block's tokens in 32 bits, and takes the largest product for the largest score.
    let counts = queries.max(keys) < 1 << 31 && batch <= MOST && heads <= MOST && q.elem_count() > 0 && keys > 0;
    if !matches!(dtype, DType::BF16 | DType::F16) || !one_dtype || !fits || !counts || scale <= 0.0 {
        return Ok(None);
    }
    let hidden = heads * head_dim;
    let beside = inner.map_or(Ok(0), |inner| inner.dim(2))?;
    let width = hidden + beside;
    let operands = [operand(gpu, q)?, operand(gpu, k)?, operand(gpu, v)?];
    let computed = if bias.is_none() { by_library(gpu, &operands, width, scale)? } else { None };
    let computed = computed.map_or_else(|| own(gpu, &operands, bias, width, scale), |y| Ok(Some(y)))?;
    let Some(y) = computed else { return Ok(None) };
    if let Some(inner) = inner.filter(|_| beside > 0) {
        let rows =
            Rows { address: gpu.address(&y)?, outer_stride: (queries * width) as i64, inner_stride: width as i64 };
        pointwise::gelu_into(gpu, &View::of(gpu, inner)?, rows.columns_from(hidden, dtype), &y)?;
    }
    Ok(Some(y))
}

/// The attention alone, in rows of `width`; none if there is no kernel for it.
fn own(
    gpu: &impl Gpu,
    [q, k, v]: &[Operand; 3],
    bias: Option<&Tensor>,
    width: usize,
    scale: f64,
) -> Result<Option<Tensor>> {
    let (batch, queries, heads, head_dim) = q.tensor.dims4()?;
    let (keys, dtype) = (k.tensor.dim(1)?, q.tensor.dtype());
    let Some((tile, shared_memory)) = tile(gpu, head_dim) else { return Ok(None) };
    if !width.is_multiple_of(2) {
        return Ok(None); // two neighbours are written at once
    }
    let bias = bias.map(|bias| Bias::of(gpu, bias)).transpose()?;
    let y = gpu.uninitialised((batch, queries, width).into(), dtype, q.tensor.device())?;
    let params = Attention {
        q: q.address,
        k: k.address,
        v: v.address,
        bias: bias.as_ref().map_or(0, |bias| bias.address),
        y: gpu.address(&y)?,
        q_strides: q.strides,
        k_strides: k.strides,
        v_strides: v.strides,
        bias_strides: bias.as_ref().map_or([0; 2], |bias| bias.strides),
        y_strides: [(queries * width) as i64, width as i64, head_dim as i64],
        bias_pairs: bias.as_ref().is_some_and(|bias| bias.pairs).into(),
        queries: queries as i64,
        keys: keys as i64,
        scale,
    };
    let mut reads = vec![&q.tensor, &k.tensor, &v.tensor];
    reads.extend(bias.as_ref().map(|bias| &bias.tensor));
    let launch = Launch {
        file: "attention",
        kernel: &format!("attention_{head_dim}_{tile}{}", if bias.is_some() { "_bias" } else { "" }),
        dtype,
        blocks: [queries.div_ceil(QUERIES), heads, batch],
        threads: 128,
        shared_memory,
        reads: &reads,
        packed: None,
        writes: &[&y],
    };
    gpu.launch(&launch, &params)?;
    Ok(Some(y))
}

/// [`own`] without a bias by a library; none if it has no plan for it, or if its result is not ours.
fn by_library(gpu: &impl Gpu, operands: &[Operand; 3], width: usize, scale: f64) -> Result<Option<Tensor>> {
    let [q, k, v] = operands;
    let (batch, queries, heads, head_dim) = q.tensor.dims4()?;
    let (keys, dtype) = (k.tensor.dim(1)?, q.tensor.dtype());
    let rows = |x: &Operand| {
        // Of a single one the distance does not matter, but is none for a kernel.
        let (tokens, [batch, token, head]) = (x.tensor.dims()[1] as i64, x.strides);
        let head = if head == 0 { head_dim as i64 } else { head };
        let token = if token == 0 { heads as i64 * head } else { token };
        [if batch == 0 { tokens * token } else { batch }, token, head]
    };
    let of_result = [(queries * width) as i64, width as i64, head_dim as i64];
    let task = tasks::Attention {
        dtype,
        batch,
        heads,
        queries,
        keys,
        head_dim,
        strides: [rows(q), rows(k), rows(v), of_result],
        scale: (scale as f32).to_bits(),
    };
    let repeats = operands.iter().any(|x| x.repeats());
    // Rows are written in whole loads.
    if repeats || head_dim % 8 != 0 || !width.is_multiple_of(8) {
        return Ok(None);
    }
    let whole = Task::Attention(task);
    let Some(standing) = gpu.planned(&whole) else { return Ok(None) };
    let y = gpu.uninitialised((batch, queries, width).into(), dtype, q.tensor.device())?;
    if !gpu.run(&whole, &[&q.tensor, &k.tensor, &v.tensor], &y)? {
        return Ok(None);
    }
    if standing == Standing::Unproven {
        // The first queries, some in the middle, and the last, which fill no tile.
        let middle = queries / 2;
        let last = queries.min(16);
        for (first, count) in [(0, queries.min(64)), (middle, (queries - middle).min(64)), (queries - last, last)] {
            let some = operand(gpu, &q.tensor.narrow(1, first, count)?)?;
            let some = [some, operand(gpu, &k.tensor)?, operand(gpu, &v.tensor)?];
            let ours = own(gpu, &some, None, heads * head_dim, scale)?
                .map_or_else(|| portable::attention(&some[0].tensor, &k.tensor, &v.tensor, None, scale), Ok)?;
            let found = y.narrow(1, first, count)?.narrow(2, 0, heads * head_dim)?;
            let verdict = judge_attention(&task, &found, &ours)?;
            gpu.judge(&whole, verdict);
            if let Verdict::Differs(_) = verdict {
                return Ok(None);
            }
        }
    }
    Ok(Some(y))
}

/// A tensor of heads as the kernel reads it.
struct Operand {
    tensor: Tensor,
    address: u64,
    /// Of batch, token and head.
    strides: [i64; 3],
}

impl Operand {
    /// Whether several places hold the same element, as in a tensor that was broadcast.
    fn repeats(&self) -> bool {
        (0..3).any(|axis| self.strides[axis] == 0 && self.tensor.dims()[axis] > 1)
    }
}

/// Copies only what is not made of whole chunks of 16 bytes at multiples of 16 bytes.
fn operand(gpu: &impl Gpu, x: &Tensor) -> Result<Operand> {
    let of = |tensor: Tensor| -> Result<Operand> {
        let strides = [0, 1, 2].map(|axis| if tensor.dims()[axis] > 1 { tensor.stride()[axis] as i64 } else { 0 });
        Ok(Operand { address: gpu.address(&tensor)?, strides, tensor })
    };
    let whole = |x: &Operand| {
        x.tensor.stride()[3] == 1 && x.address.is_multiple_of(16) && x.strides.iter().all(|stride| stride % 8 == 0)
    };
    let here = of(x.clone())?;
    // Not `contiguous`, which would return the same memory where only its beginning is at fault.
    if whole(&here) { Ok(here) } else { of(x.force_contiguous()?) }
}

fn is_bias(bias: &Tensor, heads: usize, queries: usize, keys: usize) -> bool {
    [1, heads].iter().any(|&heads| bias.dims() == [1, heads, queries, keys])
}

/// What is added to the scores, as the kernel reads it.
struct Bias {
    tensor: Tensor,
    address: u64,
    /// Of head and query.
    strides: [i64; 2],
    /// Whether two neighbours can be read at once.
    pairs: bool,
}

impl Bias {
    /// Copies `bias` `[1, heads or 1, queries, keys]` only if a row's elements are no neighbours.
    fn of(gpu: &impl Gpu, bias: &Tensor) -> Result<Self> {
        let tensor = if bias.stride()[3] == 1 { bias.clone() } else { bias.contiguous()? };
        let strides = [1, 2].map(|axis| if tensor.dims()[axis] > 1 { tensor.stride()[axis] as i64 } else { 0 });
        let address = gpu.address(&tensor)?;
        let pairs = tensor.dims()[3] % 2 == 0 && address.is_multiple_of(4) && strides.iter().all(|s| s % 2 == 0);
        Ok(Self { tensor, address, strides, pairs })
    }
}
