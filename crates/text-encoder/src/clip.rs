//! The text encoder of CLIP ViT-L/14, of which FLUX.1 takes the pooled vector.
//!
//! Our own rather than candle-transformers': that one fixes the activation, the epsilon and the pooling to those of
//! one model, holds its matrices where a quantised form cannot be put, and divides by the number of heads unchecked.

use candle_core::{DType, Device, Module, Result, Tensor, bail};
use candle_nn::LayerNorm;
use retouch_kernels::Kernels;
use retouch_weights::{ClipShape, Embedding, Linear, Weights};
use serde::Deserialize;

use crate::{
    config::{check_sizes, unsupported},
    layers::{checked_ids, normalise},
};

/// What `text_encoder/config.json` says; the names and the defaults of absent values are those of `CLIPTextConfig` in
/// transformers' `models/clip/configuration_clip.py`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct ClipConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub max_position_embeddings: usize,
    #[serde(default)]
    pub hidden_act: ClipActivation,
    #[serde(default = "default_epsilon")]
    pub layer_norm_eps: f64,
    /// 2 stands for the largest id of each text: see [`ClipEncoder::pooled`].
    #[serde(default = "default_eos")]
    pub eos_token_id: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClipActivation {
    /// `x * sigmoid(1.702 x)`
    #[default]
    QuickGelu,
    /// The exact one, by the error function.
    Gelu,
}

/// As `eos_token_id`, stands for the largest id of each text: early configurations named this wrong id.
const LARGEST_ID: u32 = 2;

/// The width of a head in all published CLIP models.
const CLIP_HEAD_WIDTH: usize = 64;

fn default_epsilon() -> f64 {
    1e-5
}

fn default_eos() -> u32 {
    49407
}

impl ClipConfig {
    /// CLIP ViT-L/14, the one that FLUX.1 uses.
    ///
    /// Source: `text_encoder/config.json` of the black-forest-labs/FLUX.1-Kontext-dev repository.
    pub fn large() -> Self {
        Self {
            vocab_size: 49408,
            hidden_size: 768,
            intermediate_size: 3072,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            max_position_embeddings: 77,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: default_epsilon(),
            eos_token_id: LARGEST_ID,
        }
    }

    /// The sizes of a single file, which brings no configuration; the rest as in CLIP-L, the one that FLUX.1 uses.
    ///
    /// # Errors
    /// A width of which the number of heads cannot be told, and those of [`ClipShape::of`].
    pub fn of(weights: &Weights) -> retouch_weights::Result<Self> {
        let shape = ClipShape::of(weights)?;
        if !shape.hidden.is_multiple_of(CLIP_HEAD_WIDTH) {
            return unsupported(
                &weights.store().describe(),
                format!("its width is {}, and CLIP's is a multiple of {CLIP_HEAD_WIDTH}", shape.hidden),
            );
        }
        Ok(Self {
            vocab_size: shape.vocab,
            hidden_size: shape.hidden,
            intermediate_size: shape.intermediate,
            num_hidden_layers: shape.layers,
            num_attention_heads: shape.hidden / CLIP_HEAD_WIDTH,
            max_position_embeddings: shape.positions,
            hidden_act: ClipActivation::QuickGelu,
            layer_norm_eps: default_epsilon(),
            eos_token_id: LARGEST_ID,
        })
    }

    /// Refuses what cannot be computed; `file` names the configuration in the message.
    pub fn check(&self, file: &str) -> retouch_weights::Result<()> {
        check_sizes(
            file,
            &[
                ("vocab_size", self.vocab_size),
                ("hidden_size", self.hidden_size),
                ("intermediate_size", self.intermediate_size),
                ("num_hidden_layers", self.num_hidden_layers),
                ("num_attention_heads", self.num_attention_heads),
                ("max_position_embeddings", self.max_position_embeddings),
            ],
        )?;
        if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
            return unsupported(
                file,
                format!(
                    "hidden_size is {}, which is not a multiple of num_attention_heads ({})",
                    self.hidden_size, self.num_attention_heads
                ),
            );
        }
        Ok(())
    }
}

