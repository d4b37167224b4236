//! The encoder of T5 v1.1, of which FLUX.1 takes the last hidden state, attending to the padding as well.
//!
//! Our own rather than candle-transformers': in f16 the reference keeps the feed-forward's second matrix in f32, which
//! that one does not; its normalisation and its activation on the CPU take several passes on one thread; and its
//! matrices are held where a quantised form cannot be put.

use candle_core::{DType, Device, Module, Result, Tensor, bail};
use candle_nn::RmsNorm;
use retouch_kernels::Kernels;
use retouch_weights::{Embedding, Layers, Linear, Stay, T5Shape, Weights};
use serde::Deserialize;

use crate::{
    config::{check_sizes, unsupported},
    layers::checked_ids,
};

/// What `text_encoder_2/config.json` says; the names and the defaults of absent values are those of `T5Config` in
/// transformers' `models/t5/configuration_t5.py`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct T5Config {
    pub vocab_size: usize,
    pub d_model: usize,
    /// The width of each attention head; the heads together need not be as wide as `d_model`.
    pub d_kv: usize,
    pub d_ff: usize,
    pub num_layers: usize,
    pub num_heads: usize,
    #[serde(default = "default_buckets")]
    pub relative_attention_num_buckets: usize,
    #[serde(default = "default_max_distance")]
    pub relative_attention_max_distance: usize,
    #[serde(default = "default_epsilon")]
    pub layer_norm_epsilon: f64,
    #[serde(default = "default_feed_forward")]
    pub feed_forward_proj: String,
}

fn default_buckets() -> usize {
    32
}

fn default_max_distance() -> usize {
    128
}

fn default_epsilon() -> f64 {
    1e-6
}

fn default_feed_forward() -> String {
    "relu".to_string()
}

const GATED_GELU: &str = "gated-gelu";

impl T5Config {
    /// T5 v1.1 XXL, the one that FLUX.1 uses.
    ///
    /// Source: `text_encoder_2/config.json` of the black-forest-labs/FLUX.1-Kontext-dev repository.
    pub fn xxl() -> Self {
        Self {
            vocab_size: 32128,
            d_model: 4096,
            d_kv: 64,
            d_ff: 10240,
            num_layers: 24,
            num_heads: 64,
            relative_attention_num_buckets: default_buckets(),
            relative_attention_max_distance: default_max_distance(),
            layer_norm_epsilon: default_epsilon(),
            feed_forward_proj: GATED_GELU.to_string(),
        }
    }

    /// The sizes of a single file, which brings no configuration; the rest as in T5 v1.1 XXL, the one that FLUX.1 uses.
    ///
    /// # Errors
    /// Those of [`T5Shape::of`].
    pub fn of(weights: &Weights) -> retouch_weights::Result<Self> {
        let shape = T5Shape::of(weights)?;
        Ok(Self {
            vocab_size: shape.vocab,
            d_model: shape.d_model,
            d_kv: shape.d_kv,
            d_ff: shape.d_ff,
            num_layers: shape.layers,
            num_heads: shape.heads,
            relative_attention_num_buckets: shape.buckets,
            relative_attention_max_distance: default_max_distance(),
            layer_norm_epsilon: default_epsilon(),
            feed_forward_proj: GATED_GELU.to_string(),
        })
    }

    /// Refuses what cannot be computed; `file` names the configuration in the message.
    pub fn check(&self, file: &str) -> retouch_weights::Result<()> {
        check_sizes(
            file,
            &[
                ("vocab_size", self.vocab_size),
                ("d_model", self.d_model),
                ("d_kv", self.d_kv),
                ("d_ff", self.d_ff),
                ("num_layers", self.num_layers),
                ("num_heads", self.num_heads),
                ("relative_attention_num_buckets", self.relative_attention_num_buckets),
                ("relative_attention_max_distance", self.relative_attention_max_distance),
            ],
        )?;
        let (buckets, distance) = (self.relative_attention_num_buckets, self.relative_attention_max_distance);
        if buckets < 4 || distance <= buckets / 4 {
            return unsupported(
                file,
                format!(
                    "relative_attention_num_buckets is {buckets} and relative_attention_max_distance {distance}; \
                     supported are at least 4 buckets, and a distance above a quarter of their number"
                ),
            );
        }
        if self.feed_forward_proj != GATED_GELU {
            return unsupported(
                file,
                format!("feed_forward_proj is `{}`; supported is `{GATED_GELU}` (T5 v1.1)", self.feed_forward_proj),
            );
        }
        Ok(())
    }
}

/// Source: `T5Attention` in transformers' `models/t5/modeling_t5.py`. The scores are not scaled.
struct Attention {
    kernels: &'static dyn Kernels,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    heads: usize,
}

