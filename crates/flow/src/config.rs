use retouch_weights::{FluxShape, Result, Weights, WeightsError};
use serde::Deserialize;

/// The sizes of a FLUX.1 transformer, as `transformer/config.json` of a diffusers folder has them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct FluxConfig {
    /// Channels of a packed latent token (64 in FLUX.1: 16 latent channels of a 2x2 patch).
    pub in_channels: usize,
    /// Double-stream blocks: text and image have their own weights and attend jointly.
    pub num_layers: usize,
    /// Single-stream blocks: one sequence, attention and MLP in parallel.
    pub num_single_layers: usize,
    pub attention_head_dim: usize,
    pub num_attention_heads: usize,
    /// Width of the T5 embeddings.
    pub joint_attention_dim: usize,
    /// Width of the pooled CLIP embedding.
    pub pooled_projection_dim: usize,
    /// Whether the distilled guidance scale is an input (dev and Kontext: yes, schnell: no).
    pub guidance_embeds: bool,
    /// Channels of a head given to the three position axes (image index, row, column).
    #[serde(default = "FluxConfig::real_axes")]
    pub axes_dims_rope: [usize; 3],
}

impl FluxConfig {
    /// The rotary axes of every published FLUX.1 model (head size 128).
    pub fn real_axes() -> [usize; 3] {
        [16, 56, 56]
    }

    /// FLUX.1 \[dev\] and FLUX.1 Kontext \[dev\].
    ///
    /// Source: `transformer/config.json` of the black-forest-labs/FLUX.1-Kontext-dev repository.
    pub fn dev() -> Self {
        Self {
            in_channels: 64,
            num_layers: 19,
            num_single_layers: 38,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: true,
            axes_dims_rope: Self::real_axes(),
        }
    }

    /// Reads the sizes off a single file's tensors.
    ///
    /// # Errors
    /// The rotary axes leave no trace in the shapes: only the published models' head size is known to go with
    /// [`Self::real_axes`].
    pub fn of(weights: &Weights) -> Result<Self> {
        let shape = FluxShape::of(weights)?;
        let refuse = |reason: String| WeightsError::Unsupported { what: weights.store().describe(), reason };
        if shape.head_dim == 0 || !shape.hidden.is_multiple_of(shape.head_dim) {
            return Err(refuse(format!(
                "a width of {} is no multiple of the head size {}",
                shape.hidden, shape.head_dim
            )));
        }
        if shape.head_dim != Self::real_axes().iter().sum::<usize>() {
            return Err(refuse(format!(
                "its heads have {} channels, not FLUX.1's 128; give the folder with its config.json by --model as well",
                shape.head_dim
            )));
        }
        Ok(Self {
            in_channels: shape.in_channels,
            num_layers: shape.double_blocks,
            num_single_layers: shape.single_blocks,
            attention_head_dim: shape.head_dim,
            num_attention_heads: shape.hidden / shape.head_dim,
            joint_attention_dim: shape.joint_dim,
            pooled_projection_dim: shape.pooled_dim,
            guidance_embeds: shape.guidance,
            axes_dims_rope: Self::real_axes(),
        })
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// Width inside the MLPs.
    pub fn mlp(&self) -> usize {
        4 * self.hidden()
    }

    /// Refuses sizes that no transformer can have; `file` is named in the message.
    pub fn check(&self, file: &str) -> Result<()> {
        let refuse = |reason: String| Err(WeightsError::Unsupported { what: file.to_string(), reason });
        for (name, value, limit) in [
            ("in_channels", self.in_channels, 1 << 16),
            ("attention_head_dim", self.attention_head_dim, 1 << 12),
            ("num_attention_heads", self.num_attention_heads, 1 << 12),
            ("joint_attention_dim", self.joint_attention_dim, 1 << 20),
            ("pooled_projection_dim", self.pooled_projection_dim, 1 << 20),
        ] {
            if value == 0 || value > limit {
                return refuse(format!("{name} is {value}; a FLUX transformer has 1 to {limit}"));
            }
        }
        if self.num_layers > 1000 || self.num_single_layers > 1000 {
            return refuse(format!("{} + {} blocks are too many", self.num_layers, self.num_single_layers));
        }
        if !self.in_channels.is_multiple_of(4) {
            return refuse(format!("in_channels is {}; a packed 2x2 patch needs a multiple of 4", self.in_channels));
        }
        let axes = self.axes_dims_rope;
        if axes.iter().any(|axis| axis % 2 != 0)
            || axes.iter().try_fold(0usize, |sum, &axis| sum.checked_add(axis)) != Some(self.attention_head_dim)
        {
            return refuse(format!(
                "the rotary axes {axes:?} are not even numbers that add up to the head size {}",
                self.attention_head_dim
            ));
        }
        Ok(())
    }
}