/// Source: `CLIPAttention` in transformers' `models/clip/modeling_clip.py`.
struct Attention {
    kernels: &'static dyn Kernels,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    out_proj: Linear,
    heads: usize,
    scale: f64,
}

impl Attention {
    fn load(weights: &Weights, config: &ClipConfig) -> retouch_weights::Result<Self> {
        let hidden = config.hidden_size;
        let linear = |name: &str| Linear::load(&weights.pp(name), hidden, hidden);
        Ok(Self {
            kernels: weights.kernels(),
            q_proj: linear("q_proj")?,
            k_proj: linear("k_proj")?,
            v_proj: linear("v_proj")?,
            out_proj: linear("out_proj")?,
            heads: config.num_attention_heads,
            scale: ((hidden / config.num_attention_heads) as f64).powf(-0.5),
        })
    }

    /// `x` `[b, tokens, hidden]`, `mask` `[1, 1, tokens, tokens]`; returns the shape of `x`.
    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let (b, tokens, _) = x.dims3()?;
        let split = |linear: &Linear| linear.forward(x)?.reshape((b, tokens, self.heads, ()));
        let (q, k, v) = (split(&self.q_proj)?, split(&self.k_proj)?, split(&self.v_proj)?); // [b, tokens, heads, width]
        self.out_proj.forward(&self.kernels.attention(&q, &k, &v, Some(mask), self.scale)?)
    }
}

struct Mlp {
    fc1: Linear,
    fc2: Linear,
    activation: ClipActivation,
}

impl Mlp {
    fn load(weights: &Weights, config: &ClipConfig) -> retouch_weights::Result<Self> {
        Ok(Self {
            fc1: Linear::load(&weights.pp("fc1"), config.hidden_size, config.intermediate_size)?,
            fc2: Linear::load(&weights.pp("fc2"), config.intermediate_size, config.hidden_size)?,
            activation: config.hidden_act,
        })
    }

    /// `[b, tokens, hidden]` to the same.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = self.fc1.forward(x)?; // [b, tokens, intermediate]
        let x = match self.activation {
            ClipActivation::QuickGelu => (&x * candle_nn::ops::sigmoid(&(&x * 1.702)?)?)?,
            ClipActivation::Gelu => x.gelu_erf()?,
        };
        self.fc2.forward(&x)
    }
}

/// Source: `CLIPEncoderLayer` in transformers' `models/clip/modeling_clip.py`.
struct Layer {
    layer_norm1: LayerNorm,
    self_attn: Attention,
    layer_norm2: LayerNorm,
    mlp: Mlp,
}

impl Layer {
    fn load(weights: &Weights, config: &ClipConfig) -> retouch_weights::Result<Self> {
        Ok(Self {
            layer_norm1: load_norm(&weights.pp("layer_norm1"), config)?,
            self_attn: Attention::load(&weights.pp("self_attn"), config)?,
            layer_norm2: load_norm(&weights.pp("layer_norm2"), config)?,
            mlp: Mlp::load(&weights.pp("mlp"), config)?,
        })
    }

    fn forward(&self, x: &Tensor, mask: &Tensor) -> Result<Tensor> {
        let x = (x + self.self_attn.forward(&normalise(&self.layer_norm1, x)?, mask)?)?;
        &x + self.mlp.forward(&normalise(&self.layer_norm2, &x)?)?
    }
}

fn load_norm(weights: &Weights, config: &ClipConfig) -> retouch_weights::Result<LayerNorm> {
    let weights = weights.with_dtype(DType::F32);
    let (weight, bias) = (weights.get(config.hidden_size, "weight")?, weights.get(config.hidden_size, "bias")?);
    Ok(LayerNorm::new(weight, bias, config.layer_norm_eps))
}

