//! Convolutions: by Winograd's algorithm where it pays, else as matrix products of what is gathered.

mod gathered;
mod transforms;
mod winograd;

use candle_core::{Result, Tensor, bail};

use super::view::{View, narrowed, vector, widened};
use crate::Window;

pub fn conv2d(x: &Tensor, weight: &Tensor, bias: &Tensor, residual: Option<&Tensor>, window: Window) -> Result<Tensor> {
    let (batch, input, height, width) = x.dims4()?;
    let output = weight.dims4()?.0;
    let problem = Problem { window, input, output, height, width };
    let shape = (batch, output, problem.out_height(), problem.out_width());
    if weight.elem_count() != output * problem.depth() {
        bail!("a convolution of {input} channels with weights {:?}", weight.shape())
    }
    if let Some(residual) = residual
        && residual.dims4()? != shape
    {
        bail!("a residual of {:?} for a convolution's {shape:?}", residual.shape())
    }
    let contiguous = |x: &Tensor| widened(x)?.contiguous();
    let (x_wide, weight, residual) = (contiguous(x)?, contiguous(weight)?, residual.map(contiguous).transpose()?);
    let residual = residual.as_ref().map(View::of);
    let residual = residual.as_ref().map(|residual| residual.floats()).transpose()?;
    let bias = vector(bias, output, "a bias")?;
    let x_view = View::of(&x_wide);
    let weight = View::of(&weight);
    let (x_floats, weight) = (&x_view.floats()?[..x.elem_count()], &weight.floats()?[..output * problem.depth()]);
    let y = match problem.suits_winograd(batch) {
        true => problem.by_winograd(x_floats, weight, &bias, residual),
        false => problem.by_gathering(x_floats, weight, &bias, residual),
    };
    narrowed(y, shape, x.dtype())
}

/// One convolution of images of one size; `height` and `width` are the input's.
struct Problem {
    window: Window,
    input: usize,
    output: usize,
    height: usize,
    width: usize,
}

impl Problem {
    fn out_height(&self) -> usize {
        self.window.out_size(self.height)
    }

    fn out_width(&self) -> usize {
        self.window.out_size(self.width)
    }

    /// Input values that make one output value.
    fn depth(&self) -> usize {
        self.input * self.window.kernel() * self.window.kernel()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::random;

    /// Largest difference between ours and candle's own operations.
    fn difference(window: Window, (batch, input, height, width): (usize, usize, usize, usize)) -> Result<f32> {
        let (output, kernel) = (5, window.kernel());
        let x = random((batch, input, height, width));
        let weight = (random((output, input, kernel, kernel)) / ((input * kernel * kernel) as f64).sqrt())?;
        let bias = random(output);
        let expected = match window {
            Window::Point => x.conv2d(&weight, 0, 1, 1, 1)?,
            Window::Same => x.conv2d(&weight, 1, 1, 1, 1)?,
            Window::Halving => x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?.conv2d(&weight, 0, 2, 1, 1)?,
            Window::Doubling => x.upsample_nearest2d(2 * height, 2 * width)?.conv2d(&weight, 1, 1, 1, 1)?,
        };
        let expected = expected.broadcast_add(&bias.reshape((1, output, 1, 1))?)?;
        let residual = random(expected.dims());
        let largest = |x: Tensor| x.abs()?.max_all()?.to_scalar::<f32>();
        let alone = largest((conv2d(&x, &weight, &bias, None, window)? - &expected)?)?;
        let with_residual = conv2d(&x, &weight, &bias, Some(&residual), window)?;
        Ok(alone.max(largest((with_residual - (expected + residual)?)?)?))
    }

    const WINDOWS: [Window; 4] = [Window::Point, Window::Same, Window::Halving, Window::Doubling];

    #[test]
    fn every_window_equals_candles_convolution() -> Result<()> {
        for window in WINDOWS {
            for shape in [(1, 1, 2, 2), (2, 3, 4, 6), (1, 7, 34, 62), (1, 2, 2, 700), (1, 2, 700, 2), (2, 33, 34, 62)] {
                let difference = difference(window, shape)?;
                assert!(difference < 1e-5, "{window:?} over {shape:?}: {difference}");
            }
        }
        Ok(())
    }

    #[test]
    fn rows_longer_than_a_tile_are_split_without_a_seam() -> Result<()> {
        for window in WINDOWS {
            let difference = difference(window, (1, 2, 4, 3000))?;
            assert!(difference < 1e-5, "{window:?}: {difference}");
        }
        Ok(())
    }
}
