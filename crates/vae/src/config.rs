use candle_core::{DType, Device};
use retouch_weights::{Result, VaeShape, Weights, WeightsError};
use serde::Deserialize;

/// What `vae/config.json` says; the names and the defaults of absent values are diffusers'
/// (`AutoencoderKL.__init__` in `models/autoencoders/autoencoder_kl.py`).
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default)]
pub struct VaeConfig {
    pub in_channels: usize,
    pub out_channels: usize,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    /// Channels at each resolution, the full one first; each further one has half the width and height.
    pub block_out_channels: Vec<usize>,
    pub layers_per_block: usize,
    pub act_fn: String,
    pub latent_channels: usize,
    pub norm_num_groups: usize,
    /// Latents leave the encoder as `(z - shift_factor) * scaling_factor`.
    pub scaling_factor: f64,
    pub shift_factor: Option<f64>,
    pub latents_mean: Option<Vec<f64>>,
    pub latents_std: Option<Vec<f64>>,
    /// The activations overflow f16.
    pub force_upcast: bool,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
}

impl Default for VaeConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec![DOWN_BLOCK.to_string()],
            up_block_types: vec![UP_BLOCK.to_string()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".to_string(),
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

const DOWN_BLOCK: &str = "DownEncoderBlock2D";
const UP_BLOCK: &str = "UpDecoderBlock2D";

/// Bounds on what a file may ask for, far above any real model: they keep sizes computed from them from overflowing.
const MAX_CHANNELS: usize = 1 << 16;
const MAX_LEVELS: usize = 8;
const MAX_LAYERS: usize = 64;

impl VaeConfig {
    /// The autoencoder of FLUX.1.
    ///
    /// Source: `vae/config.json` of the black-forest-labs/FLUX.1-Kontext-dev repository.
    pub fn flux() -> Self {
        Self {
            down_block_types: vec![DOWN_BLOCK.to_string(); 4],
            up_block_types: vec![UP_BLOCK.to_string(); 4],
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            scaling_factor: 0.3611,
            shift_factor: Some(0.1159),
            use_quant_conv: false,
            use_post_quant_conv: false,
            ..Self::default()
        }
    }

    /// The sizes of a single file, which brings no configuration; the rest (groups, scaling, shift) as in FLUX.1.
    ///
    /// # Errors
    /// Those of [`VaeShape::of`] and [`Self::check`].
    pub fn of(weights: &Weights) -> Result<Self> {
        let shape = VaeShape::of(weights)?;
        let config = Self {
            in_channels: shape.image_channels,
            out_channels: shape.image_channels,
            down_block_types: vec![DOWN_BLOCK.to_string(); shape.channels.len()],
            up_block_types: vec![UP_BLOCK.to_string(); shape.channels.len()],
            block_out_channels: shape.channels,
            layers_per_block: shape.layers_per_block,
            latent_channels: shape.latent_channels,
            ..Self::flux()
        };
        config.check(&weights.store().describe())?;
        Ok(config)
    }

    /// Pixels per latent along each side: `2^(levels - 1)`, 8 for FLUX.1.
    pub fn spatial_factor(&self) -> usize {
        1 << self.block_out_channels.len().saturating_sub(1).min(MAX_LEVELS)
    }

    /// Refuses what this implementation does not compute; `file` names the configuration in the message.
    pub fn check(&self, file: &str) -> Result<()> {
        match self.problem() {
            None => Ok(()),
            Some(reason) => Err(WeightsError::Unsupported { what: file.to_string(), reason }),
        }
    }

    fn problem(&self) -> Option<String> {
        let levels = self.block_out_channels.len();
        let bounds = [
            ("in_channels", self.in_channels, MAX_CHANNELS),
            ("out_channels", self.out_channels, MAX_CHANNELS),
            ("latent_channels", self.latent_channels, MAX_CHANNELS),
            ("layers_per_block", self.layers_per_block, MAX_LAYERS),
            ("norm_num_groups", self.norm_num_groups, MAX_CHANNELS),
            ("the length of block_out_channels", levels, MAX_LEVELS),
        ];
        for (name, value, max) in bounds {
            if !(1..=max).contains(&value) {
                return Some(format!("{name} is {value}; supported are 1 to {max}"));
            }
        }
        for &channels in &self.block_out_channels {
            if channels == 0 || channels > MAX_CHANNELS || !channels.is_multiple_of(self.norm_num_groups) {
                return Some(format!(
                    "block_out_channels has {channels}, which is not a multiple of norm_num_groups ({}) up to {MAX_CHANNELS}",
                    self.norm_num_groups
                ));
            }
        }
        for (name, types, expected) in [
            ("down_block_types", &self.down_block_types, DOWN_BLOCK),
            ("up_block_types", &self.up_block_types, UP_BLOCK),
        ] {
            if types.len() != levels || types.iter().any(|found| found != expected) {
                return Some(format!("{name} is {types:?}; supported is `{expected}` for each of the {levels} levels"));
            }
        }
        if self.act_fn != "silu" {
            return Some(format!("act_fn is `{}`; supported is `silu`", self.act_fn));
        }
        if self.use_quant_conv || self.use_post_quant_conv {
            return Some(
                "use_quant_conv or use_post_quant_conv is on (both are where the file leaves them out), as for \
                 Stable Diffusion; supported is FLUX.1's autoencoder, which has both off"
                    .to_string(),
            );
        }
        if self.latents_mean.is_some() || self.latents_std.is_some() {
            return Some("latents_mean and latents_std are set; supported are scaling_factor and shift_factor".into());
        }
        if !(self.scaling_factor.is_finite() && self.scaling_factor != 0.0 && self.shift().is_finite()) {
            return Some(format!(
                "scaling_factor is {} and shift_factor {}; both must be numbers, the first not 0",
                self.scaling_factor,
                self.shift()
            ));
        }
        None
    }

    /// What is subtracted from latents before scaling; diffusers' pipelines take an absent value as 0.
    pub(crate) fn shift(&self) -> f64 {
        self.shift_factor.unwrap_or(0.0)
    }

    /// The weights in the dtype that the autoencoder computes in (see the crate's documentation).
    pub(crate) fn in_compute_dtype(&self, weights: &Weights) -> Weights {
        let f16_overflows = self.force_upcast && weights.dtype() == DType::F16;
        if matches!(weights.device(), Device::Cpu) || f16_overflows {
            weights.with_dtype(DType::F32)
        } else {
            weights.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(change: impl FnOnce(&mut VaeConfig)) -> String {
        let mut config = VaeConfig::flux();
        change(&mut config);
        config.check("vae/config.json").map_or_else(|e| e.to_string(), |()| "none".to_string())
    }

    #[test]
    fn flux_is_supported() {
        assert_eq!(problem(|_| ()), "none");
        assert_eq!(VaeConfig::flux().spatial_factor(), 8);
    }

    #[test]
    fn values_that_cannot_work_are_refused_with_their_name() {
        assert!(problem(|c| c.norm_num_groups = 0).contains("norm_num_groups is 0"));
        assert!(problem(|c| c.norm_num_groups = 7).contains("not a multiple of norm_num_groups (7)"));
        assert!(problem(|c| c.layers_per_block = usize::MAX).contains("layers_per_block"));
        assert!(problem(|c| c.block_out_channels.clear()).contains("block_out_channels"));
        assert!(problem(|c| c.block_out_channels = vec![1 << 40; 4]).contains("block_out_channels"));
        assert!(problem(|c| c.block_out_channels = vec![32; 100]).contains("block_out_channels"));
        assert!(problem(|c| c.scaling_factor = 0.0).contains("scaling_factor"));
        assert!(problem(|c| c.shift_factor = Some(f64::NAN)).contains("shift_factor"));
    }

    #[test]
    fn what_is_not_computed_is_refused_by_name() {
        assert!(problem(|c| c.act_fn = "relu".into()).contains("`relu`"));
        assert!(problem(|c| c.use_quant_conv = true).contains("use_quant_conv"));
        assert!(problem(|c| c.latents_mean = Some(vec![0.0])).contains("latents_mean"));
        assert!(
            problem(|c| c.down_block_types[1] = "AttnDownEncoderBlock2D".into()).contains("AttnDownEncoderBlock2D")
        );
        assert!(problem(|c| c.up_block_types.truncate(3)).contains("up_block_types"));
    }
}
