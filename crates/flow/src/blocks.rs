//! The two kinds of transformer block.
//!
//! Source: diffusers, `FluxTransformerBlock` and `FluxSingleTransformerBlock`; parameter names are Black Forest Labs'.

use std::ops::Range;

use candle_core::{D, Module, Tensor};
use retouch_kernels::{Kernels, Rotation, Stream};
use retouch_weights::{Linear, Result, Weights};

use crate::{FluxConfig, modulation::Modulation};

/// The learned scales of the norms over each head's query and key, each `[head_dim]`.
struct HeadNorms {
    query: Tensor,
    key: Tensor,
}

impl HeadNorms {
    fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        let scale = |name| weights.pp(name).get(config.attention_head_dim, "scale");
        Ok(Self { query: scale("query_norm")?, key: scale("key_norm")? })
    }

    fn stream<'a>(&'a self, qkv: &'a Tensor) -> Stream<'a> {
        Stream { qkv, query_scale: &self.query, key_scale: &self.key }
    }
}

/// `[b, tokens, 3, heads, head_dim]` as views of queries, keys and values, with the scale of their scores.
fn unpack(qkv: &Tensor) -> candle_core::Result<([Tensor; 3], f64)> {
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2);
    Ok(([part(0)?, part(1)?, part(2)?], (qkv.dim(D::Minus1)? as f64).powf(-0.5)))
}

/// One stream (text or image) of a double block: its own projections, norms and MLP.
struct DoubleStream {
    kernels: &'static dyn Kernels,
    qkv: Linear,
    head_norms: HeadNorms,
    proj: Linear,
    mlp_in: Linear,
    mlp_out: Linear,
}

impl DoubleStream {
    /// `name` is `img` or `txt`.
    fn load(weights: &Weights, config: &FluxConfig, name: &str) -> Result<Self> {
        let hidden = config.hidden();
        let (attn, mlp) = (weights.pp(format!("{name}_attn")), weights.pp(format!("{name}_mlp")));
        Ok(Self {
            kernels: weights.kernels(),
            qkv: Linear::load(&attn.pp("qkv"), hidden, 3 * hidden)?,
            head_norms: HeadNorms::load(&attn.pp("norm"), config)?,
            proj: Linear::load(&attn.pp("proj"), hidden, hidden)?,
            mlp_in: Linear::load(&mlp.pp(0), hidden, config.mlp())?,
            mlp_out: Linear::load(&mlp.pp(2), config.mlp(), hidden)?,
        })
    }

    /// Queries, keys and values of `x`, before their norms: `[b, tokens, 3 * hidden]`.
    fn project(&self, x: &Tensor, m: &Modulation) -> candle_core::Result<Tensor> {
        self.qkv.forward(&self.kernels.modulated_norm(x, &m.shift, &m.scale)?)
    }

    /// Adds the attention's result and the MLP, each through its gate.
    fn finish(&self, x: &Tensor, attended: &Tensor, [m1, m2]: &[Modulation; 2]) -> candle_core::Result<Tensor> {
        let x = self.kernels.gated_residual(x, &self.proj.forward(attended)?, &m1.gate)?;
        let inner = self.mlp_in.forward_gelu(&self.kernels.modulated_norm(&x, &m2.shift, &m2.scale)?)?;
        self.kernels.gated_residual(&x, &self.mlp_out.forward(&inner)?, &m2.gate)
    }
}

/// Text and image tokens with their own weights, attending jointly.
pub struct DoubleBlock {
    kernels: &'static dyn Kernels,
    image: DoubleStream,
    text: DoubleStream,
}

