//! The blocks that encoder and decoder are built from.

use candle_core::{Module, Result, Tensor};
use retouch_kernels::{Kernels, Window};
use retouch_weights::{Linear, Weights};

use crate::{Tiling, VaeConfig, conv::Conv2d, norm::GroupNorm};

/// Two convolutions beside a shortcut.
///
/// Source: `ResnetBlock2D` without time embedding in diffusers' `models/resnet.py`.
pub struct Resnet {
    norm1: GroupNorm,
    conv1: Conv2d,
    norm2: GroupNorm,
    conv2: Conv2d,
    /// Brings the input to the output's channels where they differ.
    shortcut: Option<Conv2d>,
}

impl Resnet {
    pub fn load(weights: &Weights, config: &VaeConfig, input: usize, output: usize) -> retouch_weights::Result<Self> {
        let groups = config.norm_num_groups;
        let shortcut = match input == output {
            true => None,
            false => Some(Conv2d::load(&weights.pp("conv_shortcut"), input, output, Window::Point)?),
        };
        Ok(Self {
            norm1: GroupNorm::load(&weights.pp("norm1"), groups, input)?,
            conv1: Conv2d::load(&weights.pp("conv1"), input, output, Window::Same)?,
            norm2: GroupNorm::load(&weights.pp("norm2"), groups, output)?,
            conv2: Conv2d::load(&weights.pp("conv2"), output, output, Window::Same)?,
            shortcut,
        })
    }

    /// `[b, input, h, w]` to `[b, output, h, w]`.
    pub fn forward(&self, x: Tensor, tiling: &Tiling) -> Result<Tensor> {
        let y = tiling.layer(&x, Some(&self.norm1), &self.conv1)?;
        tiling.finish(y, &self.norm2, &self.conv2, x, self.shortcut.as_ref())
    }
}

/// Self-attention of all pixels with a single head as wide as the channels.
///
/// Source: `Attention` with `residual_connection=True` in diffusers' `models/attention_processor.py`, as the middle
/// block of `models/unets/unet_2d_blocks.py` makes it.
pub struct Attention {
    kernels: &'static dyn Kernels,
    group_norm: GroupNorm,
    to_q: Linear,
    to_k: Linear,
    to_v: Linear,
    to_out: Linear,
}

impl Attention {
    pub fn load(weights: &Weights, config: &VaeConfig, channels: usize) -> retouch_weights::Result<Self> {
        let linear = |name: &str| Linear::load(&weights.pp(name), channels, channels);
        Ok(Self {
            kernels: weights.kernels(),
            group_norm: GroupNorm::load(&weights.pp("group_norm"), config.norm_num_groups, channels)?,
            to_q: linear("to_q")?,
            to_k: linear("to_k")?,
            to_v: linear("to_v")?,
            to_out: linear("to_out.0")?,
        })
    }

    /// `[b, c, h, w]` to the same.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (_, channels, _, _) = x.dims4()?;
        let tokens = self.group_norm.forward(x)?.flatten_from(2)?.transpose(1, 2)?.contiguous()?; // [b, h * w, c]
        let one_head = |linear: &Linear| linear.forward(&tokens)?.unsqueeze(2); // [b, h * w, 1, c]
        let (q, k, v) = (one_head(&self.to_q)?, one_head(&self.to_k)?, one_head(&self.to_v)?);
        let y = self.kernels.attention(&q, &k, &v, None, (channels as f64).powf(-0.5))?;
        let y = self.to_out.forward(&y)?; // [b, h * w, c]
        x + y.transpose(1, 2)?.reshape(x.shape())?
    }
}

/// The blocks at the lowest resolution: resnet, attention, resnet.
pub struct MidBlock {
    first: Resnet,
    attention: Option<Attention>,
    second: Resnet,
}

impl MidBlock {
    pub fn load(weights: &Weights, config: &VaeConfig, channels: usize) -> retouch_weights::Result<Self> {
        let attention = match config.mid_block_add_attention {
            true => Some(Attention::load(&weights.pp("attentions.0"), config, channels)?),
            false => None,
        };
        Ok(Self {
            first: Resnet::load(&weights.pp("resnets.0"), config, channels, channels)?,
            attention,
            second: Resnet::load(&weights.pp("resnets.1"), config, channels, channels)?,
        })
    }

    /// `[b, channels, h, w]` to the same; always at once, as every pixel attends to all.
    pub fn forward(&self, x: Tensor) -> Result<Tensor> {
        let x = self.first.forward(x, &Tiling::Whole)?;
        let x = match &self.attention {
            Some(attention) => attention.forward(&x)?,
            None => x,
        };
        self.second.forward(x, &Tiling::Whole)
    }
}

/// Resnets at one resolution of the encoder, then a step down to half of it.
pub struct DownBlock {
    resnets: Vec<Resnet>,
    downsample: Option<Conv2d>,
}

impl DownBlock {
    /// `last` is the lowest resolution, with no step down after it.
    pub fn load(
        weights: &Weights,
        config: &VaeConfig,
        input: usize,
        output: usize,
        last: bool,
    ) -> retouch_weights::Result<Self> {
        let downsample = match last {
            true => None,
            false => Some(Conv2d::load(&weights.pp("downsamplers.0.conv"), output, output, Window::Halving)?),
        };
        Ok(Self { resnets: resnets(weights, config, config.layers_per_block, input, output)?, downsample })
    }

    /// `[b, input, h, w]` to `[b, output, h / 2, w / 2]`, or with the size kept for the last one.
    pub fn forward(&self, x: Tensor, tiling: &Tiling) -> Result<Tensor> {
        let x = self.resnets.iter().try_fold(x, |x, resnet| resnet.forward(x, tiling))?;
        match &self.downsample {
            Some(conv) => tiling.layer(&x, None, conv),
            None => Ok(x),
        }
    }
}

/// Resnets at one resolution of the decoder, then a step up to twice of it.
pub struct UpBlock {
    resnets: Vec<Resnet>,
    upsample: Option<Conv2d>,
}

impl UpBlock {
    /// `last` is the full resolution, with no step up after it.
    pub fn load(
        weights: &Weights,
        config: &VaeConfig,
        input: usize,
        output: usize,
        last: bool,
    ) -> retouch_weights::Result<Self> {
        let upsample = match last {
            true => None,
            false => Some(Conv2d::load(&weights.pp("upsamplers.0.conv"), output, output, Window::Doubling)?),
        };
        // One more than the encoder: `UpDecoderBlock2D` gets `num_layers=layers_per_block + 1`.
        Ok(Self { resnets: resnets(weights, config, config.layers_per_block + 1, input, output)?, upsample })
    }

    /// `[b, input, h, w]` to `[b, output, 2 * h, 2 * w]`, or with the size kept for the last one.
    pub fn forward(&self, x: Tensor, tiling: &Tiling) -> Result<Tensor> {
        let x = self.resnets.iter().try_fold(x, |x, resnet| resnet.forward(x, tiling))?;
        match &self.upsample {
            Some(conv) => tiling.layer(&x, None, conv),
            None => Ok(x),
        }
    }
}

/// `count` resnets in a row, the first of them from `input` channels to `output`.
fn resnets(
    weights: &Weights,
    config: &VaeConfig,
    count: usize,
    input: usize,
    output: usize,
) -> retouch_weights::Result<Vec<Resnet>> {
    let weights = weights.pp("resnets");
    (0..count).map(|i| Resnet::load(&weights.pp(i), config, if i == 0 { input } else { output }, output)).collect()
}
