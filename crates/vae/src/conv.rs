//! Convolutions over images `[batch, channels, height, width]`.

use candle_core::{Device, Result, Tensor};
use retouch_weights::Weights;

use crate::cpu;

/// What a convolution sees of its input for each pixel of its output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// The same pixel: 1x1.
    Point,
    /// The same pixel and those around it: 3x3, padded by one zero on each side.
    Same,
    /// 3x3 at every second pixel, padded by one zero to the right and below: half the size.
    Halving,
    /// As `Same`, over the input with each pixel repeated twice in each direction: twice the size.
    Doubling,
}

impl Window {
    /// Weights along each side.
    pub fn kernel(self) -> usize {
        if self == Self::Point { 1 } else { 3 }
    }

    /// The height (or width) of the output for that of the input.
    pub fn out_size(self, size: usize) -> usize {
        match self {
            Self::Point | Self::Same => size,
            Self::Halving => size / 2,
            Self::Doubling => 2 * size,
        }
    }

    /// The row (or column), of `size`, that weight `tap` meets for the output's row (or column) `out`; none is padding.
    pub fn source(self, out: usize, tap: usize, size: usize) -> Option<usize> {
        let source = match self {
            Self::Point => Some(out),
            Self::Same => (out + tap).checked_sub(1),
            Self::Halving => Some(2 * out + tap),
            Self::Doubling => (out + tap).checked_sub(1).map(|source| source / 2),
        };
        source.filter(|&source| source < size)
    }
}

/// A convolution with bias.
pub struct Conv2d {
    /// `[out, in, k, k]`
    weight: Tensor,
    /// `[out]`
    bias: Tensor,
    window: Window,
}

impl Conv2d {
    /// Reads `weight` `[output, input, k, k]` and `bias` `[output]`.
    pub fn load(weights: &Weights, input: usize, output: usize, window: Window) -> retouch_weights::Result<Self> {
        let weight = weights.get((output, input, window.kernel(), window.kernel()), "weight")?;
        Ok(Self { weight, bias: weights.get(output, "bias")?, window })
    }

    /// `[b, input, h, w]` to `[b, output, h, w]`, with half or twice the height and width as the window says.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.compute(x, None)
    }

    /// The same plus `residual`, which has the output's shape.
    pub fn forward_plus(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.compute(x, Some(residual))
    }

    fn compute(&self, x: &Tensor, residual: Option<&Tensor>) -> Result<Tensor> {
        if matches!(x.device(), Device::Cpu) {
            return cpu::conv2d(x, &self.weight, &self.bias, residual, self.window);
        }
        let y = match self.window {
            Window::Point => x.conv2d(&self.weight, 0, 1, 1, 1)?,
            Window::Same => x.conv2d(&self.weight, 1, 1, 1, 1)?,
            Window::Halving => x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?.conv2d(&self.weight, 0, 2, 1, 1)?,
            Window::Doubling => {
                let (_, _, h, w) = x.dims4()?;
                x.upsample_nearest2d(2 * h, 2 * w)?.conv2d(&self.weight, 1, 1, 1, 1)?
            }
        };
        let y = y.broadcast_add(&self.bias.reshape((1, (), 1, 1))?)?;
        match residual {
            Some(residual) => y + residual,
            None => Ok(y),
        }
    }
}
