//! Convolutions over images `[batch, channels, height, width]`.

use candle_core::{Result, Tensor};
use retouch_weights::Weights;

/// Where a 3x3 convolution puts its zero padding, and how far it steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// One pixel on each side, stride 1: the size stays.
    Same,
    /// One pixel to the right and below, stride 2: the size halves.
    Halving,
}

/// A 3x3 convolution with bias.
pub struct Conv3x3 {
    /// `[out, in, 3, 3]`
    weight: Tensor,
    /// `[1, out, 1, 1]`
    bias: Tensor,
    window: Window,
}

impl Conv3x3 {
    /// Reads `weight` `[out, in, 3, 3]` and `bias` `[out]`.
    pub fn load(weights: &Weights, input: usize, output: usize, window: Window) -> retouch_weights::Result<Self> {
        let weight = weights.get((output, input, 3, 3), "weight")?;
        let bias = weights.get(output, "bias")?.reshape((1, output, 1, 1))?;
        Ok(Self { weight, bias, window })
    }

    /// `[b, in, h, w]` to `[b, out, h, w]`, or half of the height and width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = match self.window {
            Window::Same => x.conv2d(&self.weight, 1, 1, 1, 1)?,
            Window::Halving => {
                let x = x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?;
                x.conv2d(&self.weight, 0, 2, 1, 1)?
            }
        };
        x.broadcast_add(&self.bias)
    }
}

/// A 1x1 convolution with bias: a matrix over the channels of each pixel.
pub struct Conv1x1 {
    /// `[out, in]`
    weight: Tensor,
    /// `[1, out, 1]`
    bias: Tensor,
}

impl Conv1x1 {
    /// Reads `weight` `[out, in, 1, 1]` and `bias` `[out]`.
    pub fn load(weights: &Weights, input: usize, output: usize) -> retouch_weights::Result<Self> {
        let weight = weights.get((output, input, 1, 1), "weight")?.reshape((output, input))?;
        let bias = weights.get(output, "bias")?.reshape((1, output, 1))?;
        Ok(Self { weight, bias })
    }

    /// `[b, in, h, w]` to `[b, out, h, w]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, _, h, w) = x.dims4()?;
        let x = x.flatten_from(2)?; // [b, in, h * w]
        self.weight.broadcast_matmul(&x)?.broadcast_add(&self.bias)?.reshape((b, (), h, w))
    }
}
