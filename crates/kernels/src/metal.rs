//! Metal: candle's fused attention; everything else as defined.

use candle_core::{Result, Tensor};

use crate::{Kernels, portable};

#[derive(Debug)]
pub struct Metal;

/// What candle's kernel is compiled for.
const HEAD_DIMS: [usize; 6] = [32, 64, 72, 80, 96, 128];

impl Kernels for Metal {
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, bias: Option<&Tensor>, scale: f64) -> Result<Tensor> {
        let (b, queries, heads, head_dim) = q.dims4()?;
        if bias.is_some() || !HEAD_DIMS.contains(&head_dim) {
            return portable::attention(q, k, v, bias, scale);
        }
        let [q, k, v] = [q, k, v].map(|x| x.transpose(1, 2)?.contiguous()); // [b, heads, tokens, head_dim]
        let y = candle_nn::ops::sdpa(&q?, &k?, &v?, None, false, scale as f32, 1.0)?;
        y.transpose(1, 2)?.reshape((b, queries, heads * head_dim))
    }

    fn attention_beside_gelu(&self, q: &Tensor, k: &Tensor, v: &Tensor, scale: f64, inner: &Tensor) -> Result<Tensor> {
        Tensor::cat(&[self.attention(q, k, v, None, scale)?, inner.gelu()?], 2)
    }
}
