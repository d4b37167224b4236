//! The FLUX.1 flow transformer: from noisy latent tokens, a prompt and a reference image to a velocity.
//!
//! Source: diffusers, `FluxTransformer2DModel`; Black Forest Labs, `flux/model.py`.

use candle_core::{DType, Module, Tensor};
use retouch_kernels::{Kernels, Rotation};
use retouch_weights::{Linear, Result, Weights};

use crate::{
    FluxConfig, ModulationTable, StepCache,
    blocks::{DoubleBlock, SingleBlock},
    rotary::rotation,
    tokens::{image_positions, text_positions},
};

/// The transformer without its modulation layers, whose results come as a [`ModulationTable`].
pub struct FluxTransformer {
    config: FluxConfig,
    dtype: DType,
    kernels: &'static dyn Kernels,
    img_in: Linear,
    txt_in: Linear,
    double_blocks: Vec<DoubleBlock>,
    single_blocks: Vec<SingleBlock>,
    final_linear: Linear,
}

/// All that stays the same over the steps of an edit, for one prompt.
pub struct Conditioning {
    /// Projected prompt `[1, text tokens, hidden]`.
    text: Tensor,
    /// Projected reference image `[1, reference tokens, hidden]`.
    reference: Option<Tensor>,
    rotation: Rotation,
    modulation: ModulationTable,
}

/// A reference image as tokens, with its size in tokens.
pub struct Reference<'a> {
    /// `[1, rows * columns, in_channels]`.
    pub tokens: &'a Tensor,
    pub rows: usize,
    pub columns: usize,
}

impl FluxTransformer {
    /// Reads everything but the modulation layers.
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        let hidden = config.hidden();
        let (double, single) = (weights.pp("double_blocks"), weights.pp("single_blocks"));
        Ok(Self {
            config: config.clone(),
            dtype: weights.dtype(),
            kernels: weights.kernels(),
            img_in: Linear::load(&weights.pp("img_in"), config.in_channels, hidden)?,
            txt_in: Linear::load(&weights.pp("txt_in"), config.joint_attention_dim, hidden)?,
            double_blocks: (0..config.num_layers)
                .map(|i| DoubleBlock::load(&double.pp(i), config))
                .collect::<Result<_>>()?,
            single_blocks: (0..config.num_single_layers)
                .map(|i| SingleBlock::load(&single.pp(i), config))
                .collect::<Result<_>>()?,
            final_linear: Linear::load(&weights.pp("final_layer").pp("linear"), hidden, config.in_channels)?,
        })
    }

    /// Does the work that does not depend on the step.
    ///
    /// `text` is the T5 embedding `[1, tokens, joint_attention_dim]`; the output has `rows` x `columns` tokens.
    pub fn condition(
        &self,
        text: &Tensor,
        reference: Option<Reference<'_>>,
        (rows, columns): (usize, usize),
        modulation: ModulationTable,
    ) -> candle_core::Result<Conditioning> {
        let mut positions = text_positions(text.dim(1)?);
        positions.extend(image_positions(0, rows, columns));
        if let Some(reference) = &reference {
            positions.extend(image_positions(1, reference.rows, reference.columns));
        }
        Ok(Conditioning {
            text: self.txt_in.forward(&text.to_dtype(self.dtype)?)?,
            reference: reference.map(|r| self.img_in.forward(&r.tokens.to_dtype(self.dtype)?)).transpose()?,
            rotation: rotation(&positions, self.config.axes_dims_rope, text.device())?,
            modulation,
        })
    }

    /// The velocity of `latents` `[1, tokens, in_channels]` at a step, same shape, both f32.
    pub fn velocity(&self, latents: &Tensor, c: &Conditioning, step: usize) -> candle_core::Result<Tensor> {
        self.velocity_cached(latents, c, step, &mut StepCache::default())
    }

    /// [`Self::velocity`], or something near it that costs little, as `cache` decides.
    pub fn velocity_cached(
        &self,
        latents: &Tensor,
        c: &Conditioning,
        step: usize,
        cache: &mut StepCache,
    ) -> candle_core::Result<Tensor> {
        let latent_tokens = latents.dim(1)?;
        let outputs = |image: &Tensor| image.narrow(1, 0, latent_tokens); // the reference's tokens come after them
        let latents = self.img_in.forward(&latents.to_dtype(self.dtype)?)?;
        let image = match &c.reference {
            Some(reference) => Tensor::cat(&[&latents, reference], 1)?,
            None => latents,
        };
        let x = if self.double_blocks.is_empty() {
            self.single_blocks(&image, &c.text, latent_tokens, c, step)?
        } else {
            let (first, text) = self.double_block(0, &image, &c.text, c, step)?;
            cache.tokens(&outputs(&image)?, &outputs(&first)?, || {
                let (mut image, mut text) = (first.clone(), text);
                for i in 1..self.double_blocks.len() {
                    (image, text) = self.double_block(i, &image, &text, c, step)?;
                }
                self.single_blocks(&image, &text, latent_tokens, c, step)
            })?
        };
        let (shift, scale) = c.modulation.last(step)?;
        self.final_linear.forward(&self.kernels.modulated_norm(&x, &shift, &scale)?)?.to_dtype(DType::F32)
    }

    /// Image and text tokens after double block `i`.
    fn double_block(
        &self,
        i: usize,
        image: &Tensor,
        text: &Tensor,
        c: &Conditioning,
        step: usize,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let modulation = (c.modulation.double_image(i, step)?, c.modulation.double_text(i, step)?);
        let (image, text) = self.double_blocks[i].forward(image, text, &c.rotation, &modulation.0, &modulation.1)?;
        Ok((image, clip_f16(text)?))
    }

    /// The output image's tokens after all single blocks: the first `latent_tokens` of `image`.
    fn single_blocks(
        &self,
        image: &Tensor,
        text: &Tensor,
        latent_tokens: usize,
        c: &Conditioning,
        step: usize,
    ) -> candle_core::Result<Tensor> {
        let text_tokens = text.dim(1)?;
        let outputs = text_tokens..text_tokens + latent_tokens;
        let mut x = Tensor::cat(&[text, image], 1)?;
        for (i, block) in self.single_blocks.iter().enumerate() {
            let modulation = c.modulation.single(i, step)?;
            x = clip_f16(if i + 1 < self.single_blocks.len() {
                block.forward(&x, &c.rotation, &modulation)?
            } else {
                block.forward_for(outputs.clone(), &x, &c.rotation, &modulation)?
            })?;
        }
        if self.single_blocks.is_empty() { x.narrow(1, outputs.start, outputs.len()) } else { Ok(x) }
    }
}

/// In f16 the reference keeps activations finite by clipping them; other dtypes have the range.
fn clip_f16(x: Tensor) -> candle_core::Result<Tensor> {
    if x.dtype() == DType::F16 { x.clamp(-65504f32, 65504f32) } else { Ok(x) }
}