impl Attention {
    fn load(weights: &Weights, config: &T5Config) -> retouch_weights::Result<Self> {
        let (hidden, inner) = (config.d_model, config.num_heads * config.d_kv);
        let linear = |name: &str| Linear::load_no_bias(&weights.pp(name), hidden, inner);
        Ok(Self {
            kernels: weights.kernels(),
            q: linear("q")?,
            k: linear("k")?,
            v: linear("v")?,
            o: Linear::load_no_bias(&weights.pp("o"), inner, hidden)?,
            heads: config.num_heads,
        })
    }

    /// `x` `[b, tokens, d_model]`, `bias` `[1, heads, tokens, tokens]`; returns the shape of `x`.
    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let (b, tokens, _) = x.dims3()?;
        let split = |linear: &Linear| linear.forward(x)?.reshape((b, tokens, self.heads, ()));
        let (q, k, v) = (split(&self.q)?, split(&self.k)?, split(&self.v)?); // [b, tokens, heads, d_kv]
        self.o.forward(&self.kernels.attention(&q, &k, &v, Some(bias), 1.0)?)
    }
}

/// Source: `T5DenseGatedActDense` in transformers' `models/t5/modeling_t5.py`.
struct FeedForward {
    kernels: &'static dyn Kernels,
    wi_0: Linear,
    wi_1: Linear,
    wo: Linear,
    wo_dtype: DType,
}

impl FeedForward {
    fn load(weights: &Weights, config: &T5Config) -> retouch_weights::Result<Self> {
        let (hidden, inner) = (config.d_model, config.d_ff);
        // As the reference does: what it makes can leave the range of f16.
        let wo_dtype = if weights.dtype() == DType::F16 { DType::F32 } else { weights.dtype() };
        Ok(Self {
            kernels: weights.kernels(),
            wi_0: Linear::load_no_bias(&weights.pp("wi_0"), hidden, inner)?,
            wi_1: Linear::load_no_bias(&weights.pp("wi_1"), hidden, inner)?,
            wo: Linear::load_no_bias(&weights.pp("wo").with_dtype(wo_dtype), inner, hidden)?,
            wo_dtype,
        })
    }

    /// `[b, tokens, d_model]` to the same, in the dtype of `wo`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (gate, value) = (self.wi_0.forward(x)?, self.wi_1.forward(x)?); // [b, tokens, d_ff]
        let gated = self.kernels.gated_gelu(&gate, &value)?;
        self.wo.forward(&gated.to_dtype(self.wo_dtype)?)
    }
}

/// Source: `T5Block` of an encoder in transformers' `models/t5/modeling_t5.py`.
struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
}

impl Block {
    fn load(weights: &Weights, config: &T5Config) -> retouch_weights::Result<Self> {
        let (first, second) = (weights.pp("layer.0"), weights.pp("layer.1"));
        Ok(Self {
            attention_norm: load_norm(&first.pp("layer_norm"), config)?,
            attention: Attention::load(&first.pp("SelfAttention"), config)?,
            feed_forward_norm: load_norm(&second.pp("layer_norm"), config)?,
            feed_forward: FeedForward::load(&second.pp("DenseReluDense"), config)?,
        })
    }

    /// `x` `[b, tokens, d_model]` in f32, `bias` `[1, heads, tokens, tokens]` in the weights' dtype.
    fn forward(&self, x: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let normed = self.attention_norm.forward(x)?.to_dtype(bias.dtype())?;
        let x = (x + self.attention.forward(&normed, bias)?.to_dtype(DType::F32)?)?;
        let normed = self.feed_forward_norm.forward(&x)?.to_dtype(bias.dtype())?;
        &x + self.feed_forward.forward(&normed)?.to_dtype(DType::F32)?
    }
}

/// In f32, as what it is applied to.
fn load_norm(weights: &Weights, config: &T5Config) -> retouch_weights::Result<RmsNorm> {
    let weight = weights.with_dtype(DType::F32).get(config.d_model, "weight")?;
    Ok(RmsNorm::new(weight, config.layer_norm_epsilon))
}

/// From the ids of a prompt to one vector per token.
///
/// Source: `T5EncoderModel` in transformers' `models/t5/modeling_t5.py`.
pub struct T5Encoder {
    config: T5Config,
    dtype: DType,
    shared: Embedding,
    /// `[buckets, heads]`
    relative_attention_bias: Tensor,
    blocks: Layers<Block>,
    final_layer_norm: RmsNorm,
}

impl T5Encoder {
    /// `weights` is the root of the parameters (`shared.weight`, `encoder.block.0.…`).
    ///
    /// # Errors
    /// A parameter that is missing or of another shape, and those of [`T5Config::check`].
    pub fn load(weights: &Weights, config: &T5Config) -> retouch_weights::Result<Self> {
        Self::load_resident(weights, config, None)
    }

