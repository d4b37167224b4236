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

/// `run` for some of the tokens after the other, `most` at a time, for all of `tokens`: `[batch, tokens.len(), hidden]`.
fn in_runs(
    tokens: Range<usize>,
    most: usize,
    mut run: impl FnMut(Range<usize>) -> candle_core::Result<Tensor>,
) -> candle_core::Result<Tensor> {
    if tokens.len() <= most {
        return run(tokens);
    }
    // Written to their place as they come: joined at the end, all of them would be in memory twice.
    let first = run(tokens.start..tokens.start + most)?;
    let (batch, _, hidden) = first.dims3()?;
    let all = Tensor::zeros((batch, tokens.len(), hidden), first.dtype(), first.device())?;
    all.slice_set(&first.contiguous()?, 1, 0)?;
    for start in tokens.clone().step_by(most).skip(1) {
        let part = run(start..tokens.end.min(start + most))?;
        all.slice_set(&part.contiguous()?, 1, start - tokens.start)?;
    }
    Ok(all)
}

/// `[b, tokens, 3, heads, head_dim]` as views of queries, keys and values, with the scale of their scores.
fn unpack(qkv: &Tensor) -> candle_core::Result<([Tensor; 3], f64)> {
    let part = |i: usize| qkv.narrow(2, i, 1)?.squeeze(2);
    Ok(([part(0)?, part(1)?, part(2)?], (qkv.dim(D::Minus1)? as f64).powf(-0.5)))
}

/// The attention of all heads of `heads` `[b, tokens, 3, heads, head_dim]`: `[b, tokens, hidden]`.
fn attend(kernels: &dyn Kernels, heads: Tensor) -> candle_core::Result<Tensor> {
    let ([q, k, v], scale) = unpack(&heads)?;
    kernels.attention(&q, &k, &v, None, scale)
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

    /// `x` with the attention's result added through its gate.
    fn add_attention(&self, x: &Tensor, attended: &Tensor, m: &Modulation) -> candle_core::Result<Tensor> {
        self.kernels.gated_residual(x, &self.proj.forward(attended)?, &m.gate)
    }

    /// `x` with the MLP's result added through its gate, `mlp_tokens` at a time.
    fn add_mlp(&self, x: &Tensor, m: &Modulation, mlp_tokens: usize) -> candle_core::Result<Tensor> {
        in_runs(0..x.dim(1)?, mlp_tokens, |run| {
            let x = x.narrow(1, run.start, run.len())?;
            let inner = self.mlp_in.forward_gelu(&self.kernels.modulated_norm(&x, &m.shift, &m.scale)?)?;
            let y = self.mlp_out.forward(&inner)?;
            drop(inner);
            self.kernels.gated_residual(&x, &y, &m.gate)
        })
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

    /// `image` and `text` are `[batch, tokens, hidden]`; `rotation` covers text, then image tokens. The MLPs take
    /// `mlp_tokens` at a time.
    ///
    /// What is not needed any more leaves memory at once: of all tokens and `hidden` channels there are at most seven times
    /// as many values, at the split into heads.
    pub fn forward(
        &self,
        mut image: Tensor,
        mut text: Tensor,
        rotation: &Rotation,
        image_modulation: &[Modulation; 2],
        text_modulation: &[Modulation; 2],
        mlp_tokens: usize,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let heads = {
            let text_qkv = self.text.project(&text, &text_modulation[0])?;
            let image_qkv = self.image.project(&image, &image_modulation[0])?;
            let streams = [self.text.head_norms.stream(&text_qkv), self.image.head_norms.stream(&image_qkv)];
            self.kernels.heads(&streams, rotation)?
        };
        let attended = attend(self.kernels, heads)?; // [b, text + image, hidden]
        let (text_tokens, image_tokens) = (text.dim(1)?, image.dim(1)?);
        text = self.text.add_attention(&text, &attended.narrow(1, 0, text_tokens)?, &text_modulation[0])?;
        image =
            self.image.add_attention(&image, &attended.narrow(1, text_tokens, image_tokens)?, &image_modulation[0])?;
        drop(attended);
        Ok((
            self.image.add_mlp(&image, &image_modulation[1], mlp_tokens)?,
            self.text.add_mlp(&text, &text_modulation[1], mlp_tokens)?,
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

    /// `x` `[batch, tokens, hidden]`, text tokens first; returns the same. The MLP takes `mlp_tokens` at a time.
    pub fn forward(
        &self,
        x: &Tensor,
        rotation: &Rotation,
        m: &Modulation,
        mlp_tokens: usize,
    ) -> candle_core::Result<Tensor> {
        let tokens = x.dim(1)?;
        if tokens > mlp_tokens {
            return self.forward_for(0..tokens, x, rotation, m, mlp_tokens);
        }
        let (heads, inner) = {
            let projected = self.linear1.forward(&self.kernels.modulated_norm(x, &m.shift, &m.scale)?)?;
            let qkv = projected.narrow(D::Minus1, 0, 3 * self.hidden)?;
            let inner = projected.narrow(D::Minus1, 3 * self.hidden, self.mlp)?;
            (self.kernels.heads(&[self.head_norms.stream(&qkv)], rotation)?, inner)
        };
        let ([q, k, v], scale) = unpack(&heads)?;
        let both = self.kernels.attention_beside_gelu(&q, &k, &v, scale, &inner)?;
        drop((heads, q, k, v, inner));
        self.finish(x, both, m)
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
        mlp_tokens: usize,
    ) -> candle_core::Result<Tensor> {
        let heads = {
            let normed = self.kernels.modulated_norm(x, &m.shift, &m.scale)?;
            let qkv = self.linear1.outputs(0..3 * self.hidden)?.forward(&normed)?;
            drop(normed);
            self.kernels.heads(&[self.head_norms.stream(&qkv)], rotation)?
        };
        let ([q, k, v], scale) = unpack(&heads)?;
        let mlp_in = self.linear1.outputs(3 * self.hidden..3 * self.hidden + self.mlp)?;
        in_runs(outputs, mlp_tokens, |run| {
            let wanted = |x: &Tensor| x.narrow(1, run.start, run.len());
            let x = wanted(x)?;
            let inner = mlp_in.forward(&self.kernels.modulated_norm(&x, &m.shift, &m.scale)?)?;
            let both = self.kernels.attention_beside_gelu(&wanted(&q)?, &k, &v, scale, &inner)?;
            drop(inner);
            self.finish(&x, both, m)
        })
    }

    fn finish(&self, x: &Tensor, both: Tensor, m: &Modulation) -> candle_core::Result<Tensor> {
        let y = self.linear2.forward(&both)?;
        drop(both);
        self.kernels.gated_residual(x, &y, &m.gate)
    }
}
