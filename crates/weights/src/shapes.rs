//! A model's sizes, read off its tensors' shapes: single files come without a config.

use crate::{Result, Weights, WeightsError};

/// The sizes of a FLUX transformer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FluxShape {
    /// Width of the token stream.
    pub hidden: usize,
    pub double_blocks: usize,
    pub single_blocks: usize,
    pub head_dim: usize,
    /// Values per image token: latent channels of a 2x2 patch.
    pub in_channels: usize,
    pub out_channels: usize,
    /// Width of the T5 embeddings.
    pub joint_dim: usize,
    /// Width of the pooled CLIP embedding.
    pub pooled_dim: usize,
    /// Width of the sinusoidal embedding of the timestep.
    pub time_dim: usize,
    /// Whether it takes the guidance scale as an input (the guidance-distilled \[dev\] models do, \[schnell\] does not).
    pub guidance: bool,
    /// Width of the blocks' MLP over `hidden`.
    pub mlp_ratio: f64,
}

/// The sizes of a VAE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VaeShape {
    /// Channels per resolution level of the encoder, finest first.
    pub channels: Vec<usize>,
    /// Residual blocks per level of the encoder; the decoder has one more.
    pub layers_per_block: usize,
    pub latent_channels: usize,
    pub image_channels: usize,
}

/// The sizes of a CLIP text encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClipShape {
    pub layers: usize,
    pub hidden: usize,
    pub intermediate: usize,
    /// Not to be read off any shape: `hidden / 64`, as in all published CLIP models.
    pub heads: usize,
    pub vocab: usize,
    /// The longest prompt in tokens.
    pub positions: usize,
}

/// The sizes of a T5 encoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct T5Shape {
    pub layers: usize,
    pub d_model: usize,
    /// Width of one attention head.
    pub d_kv: usize,
    pub heads: usize,
    pub d_ff: usize,
    pub vocab: usize,
    /// Buckets of relative positions.
    pub buckets: usize,
}

impl FluxShape {
    /// # Errors
    /// [`WeightsError::MissingTensor`] and [`WeightsError::WrongShape`] as when the tensors themselves are read.
    pub fn of(weights: &Weights) -> Result<Self> {
        let [hidden, in_channels] = shape(weights, "img_in.weight")?;
        let [_, joint_dim] = shape(weights, "txt_in.weight")?;
        let [_, pooled_dim] = shape(weights, "vector_in.in_layer.weight")?;
        let [_, time_dim] = shape(weights, "time_in.in_layer.weight")?;
        let [head_dim] = shape(weights, "double_blocks.0.img_attn.norm.query_norm.scale")?;
        let [mlp, _] = shape(weights, "double_blocks.0.img_mlp.0.weight")?;
        let [out_channels, _] = shape(weights, "final_layer.linear.weight")?;
        Ok(Self {
            hidden,
            double_blocks: count(weights, |i| format!("double_blocks.{i}.img_mod.lin.weight")),
            single_blocks: count(weights, |i| format!("single_blocks.{i}.modulation.lin.weight")),
            head_dim,
            in_channels,
            out_channels,
            joint_dim,
            pooled_dim,
            time_dim,
            guidance: weights.has("guidance_in.in_layer.weight"),
            mlp_ratio: mlp as f64 / hidden as f64,
        })
    }
}

impl VaeShape {
    /// # Errors
    /// As [`FluxShape::of`].
    pub fn of(weights: &Weights) -> Result<Self> {
        let conv1 = |level: usize, layer: usize| format!("encoder.down_blocks.{level}.resnets.{layer}.conv1.weight");
        let levels = count(weights, |level| conv1(level, 0));
        let channels = |level| shape(weights, &conv1(level, 0)).map(|[out, _, _, _]| out);
        let [_, latent_channels, _, _] = shape(weights, "decoder.conv_in.weight")?;
        let [_, image_channels, _, _] = shape(weights, "encoder.conv_in.weight")?;
        Ok(Self {
            channels: (0..levels).map(channels).collect::<Result<_>>()?,
            layers_per_block: count(weights, |layer| conv1(0, layer)),
            latent_channels,
            image_channels,
        })
    }
}

impl ClipShape {
    /// # Errors
    /// As [`FluxShape::of`].
    pub fn of(weights: &Weights) -> Result<Self> {
        let [vocab, hidden] = shape(weights, "text_model.embeddings.token_embedding.weight")?;
        let [positions, _] = shape(weights, "text_model.embeddings.position_embedding.weight")?;
        let [intermediate, _] = shape(weights, "text_model.encoder.layers.0.mlp.fc1.weight")?;
        let layers = count(weights, |i| format!("text_model.encoder.layers.{i}.mlp.fc1.weight"));
        Ok(Self { layers, hidden, intermediate, heads: (hidden / 64).max(1), vocab, positions })
    }
}

impl T5Shape {
    /// # Errors
    /// As [`FluxShape::of`]; the gated feed-forward of T5 v1.1 is expected.
    pub fn of(weights: &Weights) -> Result<Self> {
        let [vocab, d_model] = shape(weights, "shared.weight")?;
        let [buckets, heads] = shape(weights, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")?;
        let [inner, _] = shape(weights, "encoder.block.0.layer.0.SelfAttention.q.weight")?;
        let [d_ff, _] = shape(weights, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")?;
        let layers = count(weights, |i| format!("encoder.block.{i}.layer.0.SelfAttention.q.weight"));
        Ok(Self { layers, d_model, d_kv: inner / heads.max(1), heads, d_ff, vocab, buckets })
    }
}

/// How many of a numbered parameter there are.
fn count(weights: &Weights, name: impl Fn(usize) -> String) -> usize {
    (0..).take_while(|&i| weights.has(&name(i))).count()
}

fn shape<const RANK: usize>(weights: &Weights, name: &str) -> Result<[usize; RANK]> {
    let Some(found) = weights.shape(name) else {
        return Err(WeightsError::MissingTensor { files: weights.store().describe(), tensor: name.to_string() });
    };
    <[usize; RANK]>::try_from(found).map_err(|found| WeightsError::WrongRank {
        file: weights.store().describe(),
        tensor: name.to_string(),
        expected: RANK,
        found,
    })
}