    /// The same with `resident_blocks` of its blocks staying in memory (all if none is said); the others are read for each
    /// text, each while the one before it computes.
    pub fn load_resident(
        weights: &Weights,
        config: &T5Config,
        resident_blocks: Option<usize>,
    ) -> retouch_weights::Result<Self> {
        config.check("T5's configuration")?;
        let dtype = weights.dtype();
        let blocks = weights.pp("encoder.block");
        // The first block's bias serves all of them.
        let buckets = (config.relative_attention_num_buckets, config.num_heads);
        let bias = blocks.get(buckets, "0.layer.0.SelfAttention.relative_attention_bias.weight")?;
        let block = {
            let config = config.clone();
            move |blocks: &Weights, i: usize| Block::load(&blocks.pp(i), &config)
        };
        Ok(Self {
            shared: Embedding::load(&weights.pp("shared"), config.vocab_size, config.d_model)?,
            relative_attention_bias: bias,
            // A pass reads each block once: nothing is gained by having them in the host's memory first.
            blocks: Layers::load(
                &blocks,
                config.num_layers,
                Stay { resident: resident_blocks, on_host: false, for_one_request: false },
                block,
            )?,
            final_layer_norm: load_norm(&weights.pp("encoder.final_layer_norm"), config)?,
            config: config.clone(),
            dtype,
        })
    }

    /// The last hidden state, normalised.
    ///
    /// `ids` `[b, tokens]` (integers); returns `[b, tokens, d_model]` in the dtype of the weights.
    pub fn embed(&self, ids: &Tensor) -> Result<Tensor> {
        checked_ids(ids, self.config.vocab_size)?;
        let tokens = ids.dim(1)?;
        if tokens == 0 {
            bail!("no tokens for T5, which takes at least 1")
        }
        // The sum that runs through the blocks leaves the range of f16 and is rounded coarsely in bf16: it is f32 always.
        let x = self.shared.forward(ids)?.to_dtype(DType::F32)?; // [b, tokens, d_model]
        let bias = self.position_bias(tokens)?;
        let x = self.blocks.run(0..self.blocks.len(), x, |x, _, block| block.forward(&x, &bias))?;
        self.final_layer_norm.forward(&x)?.to_dtype(self.dtype)
    }

    /// What each query adds to its score for each key, by their distance: `[1, heads, tokens, tokens]`.
    fn position_bias(&self, tokens: usize) -> Result<Tensor> {
        let learned = &self.relative_attention_bias;
        // By key - query + tokens - 1. A query's row is the run from its first key's to its last key's.
        let by_distance: Vec<u32> = (0..2 * tokens - 1).map(|i| bucket(&self.config, tokens - 1, i)).collect();
        let mut buckets = Vec::with_capacity(tokens * tokens);
        for query in 0..tokens {
            buckets.extend_from_slice(&by_distance[tokens - 1 - query..][..tokens]);
        }
        // Looked up where it is needed: for T5 v1.1 XXL and 512 tokens it is 64 times as large as the buckets' numbers.
        let buckets = Tensor::from_vec(buckets, tokens * tokens, &Device::Cpu)?.to_device(learned.device())?;
        let bias = learned.t()?.contiguous()?.index_select(&buckets, 1)?; // [heads, tokens * tokens]
        bias.reshape((1, self.config.num_heads, tokens, tokens))
    }
}

/// Which of the learned biases a pair of positions has: half of the buckets for keys behind the query, half for keys
/// after it; in each half the first half for one distance each, the others growing logarithmically up to the maximum.
///
/// Source: `T5Attention._relative_position_bucket`, computed in f32 as there, so that distances on the edge of a bucket
/// fall on the same side.
fn bucket(config: &T5Config, query: usize, key: usize) -> u32 {
    let buckets = config.relative_attention_num_buckets / 2;
    let side = if key > query { buckets } else { 0 };
    let distance = key.abs_diff(query);
    let exact = buckets / 2;
    let within = if distance < exact {
        distance
    } else {
        let span = (config.relative_attention_max_distance as f64 / exact as f64).ln() as f32;
        let steps = (distance as f32 / exact as f32).ln() / span * (buckets - exact) as f32;
        (exact + steps as usize).min(buckets - 1)
    };
    (side + within) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_fall_into_the_references_buckets() {
        let config = T5Config {
            vocab_size: 1,
            d_model: 1,
            d_kv: 1,
            d_ff: 1,
            num_layers: 1,
            num_heads: 1,
            relative_attention_num_buckets: 32,
            relative_attention_max_distance: 128,
            layer_norm_epsilon: 1e-6,
            feed_forward_proj: GATED_GELU.to_string(),
        };
        // The first distance of each bucket from the eighth on, by transformers' `_relative_position_bucket`.
        let firsts = [8, 12, 16, 23, 32, 46, 64, 91];
        for distance in 0..600 {
            let expected = if distance < 8 { distance } else { 7 + firsts.iter().filter(|&&f| f <= distance).count() };
            assert_eq!(bucket(&config, 600, 600 - distance), expected as u32, "{distance} before");
            if distance > 0 {
                assert_eq!(bucket(&config, 0, distance), 16 + expected as u32, "{distance} after");
            }
        }
    }
}
