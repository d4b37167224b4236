//! The two kinds of transformer block.
//!
//! Source: diffusers, `FluxTransformerBlock` and `FluxSingleTransformerBlock`; parameter names are Black Forest Labs'.

use candle_core::{D, Module, Tensor};
use retouch_weights::{Linear, Result, Weights};

use crate::{
    FluxConfig, Rotary,
    modulation::Modulation,
    ops::{HeadNorm, ModulatedNorm, attention, gelu},
};

/// Queries, keys and values from one fused projection, split into heads, queries and keys normalised per head.
struct HeadSplit {
    heads: usize,
    head_dim: usize,
    query_norm: HeadNorm,
    key_norm: HeadNorm,
}

impl HeadSplit {
    fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        Ok(Self {
            heads: config.num_attention_heads,
            head_dim: config.attention_head_dim,
            query_norm: HeadNorm::load(&weights.pp("query_norm"), config.attention_head_dim)?,
            key_norm: HeadNorm::load(&weights.pp("key_norm"), config.attention_head_dim)?,
        })
    }

    /// `[batch, tokens, 3 * hidden]` to three times `[batch, heads, tokens, head_dim]`.
    fn forward(&self, qkv: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        let (b, tokens, _) = qkv.dims3()?;
        let hidden = self.heads * self.head_dim;
        let part = |i: usize| {
            qkv.narrow(D::Minus1, i * hidden, hidden)?.contiguous()?.reshape((b, tokens, self.heads, self.head_dim))
        };
        // Normalised before the transposition: candle's fused norm wants contiguous rows.
        let q = self.query_norm.forward(&part(0)?)?.transpose(1, 2)?;
        let k = self.key_norm.forward(&part(1)?)?.transpose(1, 2)?;
        Ok([q, k, part(2)?.transpose(1, 2)?])
    }
}

/// One stream (text or image) of a double block: its own projections, norms and MLP.
struct Stream {
    norm: ModulatedNorm,
    qkv: Linear,
    split: HeadSplit,
    proj: Linear,
    mlp_in: Linear,
    mlp_out: Linear,
}

impl Stream {
    /// `name` is `img` or `txt`.
    fn load(weights: &Weights, config: &FluxConfig, name: &str) -> Result<Self> {
        let hidden = config.hidden();
        let (attn, mlp) = (weights.pp(format!("{name}_attn")), weights.pp(format!("{name}_mlp")));
        Ok(Self {
            norm: ModulatedNorm::new(weights, hidden)?,
            qkv: Linear::load(&attn.pp("qkv"), hidden, 3 * hidden)?,
            split: HeadSplit::load(&attn.pp("norm"), config)?,
            proj: Linear::load(&attn.pp("proj"), hidden, hidden)?,
            mlp_in: Linear::load(&mlp.pp(0), hidden, config.mlp())?,
            mlp_out: Linear::load(&mlp.pp(2), config.mlp(), hidden)?,
        })
    }

    fn attention_input(&self, x: &Tensor, m: &Modulation) -> candle_core::Result<[Tensor; 3]> {
        self.split.forward(&self.qkv.forward(&self.norm.forward(x, &m.shift, &m.scale)?)?)
    }

    /// Adds the attention's result and the MLP, each through its gate.
    fn finish(&self, x: &Tensor, attended: &Tensor, [m1, m2]: &[Modulation; 2]) -> candle_core::Result<Tensor> {
        let x = (x + self.proj.forward(attended)?.broadcast_mul(&m1.gate)?)?;
        let inner = gelu(&self.mlp_in.forward(&self.norm.forward(&x, &m2.shift, &m2.scale)?)?)?;
        x + self.mlp_out.forward(&inner)?.broadcast_mul(&m2.gate)?
    }
}

/// Text and image tokens with their own weights, attending jointly.
pub struct DoubleBlock {
    image: Stream,
    text: Stream,
}

impl DoubleBlock {
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        Ok(Self { image: Stream::load(weights, config, "img")?, text: Stream::load(weights, config, "txt")? })
    }

    /// `image` and `text` are `[batch, tokens, hidden]`; `rotary` covers text, then image tokens.
    pub fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        rotary: &Rotary,
        image_modulation: &[Modulation; 2],
        text_modulation: &[Modulation; 2],
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let [q_text, k_text, v_text] = self.text.attention_input(text, &text_modulation[0])?;
        let [q_image, k_image, v_image] = self.image.attention_input(image, &image_modulation[0])?;
        let q = rotary.apply(&Tensor::cat(&[q_text, q_image], 2)?)?;
        let k = rotary.apply(&Tensor::cat(&[k_text, k_image], 2)?)?;
        let attended = attention(&q, &k, &Tensor::cat(&[v_text, v_image], 2)?)?; // [b, text + image, hidden]
        let text_tokens = text.dim(1)?;
        let attended_text = attended.narrow(1, 0, text_tokens)?.contiguous()?;
        let attended_image = attended.narrow(1, text_tokens, image.dim(1)?)?.contiguous()?;
        Ok((
            self.image.finish(image, &attended_image, image_modulation)?,
            self.text.finish(text, &attended_text, text_modulation)?,
        ))
    }
}

/// All tokens in one stream, attention and MLP side by side from one projection.
pub struct SingleBlock {
    hidden: usize,
    mlp: usize,
    norm: ModulatedNorm,
    /// To q, k, v and the MLP's inside.
    linear1: Linear,
    split: HeadSplit,
    /// From attention and MLP.
    linear2: Linear,
}

impl SingleBlock {
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        let (hidden, mlp) = (config.hidden(), config.mlp());
        Ok(Self {
            hidden,
            mlp,
            norm: ModulatedNorm::new(weights, hidden)?,
            linear1: Linear::load(&weights.pp("linear1"), hidden, 3 * hidden + mlp)?,
            split: HeadSplit::load(&weights.pp("norm"), config)?,
            linear2: Linear::load(&weights.pp("linear2"), hidden + mlp, hidden)?,
        })
    }

    /// `x` `[batch, tokens, hidden]`, text tokens first.
    pub fn forward(&self, x: &Tensor, rotary: &Rotary, m: &Modulation) -> candle_core::Result<Tensor> {
        let projected = self.linear1.forward(&self.norm.forward(x, &m.shift, &m.scale)?)?;
        let [q, k, v] = self.split.forward(&projected.narrow(D::Minus1, 0, 3 * self.hidden)?)?;
        let attended = attention(&rotary.apply(&q)?, &rotary.apply(&k)?, &v)?;
        let inner = gelu(&projected.narrow(D::Minus1, 3 * self.hidden, self.mlp)?)?;
        let output = self.linear2.forward(&Tensor::cat(&[attended, inner], D::Minus1)?)?;
        x + output.broadcast_mul(&m.gate)?
    }
}