impl DoubleBlock {
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        Ok(Self {
            kernels: weights.kernels(),
            image: DoubleStream::load(weights, config, "img")?,
            text: DoubleStream::load(weights, config, "txt")?,
        })
    }

    /// `image` and `text` are `[batch, tokens, hidden]`; `rotation` covers text, then image tokens.
    pub fn forward(
        &self,
        image: &Tensor,
        text: &Tensor,
        rotation: &Rotation,
        image_modulation: &[Modulation; 2],
        text_modulation: &[Modulation; 2],
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let text_qkv = self.text.project(text, &text_modulation[0])?;
        let image_qkv = self.image.project(image, &image_modulation[0])?;
        let streams = [self.text.head_norms.stream(&text_qkv), self.image.head_norms.stream(&image_qkv)];
        let ([q, k, v], scale) = unpack(&self.kernels.heads(&streams, rotation)?)?;
        let attended = self.kernels.attention(&q, &k, &v, None, scale)?; // [b, text + image, hidden]
        let attended_text = attended.narrow(1, 0, text.dim(1)?)?;
        let attended_image = attended.narrow(1, text.dim(1)?, image.dim(1)?)?;
        Ok((
            self.image.finish(image, &attended_image, image_modulation)?,
            self.text.finish(text, &attended_text, text_modulation)?,
        ))
    }
}

/// All tokens in one stream, attention and MLP side by side from one projection.
pub struct SingleBlock {
    kernels: &'static dyn Kernels,
    hidden: usize,
    mlp: usize,
    /// To q, k, v and the MLP's inside.
    linear1: Linear,
    head_norms: HeadNorms,
    /// From attention and MLP.
    linear2: Linear,
}

impl SingleBlock {
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        let (hidden, mlp) = (config.hidden(), config.mlp());
        Ok(Self {
            kernels: weights.kernels(),
            hidden,
            mlp,
            linear1: Linear::load(&weights.pp("linear1"), hidden, 3 * hidden + mlp)?,
            head_norms: HeadNorms::load(&weights.pp("norm"), config)?,
            linear2: Linear::load(&weights.pp("linear2"), hidden + mlp, hidden)?,
        })
    }

    /// `x` `[batch, tokens, hidden]`, text tokens first; returns the same.
    pub fn forward(&self, x: &Tensor, rotation: &Rotation, m: &Modulation) -> candle_core::Result<Tensor> {
        let projected = self.linear1.forward(&self.kernels.modulated_norm(x, &m.shift, &m.scale)?)?;
        let qkv = projected.narrow(D::Minus1, 0, 3 * self.hidden)?;
        let inner = projected.narrow(D::Minus1, 3 * self.hidden, self.mlp)?;
        let ([q, k, v], scale) = unpack(&self.kernels.heads(&[self.head_norms.stream(&qkv)], rotation)?)?;
        self.finish(x, [&q, &k, &v], scale, &inner, m)
    }

    /// [`Self::forward`] for some of the tokens, which attend to all: `[batch, outputs.len(), hidden]`.
    ///
    /// Exactly what `forward` gives for them. After the last block nothing reads the other tokens, so that their MLP,
    /// attention and output projection need not be computed.
    pub fn forward_for(
        &self,
        outputs: Range<usize>,
        x: &Tensor,
        rotation: &Rotation,
        m: &Modulation,
    ) -> candle_core::Result<Tensor> {
        let normed = self.kernels.modulated_norm(x, &m.shift, &m.scale)?;
        let wanted = |x: &Tensor| x.narrow(1, outputs.start, outputs.len());
        let qkv = self.linear1.outputs(0..3 * self.hidden)?.forward(&normed)?;
        let inner = self.linear1.outputs(3 * self.hidden..3 * self.hidden + self.mlp)?.forward(&wanted(&normed)?)?;
        let ([q, k, v], scale) = unpack(&self.kernels.heads(&[self.head_norms.stream(&qkv)], rotation)?)?;
        self.finish(&wanted(x)?, [&wanted(&q)?, &k, &v], scale, &inner, m)
    }

    fn finish(
        &self,
        x: &Tensor,
        [q, k, v]: [&Tensor; 3],
        scale: f64,
        inner: &Tensor,
        m: &Modulation,
    ) -> candle_core::Result<Tensor> {
        let both = self.kernels.attention_beside_gelu(q, k, v, scale, inner)?;
        self.kernels.gated_residual(x, &self.linear2.forward(&both)?, &m.gate)
    }
}
