//! Convolutions over images `[batch, channels, height, width]`.

use candle_core::{Device, Result, Tensor};
use retouch_kernels::{Kernels, Window};
use retouch_weights::Weights;

/// A convolution with bias.
pub struct Conv2d {
    /// `[out, in, k, k]`
    weight: Tensor,
    /// `[out]`
    bias: Tensor,
    window: Window,
    kernels: &'static dyn Kernels,
}

impl Conv2d {
    /// Reads `weight` `[output, input, k, k]` and `bias` `[output]`.
    pub fn load(weights: &Weights, input: usize, output: usize, window: Window) -> retouch_weights::Result<Self> {
        let weight = weights.get((output, input, window.kernel(), window.kernel()), "weight")?;
        Ok(Self { weight, bias: weights.get(output, "bias")?, window, kernels: weights.kernels() })
    }

    /// `[b, input, h, w]` to `[b, output, h, w]`, with half or twice the height and width as the window says.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.kernels.conv2d(x, &self.weight, &self.bias, None, self.window)
    }

    /// The same plus `residual`, which has the output's shape.
    pub fn forward_plus(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        self.kernels.conv2d(x, &self.weight, &self.bias, Some(residual), self.window)
    }

    pub fn window(&self) -> Window {
        self.window
    }

    /// Channels of the output.
    pub fn outputs(&self) -> usize {
        self.bias.elem_count()
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.weight.device()
    }
}