/// From the ids of a prompt to one vector.
///
/// Source: `CLIPTextTransformer` in transformers' `models/clip/modeling_clip.py`.
pub struct ClipEncoder {
    config: ClipConfig,
    token_embedding: Embedding,
    /// `[max_position_embeddings, hidden]`
    position_embedding: Tensor,
    layers: Vec<Layer>,
    final_layer_norm: LayerNorm,
}

impl ClipEncoder {
    /// `weights` is the root of the encoder's parameters (`text_model.embeddings.token_embedding.weight`, …).
    ///
    /// # Errors
    /// A parameter that is missing or of another shape, and those of [`ClipConfig::check`].
    pub fn load(weights: &Weights, config: &ClipConfig) -> retouch_weights::Result<Self> {
        config.check("CLIP's configuration")?;
        let weights = weights.pp("text_model");
        let embeddings = weights.pp("embeddings");
        let positions = (config.max_position_embeddings, config.hidden_size);
        let layers = weights.pp("encoder.layers");
        Ok(Self {
            token_embedding: Embedding::load(&embeddings.pp("token_embedding"), config.vocab_size, config.hidden_size)?,
            position_embedding: embeddings.get(positions, "position_embedding.weight")?,
            layers: (0..config.num_hidden_layers)
                .map(|i| Layer::load(&layers.pp(i), config))
                .collect::<retouch_weights::Result<_>>()?,
            final_layer_norm: load_norm(&weights.pp("final_layer_norm"), config)?,
            config: config.clone(),
        })
    }

    /// The text's vector: the last layer at the end-of-text token, normalised.
    ///
    /// `ids` `[b, tokens]` (integers), at most `max_position_embeddings` tokens; returns `[b, hidden]` in the dtype of
    /// the weights. The end-of-text token is the first one whose id is `eos_token_id`, except where that is 2: then it
    /// is the first one with the largest id, as early configurations named a wrong id.
    pub fn pooled(&self, ids: &Tensor) -> Result<Tensor> {
        let texts = checked_ids(ids, self.config.vocab_size)?;
        let tokens = ids.dim(1)?;
        if tokens == 0 || tokens > self.config.max_position_embeddings {
            bail!("{tokens} tokens for CLIP, which takes 1 to {}", self.config.max_position_embeddings)
        }
        let positions = self.position_embedding.narrow(0, 0, tokens)?;
        let x = self.token_embedding.forward(ids)?.broadcast_add(&positions)?; // [b, tokens, hidden]
        let mask = causal_mask(tokens, &x)?;
        let x = self.layers.iter().try_fold(x, |x, layer| layer.forward(&x, &mask))?;
        // The normalisation acts on each token alone: only the one that is wanted needs it.
        let ends = texts.iter().enumerate().map(|(text, ids)| x.get(text)?.get(self.end_of_text(ids)));
        normalise(&self.final_layer_norm, &Tensor::stack(&ends.collect::<Result<Vec<_>>>()?, 0)?)
    }

    /// Where the end-of-text token is; 0, as in the reference, where there is none.
    fn end_of_text(&self, ids: &[u32]) -> usize {
        let end = match self.config.eos_token_id {
            LARGEST_ID => ids.iter().max().copied(),
            id => Some(id),
        };
        ids.iter().position(|&id| Some(id) == end).unwrap_or(0)
    }
}

/// `[1, 1, tokens, tokens]` in the dtype and on the device of `like`: 0 up to each token's own position, then minus infinity.
fn causal_mask(tokens: usize, like: &Tensor) -> Result<Tensor> {
    let mask: Vec<f32> = (0..tokens)
        .flat_map(|query| (0..tokens).map(move |key| if key > query { f32::NEG_INFINITY } else { 0.0 }))
        .collect();
    Tensor::from_vec(mask, (1, 1, tokens, tokens), &Device::Cpu)?.to_dtype(like.dtype())?.to_device(like.device())
}
