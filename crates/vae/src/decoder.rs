use candle_core::{DType, Tensor};
use retouch_kernels::Window;
use retouch_weights::Weights;

use crate::{
    Tiling, VaeConfig,
    blocks::{MidBlock, UpBlock},
    conv::Conv2d,
    norm::GroupNorm,
};

/// From latents to pixels.
///
/// Source: `Decoder` in diffusers' `models/autoencoders/vae.py`.
pub struct VaeDecoder {
    config: VaeConfig,
    dtype: DType,
    tiling: Tiling,
    conv_in: Conv2d,
    mid_block: MidBlock,
    up_blocks: Vec<UpBlock>,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl VaeDecoder {
    /// `weights` is the root of the autoencoder's parameters (`decoder.conv_in.weight`, …).
    ///
    /// # Errors
    /// A parameter that is missing or of another shape, and those of [`VaeConfig::check`].
    pub fn load(weights: &Weights, config: &VaeConfig) -> retouch_weights::Result<Self> {
        config.check("the autoencoder's configuration")?;
        let weights = config.in_compute_dtype(weights).pp("decoder");
        // From the lowest resolution to the full one.
        let channels: Vec<usize> = config.block_out_channels.iter().rev().copied().collect();
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let up_blocks = (0..channels.len()).map(|level| {
            let input = channels[level.saturating_sub(1)];
            let is_last = level + 1 == channels.len();
            UpBlock::load(&weights.pp("up_blocks").pp(level), config, input, channels[level], is_last)
        });
        Ok(Self {
            conv_in: Conv2d::load(&weights.pp("conv_in"), config.latent_channels, first, Window::Same)?,
            mid_block: MidBlock::load(&weights.pp("mid_block"), config, first)?,
            up_blocks: up_blocks.collect::<retouch_weights::Result<_>>()?,
            conv_norm_out: GroupNorm::load(&weights.pp("conv_norm_out"), config.norm_num_groups, last)?,
            conv_out: Conv2d::load(&weights.pp("conv_out"), last, config.out_channels, Window::Same)?,
            dtype: weights.dtype(),
            tiling: Tiling::Whole,
            config: config.clone(),
        })
    }

    /// The same, going over images in another way than at once.
    pub fn with_tiling(self, tiling: Tiling) -> Self {
        Self { tiling, ..self }
    }

    /// The image of latents as the flow transformer makes them (shifted and scaled).
    ///
    /// `latents` `[b, latent_channels, h, w]`; returns `[b, out_channels, h * f, w * f]` in the dtype of `latents`,
    /// about [-1, 1] (not clamped), where `f` is [`VaeConfig::spatial_factor`].
    ///
    /// Source: the end of `__call__` in diffusers' `pipelines/flux/pipeline_flux_kontext.py`.
    pub fn decode(&self, latents: &Tensor) -> candle_core::Result<Tensor> {
        let (_, channels, h, w) = latents.dims4()?;
        if channels != self.config.latent_channels || h == 0 || w == 0 {
            candle_core::bail!(
                "latents of {w}x{h} in {channels} channels cannot be decoded: it takes {} channels",
                self.config.latent_channels
            )
        }
        let z = ((latents.to_dtype(self.dtype)? / self.config.scaling_factor)? + self.config.shift())?;
        let tiling = &self.tiling;
        let x = tiling.at_home(self.mid_block.forward(self.conv_in.forward(&z)?)?)?;
        let x = self.up_blocks.iter().try_fold(x, |x, block| block.forward(x, tiling))?;
        let x = tiling.layer(&x, Some(&self.conv_norm_out), &self.conv_out)?;
        x.to_device(latents.device())?.to_dtype(latents.dtype())
    }
}
