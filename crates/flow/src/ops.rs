//! The few operations of the blocks that are more than one tensor call.

use candle_core::{CpuStorage, CustomOp1, DType, Layout, Module, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use retouch_weights::Weights;

/// Bytes that the scores of one attention call may take; longer sequences are done in several runs of queries.
const SCORE_BYTES: usize = 512 << 20;

/// Full attention of `q` over `k` and `v`, each `[batch, heads, tokens, head_dim]`; the result is
/// `[batch, tokens, heads * head_dim]`.
///
/// Queries are taken in runs, so that the scores never take more than [`SCORE_BYTES`], and never reach the 2^31
/// elements at which candle's CUDA reductions overflow their index.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (b, heads, tokens, head_dim) = q.dims4()?;
    let dtype = q.dtype();
    if q.device().is_cpu() && dtype != DType::F32 {
        // On the CPU candle adds up a softmax's terms in the tensor's own dtype: in bf16 a sum of more than 256 is lost.
        let [q, k, v] = [q, k, v].map(|x| x.to_dtype(DType::F32));
        return attention(&q?, &k?, &v?)?.to_dtype(dtype);
    }
    let bytes_per_query = b * heads * k.dim(2)? * q.dtype().size_in_bytes();
    let run = (SCORE_BYTES / bytes_per_query).clamp(1, tokens);
    let q = (q * (head_dim as f64).powf(-0.5))?;
    let k_t = k.t()?.contiguous()?;
    let v = v.contiguous()?;
    let mut outputs = Vec::with_capacity(tokens.div_ceil(run));
    for start in (0..tokens).step_by(run) {
        let scores = q.narrow(2, start, run.min(tokens - start))?.contiguous()?.matmul(&k_t)?;
        outputs.push(candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?);
    }
    let output = if outputs.len() == 1 { outputs.remove(0) } else { Tensor::cat(&outputs, 2)? };
    output.transpose(1, 2)?.reshape((b, tokens, heads * head_dim))
}

/// Layer norm without learned scale and bias, then `x * (1 + scale) + shift`.
pub struct ModulatedNorm {
    ones: Tensor,
    zeros: Tensor,
}

impl ModulatedNorm {
    /// candle has a fused kernel for the norm with scale and bias only: it is given ones and zeros.
    pub fn new(weights: &Weights, hidden: usize) -> Result<Self> {
        Ok(Self {
            ones: Tensor::ones(hidden, weights.dtype(), weights.device())?,
            zeros: Tensor::zeros(hidden, weights.dtype(), weights.device())?,
        })
    }

    /// `x` `[batch, tokens, hidden]`; `shift` and `scale` `[1, hidden]`.
    pub fn forward(&self, x: &Tensor, shift: &Tensor, scale: &Tensor) -> Result<Tensor> {
        candle_nn::ops::layer_norm(&x.contiguous()?, &self.ones, &self.zeros, 1e-6)?
            .broadcast_mul(&(scale + 1.0)?)?
            .broadcast_add(shift)
    }
}

/// Root-mean-square norm over the channels of each head, with a learned scale; eps 1e-6.
pub struct HeadNorm(Tensor);

impl HeadNorm {
    pub fn load(weights: &Weights, head_dim: usize) -> retouch_weights::Result<Self> {
        Ok(Self(weights.get(head_dim, "scale")?))
    }
}

impl Module for HeadNorm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        candle_nn::ops::rms_norm(&x.contiguous()?, &self.0, 1e-6)
    }
}

/// GELU in its tanh form.
///
/// On the CPU in f32 this is our own loop over all threads, as candle's runs on one.
pub fn gelu(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype() == DType::F32 {
        x.contiguous()?.apply_op1_no_bwd(&ParallelGelu)
    } else {
        x.gelu()
    }
}

struct ParallelGelu;

impl CustomOp1 for ParallelGelu {
    fn name(&self) -> &'static str {
        "parallel-gelu"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("gelu needs a contiguous tensor") };
        let input = &storage.as_slice::<f32>()?[start..end];
        let mut output = vec![0f32; input.len()];
        const CHUNK: usize = 1 << 14;
        output.par_chunks_mut(CHUNK).zip(input.par_chunks(CHUNK)).for_each(|(out, x)| {
            for (out, &x) in out.iter_mut().zip(x) {
                // x * (1 + tanh(u)) / 2 is x * sigmoid(2u), with u = sqrt(2/pi) * (x + 0.044715 x^3).
                const TWICE_SQRT_2_OVER_PI: f32 = 2.0 * 0.797_884_6;
                *out = x / (1.0 + (-TWICE_SQRT_2_OVER_PI * (x + 0.044715 * x * x * x)).exp());
            }
        });
        Ok((CpuStorage::F32(output), layout.shape().clone()))
    }
}
