//! The FLUX.1 flow transformer: from noisy latent tokens, a prompt and a reference image to a velocity.
//!
//! Source: diffusers, `FluxTransformer2DModel`; Black Forest Labs, `flux/model.py`.

use std::ops::Range;

use candle_core::{DType, Module, Tensor, bail};
use retouch_kernels::{Kernels, Rotation, clamp};
use retouch_weights::{Layers, Linear, Result, Stay, Weights};

use crate::{
    FluxConfig, ModulationTable, Saving, StepCache,
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
    /// The double blocks, then the single ones.
    blocks: Layers<Block>,
    final_linear: Linear,
    /// Tokens that an MLP takes at a time.
    mlp_tokens: usize,
}

enum Block {
    Double(Box<DoubleBlock>),
    Single(Box<SingleBlock>),
}

/// The tokens on their way through the blocks: apart in double blocks, in single blocks one stream, the text first.
enum Tokens {
    Apart { image: Tensor, text: Tensor },
    Joined(Tensor),
}

impl Tokens {
    fn joined(self) -> candle_core::Result<Tensor> {
        match self {
            Self::Apart { image, text } => Tensor::cat(&[&text, &image], 1),
            Self::Joined(x) => Ok(x),
        }
    }
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
    /// Reads everything but the modulation layers, to stay in memory.
    pub fn load(weights: &Weights, config: &FluxConfig) -> Result<Self> {
        Self::load_saving(weights, config, Saving::default())
    }

    /// The same, with less in memory.
    pub fn load_saving(weights: &Weights, config: &FluxConfig, saving: Saving) -> Result<Self> {
        let hidden = config.hidden();
        let (in_channels, joint) = (config.in_channels, config.joint_attention_dim);
        let stay = Stay { resident: saving.resident_blocks, on_host: saving.blocks_on_host, for_one_request: true };
        let block = {
            let config = config.clone();
            move |weights: &Weights, i: usize| match i.checked_sub(config.num_layers) {
                None => DoubleBlock::load(&weights.pp("double_blocks").pp(i), &config)
                    .map(|block| Block::Double(Box::new(block))),
                Some(i) => SingleBlock::load(&weights.pp("single_blocks").pp(i), &config)
                    .map(|block| Block::Single(Box::new(block))),
            }
        };
        Ok(Self {
            config: config.clone(),
            dtype: weights.dtype(),
            kernels: weights.kernels(),
            img_in: Linear::load(&weights.pp("img_in"), in_channels, hidden)?,
            txt_in: Linear::load(&weights.pp("txt_in"), joint, hidden)?,
            final_linear: Linear::load(&weights.pp("final_layer").pp("linear"), hidden, in_channels)?,
            blocks: Layers::load(weights, config.num_layers + config.num_single_layers, stay, block)?,
            mlp_tokens: saving.mlp_tokens.unwrap_or(usize::MAX).max(1),
        })
    }

    /// The same blocks with MLPs that take another number of tokens at a time; all if none is said.
    pub fn with_mlp_tokens(self, mlp_tokens: Option<usize>) -> Self {
        Self { mlp_tokens: mlp_tokens.unwrap_or(usize::MAX).max(1), ..self }
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
        let outputs = |tokens: &Tensor| tokens.narrow(1, 0, latent_tokens); // the reference's tokens come after them
        let image = {
            let latents = self.img_in.forward(&latents.to_dtype(self.dtype)?)?;
            match &c.reference {
                Some(reference) => Tensor::cat(&[&latents, reference], 1)?,
                None => latents,
            }
        };
        let text = c.text.clone();
        let x = if self.config.num_layers == 0 || cache.is_off() {
            self.rest(Tokens::Apart { image, text }, 0, latent_tokens, c, step)?
        } else {
            // The first block alone tells whether the others are needed.
            let before = outputs(&image)?;
            let first = self.run(0..1, Tokens::Apart { image, text }, latent_tokens, c, step)?;
            let Tokens::Apart { image, .. } = &first else { bail!("the first block is no double block") };
            let after = outputs(image)?;
            cache.tokens(&before, &after, || self.rest(first, 1, latent_tokens, c, step))?
        };
        let (shift, scale) = c.modulation.last(step)?;
        self.final_linear.forward(&self.kernels.modulated_norm(&x, &shift, &scale)?)?.to_dtype(DType::F32)
    }

    /// The output image's tokens after all blocks from `first` on.
    fn rest(
        &self,
        tokens: Tokens,
        first: usize,
        latent_tokens: usize,
        c: &Conditioning,
        step: usize,
    ) -> candle_core::Result<Tensor> {
        let x = self.run(first..self.blocks.len(), tokens, latent_tokens, c, step)?.joined()?;
        if self.config.num_single_layers > 0 {
            return Ok(x); // the last single block computes no others
        }
        x.narrow(1, c.text.dim(1)?, latent_tokens)
    }

    /// Takes the tokens through some of the blocks.
    fn run(
        &self,
        blocks: Range<usize>,
        tokens: Tokens,
        latent_tokens: usize,
        c: &Conditioning,
        step: usize,
    ) -> candle_core::Result<Tokens> {
        let (double_blocks, mlp_tokens) = (self.config.num_layers, self.mlp_tokens);
        self.blocks.run(blocks, tokens, |tokens, i, block| match (block, tokens) {
            (Block::Double(block), Tokens::Apart { image, text }) => {
                let (m_image, m_text) = (c.modulation.double_image(i, step)?, c.modulation.double_text(i, step)?);
                let (image, text) = block.forward(image, text, &c.rotation, &m_image, &m_text, mlp_tokens)?;
                Ok(Tokens::Apart { image, text: clip_f16(text)? })
            }
            (Block::Double(_), Tokens::Joined(_)) => bail!("a double block after a single one"),
            (Block::Single(block), tokens) => {
                let (x, m) = (tokens.joined()?, c.modulation.single(i - double_blocks, step)?);
                let x = if i + 1 < self.blocks.len() {
                    block.forward(&x, &c.rotation, &m, mlp_tokens)?
                } else {
                    let text_tokens = c.text.dim(1)?;
                    let outputs = text_tokens..text_tokens + latent_tokens;
                    block.forward_for(outputs, &x, &c.rotation, &m, mlp_tokens)?
                };
                Ok(Tokens::Joined(clip_f16(x)?))
            }
        })
    }
}

/// In f16 the reference keeps activations finite by clipping them; other dtypes have the range.
fn clip_f16(x: Tensor) -> candle_core::Result<Tensor> {
    if x.dtype() == DType::F16 { clamp(&x, -65504.0, 65504.0) } else { Ok(x) }
}
