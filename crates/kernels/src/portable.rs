//! The definition of each operation in candle's own operations; [`crate::Kernels`] says what they compute.

use candle_core::{D, DType, Device, Module, Result, Tensor, bail};

use crate::{Activation, Fp8Rows, Moments, Packed, Rotation, Stream, Window};

/// Of the norms inside the blocks.
pub(crate) const EPSILON: f64 = 1e-6;

/// Bytes that the scores of one attention call may take; longer sequences are done in several runs of queries.
const SCORE_BYTES: usize = 512 << 20;

/// Elements of a packed matrix that are dequantised at a time: 128 MB in f32, which is what candle makes of blocks first.
const DEQUANTISED: usize = 1 << 25;

pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    let y = candle_nn::Linear::new(weight.clone(), bias.cloned()).forward(x)?;
    match activation {
        Activation::None => Ok(y),
        Activation::Gelu => y.gelu(),
    }
}

pub fn linear_packed(x: &Tensor, weight: &Packed, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    in_runs(x, weight, bias, DEQUANTISED, |x, weight, bias| linear(x, &weight.dequantise(x.dtype())?, bias, activation))
}

/// A linear layer with a packed matrix as one layer for each run of its rows. A run has at most so many `values`, or is one row.
pub fn in_runs(
    x: &Tensor,
    weight: &Packed,
    bias: Option<&Tensor>,
    values: usize,
    linear: impl Fn(&Tensor, &Packed, Option<&Tensor>) -> Result<Tensor>,
) -> Result<Tensor> {
    let rows = weight.rows();
    let run = (values / weight.columns().max(1)).clamp(1, rows.max(1));
    let mut outputs = Vec::with_capacity(rows.div_ceil(run));
    for first in (0..rows).step_by(run) {
        let run = run.min(rows - first);
        let weight = weight.narrow(first..first + run)?;
        let bias = bias.map(|bias| bias.narrow(0, first, run)).transpose()?;
        outputs.push(linear(x, &weight, bias.as_ref())?);
    }
    if outputs.len() == 1 { Ok(outputs.remove(0)) } else { Tensor::cat(&outputs, D::Minus1) }
}

pub fn linear_fp8(x: &Tensor, weight: &Fp8Rows, bias: Option<&Tensor>, activation: Activation) -> Result<Tensor> {
    // In f64 where the tests take the truth.
    let dtype = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let rows = Fp8Rows::quantise(x)?;
    let sums = linear(&rows.unscaled(dtype)?, &weight.unscaled(dtype)?, None, Activation::None)?;
    let scaled = sums
        .broadcast_mul(&rows.scales.unsqueeze(D::Minus1)?.to_dtype(dtype)?)?
        .broadcast_mul(&weight.scales.to_dtype(dtype)?)?;
    let y = match bias {
        Some(bias) => scaled.broadcast_add(&bias.to_dtype(dtype)?)?,
        None => scaled,
    };
    match activation {
        Activation::None => y,
        Activation::Gelu => y.gelu()?,
    }
    .to_dtype(x.dtype())
}

pub fn modulated_norm(x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
    // candle has a fused norm with a learned scale and shift only: it is given ones and zeros.
    let (hidden, dtype, device) = (x.dim(D::Minus1)?, x.dtype(), x.device());
    let (ones, zeros) = (Tensor::ones(hidden, dtype, device)?, Tensor::zeros(hidden, dtype, device)?);
    // Only the slow form takes f64, in which the tests take the truth.
    let norm = if dtype == DType::F64 { candle_nn::ops::layer_norm_slow } else { candle_nn::ops::layer_norm };
    norm(&x.contiguous()?, &ones, &zeros, EPSILON as f32)?.broadcast_mul(&(scale + 1.0)?)?.broadcast_add(shift)
}

pub fn gated_residual(x: &Tensor, y: &Tensor, gate: &Tensor) -> Result<Tensor> {
    x + y.broadcast_mul(gate)?
}

pub fn heads(streams: &[Stream<'_>], rotation: &Rotation) -> Result<Tensor> {
    let mut first = 0;
    let mut joined = Vec::with_capacity(streams.len());
    for stream in streams {
        let (b, tokens, width) = stream.qkv.dims3()?;
        let head_dim = stream.query_scale.elem_count();
        let heads = width / (3 * head_dim);
        let qkv = stream.qkv.contiguous()?.reshape((b, tokens, 3, heads, head_dim))?;
        let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2)?.contiguous(); // [b, tokens, heads, head_dim]
        let turned = |i: usize, scale: &Tensor| -> Result<Tensor> {
            // Normalised before the transposition: candle's fused norm wants contiguous rows.
            let norm = if qkv.dtype() == DType::F64 { candle_nn::ops::rms_norm_slow } else { candle_nn::ops::rms_norm };
            let x = norm(&part(i)?, scale, EPSILON as f32)?;
            let x = x.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous()?;
            let (cos, sin) = (rotation.cos.narrow(0, first, tokens)?, rotation.sin.narrow(0, first, tokens)?);
            let x = candle_nn::rotary_emb::rope_i(&x, &cos, &sin)?;
            x.transpose(1, 2)?.to_dtype(qkv.dtype())
        };
        let (q, k) = (turned(0, stream.query_scale)?, turned(1, stream.key_scale)?);
        joined.push(Tensor::stack(&[q, k, part(2)?], 2)?);
        first += tokens;
    }
    if joined.len() == 1 { Ok(joined.remove(0)) } else { Tensor::cat(&joined, 1) }
}

