use candle_core::{DType, Tensor};
use retouch_kernels::Window;
use retouch_weights::Weights;

use crate::{
    Tiling, VaeConfig,
    blocks::{DownBlock, MidBlock},
    conv::Conv2d,
    norm::GroupNorm,
};

/// From pixels to latents.
///
/// Source: `Encoder` in diffusers' `models/autoencoders/vae.py`.
pub struct VaeEncoder {
    config: VaeConfig,
    dtype: DType,
    tiling: Tiling,
    conv_in: Conv2d,
    down_blocks: Vec<DownBlock>,
    mid_block: MidBlock,
    conv_norm_out: GroupNorm,
    conv_out: Conv2d,
}

impl VaeEncoder {
    /// `weights` is the root of the autoencoder's parameters (`encoder.conv_in.weight`, …).
    ///
    /// # Errors
    /// A parameter that is missing or of another shape, and those of [`VaeConfig::check`].
    pub fn load(weights: &Weights, config: &VaeConfig) -> retouch_weights::Result<Self> {
        config.check("the autoencoder's configuration")?;
        let weights = config.in_compute_dtype(weights).pp("encoder");
        let channels = &config.block_out_channels;
        let (first, last) = (channels[0], channels[channels.len() - 1]);
        let down_blocks = (0..channels.len()).map(|level| {
            let input = channels[level.saturating_sub(1)];
            let is_last = level + 1 == channels.len();
            DownBlock::load(&weights.pp("down_blocks").pp(level), config, input, channels[level], is_last)
        });
        Ok(Self {
            conv_in: Conv2d::load(&weights.pp("conv_in"), config.in_channels, first, Window::Same)?,
            down_blocks: down_blocks.collect::<retouch_weights::Result<_>>()?,
            mid_block: MidBlock::load(&weights.pp("mid_block"), config, last)?,
            conv_norm_out: GroupNorm::load(&weights.pp("conv_norm_out"), config.norm_num_groups, last)?,
            // Mean and logarithm of the variance of each latent.
            conv_out: Conv2d::load(&weights.pp("conv_out"), last, 2 * config.latent_channels, Window::Same)?,
            dtype: weights.dtype(),
            tiling: Tiling::Whole,
            config: config.clone(),
        })
    }

    /// The same, going over images in another way than at once.
    pub fn with_tiling(self, tiling: Tiling) -> Self {
        Self { tiling, ..self }
    }

    /// The most likely latents of an image (the posterior's mode, no sample), shifted and scaled as the flow
    /// transformer expects them.
    ///
    /// `pixels` `[b, in_channels, h, w]` in [-1, 1], `h` and `w` multiples of [`VaeConfig::spatial_factor`] `f`;
    /// returns `[b, latent_channels, h / f, w / f]` in the dtype of `pixels`.
    ///
    /// Source: `_encode_vae_image` in diffusers' `pipelines/flux/pipeline_flux_kontext.py`.
    pub fn encode(&self, pixels: &Tensor) -> candle_core::Result<Tensor> {
        let (_, channels, h, w) = pixels.dims4()?;
        let (expected, factor) = (self.config.in_channels, self.config.spatial_factor());
        if channels != expected || h == 0 || w == 0 || !h.is_multiple_of(factor) || !w.is_multiple_of(factor) {
            candle_core::bail!(
                "an image of {w}x{h} pixels in {channels} channels cannot be encoded: it takes {expected} channels, \
                 and sides that are multiples of {factor}"
            )
        }
        let tiling = &self.tiling;
        let x = tiling.layer(&tiling.at_home(pixels.to_dtype(self.dtype)?)?, None, &self.conv_in)?;
        let x = self.down_blocks.iter().try_fold(x, |x, block| block.forward(x, tiling))?;
        let x = self.mid_block.forward(x.to_device(self.conv_in.device())?)?;
        let moments = self.conv_out.forward(&self.conv_norm_out.forward_silu(&x)?)?; // [b, 2 * latent, h / f, w / f]
        let mean = moments.narrow(1, 0, self.config.latent_channels)?;
        ((mean - self.config.shift())? * self.config.scaling_factor)?.to_dtype(pixels.dtype())
    }
}