/// Queries are taken in runs, so that the scores never take more than [`SCORE_BYTES`], and never reach the 2^31
/// elements at which candle's CUDA reductions overflow their index.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
    let dtype = q.dtype();
    if q.device().is_cpu() && matches!(dtype, DType::BF16 | DType::F16) {
        // On the CPU candle adds up a softmax's terms in the tensor's own dtype: in bf16 a sum of more than 256 is lost.
        let [q, k, v] = [q, k, v].map(|x| x.to_dtype(DType::F32));
        let bias = bias.map(|bias| bias.to_dtype(DType::F32)).transpose()?;
        return attention(&q?, &k?, &v?, bias.as_ref(), scale)?.to_dtype(dtype);
    }
    let (b, queries, heads, head_dim) = q.dims4()?;
    let bytes_per_query = b * heads * k.dim(1)? * dtype.size_in_bytes();
    let run = (SCORE_BYTES / bytes_per_query.max(1)).clamp(1, queries.max(1));
    let q = (q.transpose(1, 2)? * scale)?; // [b, heads, queries, head_dim]
    let k_t = k.permute((0, 2, 3, 1))?.contiguous()?; // [b, heads, head_dim, keys]
    let v = v.transpose(1, 2)?.contiguous()?;
    let mut outputs = Vec::with_capacity(queries.div_ceil(run));
    for start in (0..queries).step_by(run) {
        let run = run.min(queries - start);
        let mut scores = q.narrow(2, start, run)?.contiguous()?.matmul(&k_t)?;
        if let Some(bias) = bias {
            scores = scores.broadcast_add(&bias.narrow(2, start, run)?)?;
        }
        outputs.push(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?);
    }
    let output = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 2)? };
    output.transpose(1, 2)?.reshape((b, queries, heads * head_dim))
}

pub fn attention_beside_gelu(q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, inner: &Tensor) -> Result<Tensor> {
    Tensor::cat(&[attention(q, k, v, None, scale)?, inner.gelu()?], D::Minus1)
}

pub fn gated_gelu(gate: &Tensor, value: &Tensor) -> Result<Tensor> {
    gate.gelu()? * value
}

pub fn group_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    groups: usize,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    let channels = weight.elem_count();
    let y = candle_nn::GroupNorm::new(weight.clone(), bias.clone(), channels, groups, epsilon)?.forward(x)?;
    if silu { y.silu() } else { Ok(y) }
}

/// `[batch, groups, values]`, in f32 where the values are of a narrower dtype.
fn grouped(x: &Tensor, groups: usize) -> Result<Tensor> {
    let (batch, channels, _, _) = x.dims4()?;
    if groups == 0 || channels % groups != 0 {
        bail!("{groups} groups over {channels} channels")
    }
    let wide = if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    x.to_dtype(wide)?.reshape((batch, groups, ()))
}

pub fn group_moments(x: &Tensor, groups: usize) -> Result<Moments> {
    let x = grouped(x, groups)?;
    let mean = x.mean_keepdim(2)?;
    let variance = x.broadcast_sub(&mean)?.sqr()?.mean(2)?;
    let values = |x: Tensor| x.flatten_all()?.to_dtype(DType::F64)?.to_vec1::<f64>();
    let groups = values(mean)?.into_iter().zip(values(variance)?).collect();
    Ok(Moments { count: x.dim(2)? as f64, groups })
}

pub fn group_norm_by(
    x: &Tensor,
    moments: &Moments,
    weight: &Tensor,
    bias: &Tensor,
    epsilon: f64,
    silu: bool,
) -> Result<Tensor> {
    let batch = x.dim(0)?;
    let wide = grouped(x, moments.groups.len() / batch.max(1))?;
    let (means, inverses): (Vec<f64>, Vec<f64>) = moments.normalisers(epsilon).unzip();
    let per_group = |values| Tensor::from_vec(values, (batch, (), 1), &Device::Cpu);
    let per_group = |values| per_group(values)?.to_dtype(wide.dtype())?.to_device(x.device());
    let normed = wide.broadcast_sub(&per_group(means)?)?.broadcast_mul(&per_group(inverses)?)?;
    let per_channel = |x: &Tensor| x.reshape((1, (), 1, 1))?.to_dtype(wide.dtype());
    let normed = normed.reshape(x.shape())?;
    let y = normed.broadcast_mul(&per_channel(weight)?)?.broadcast_add(&per_channel(bias)?)?;
    (if silu { y.silu()? } else { y }).to_dtype(x.dtype())
}

pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, residual: Option<&Tensor>, window: Window) -> Result<Tensor> {
    let y = match window {
        Window::Point => x.conv2d(weight, 0, 1, 1, 1)?,
        Window::Same => x.conv2d(weight, 1, 1, 1, 1)?,
        Window::Halving => x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?.conv2d(weight, 0, 2, 1, 1)?,
        Window::Doubling => {
            let (_, _, h, w) = x.dims4()?;
            x.upsample_nearest2d(2 * h, 2 * w)?.conv2d(weight, 1, 1, 1, 1)?
        }
    };
    let y = y.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
    match residual {
        Some(residual) => y + residual,
        None => Ok(y),
    }
}
