//! Convolutions as matrix products, a tile of the output at a time.

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    matrix::{Destination, Matrix, Parallelism, Product, multiply},
    view::{View, narrowed, vector, widened},
};
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
    let y = problem.run(&x_view.floats()?[..x.elem_count()], View::of(&weight).floats()?, &bias, residual);
    narrowed(y, shape, x.dtype())
}

/// Most elements of the matrix that a tile's pixels are gathered into: 8 MiB for each thread.
const MAX_GATHERED: usize = 1 << 21;

/// Most pixels of a tile: more do not make the product faster.
const MAX_TILE: usize = 1024;

/// Fewest: less gives the product too little to do.
const MIN_TILE: usize = 64;

/// One convolution of images of one size; `height` and `width` are the input's.
struct Problem {
    window: Window,
    input: usize,
    output: usize,
    height: usize,
    width: usize,
}

/// A run of the output's pixels in reading order that does not go over the end of a row, or is made of whole rows.
#[derive(Clone, Copy)]
struct Tile {
    image: usize,
    first_row: usize,
    rows: usize,
    first_column: usize,
    columns: usize,
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

    fn tiles(&self, batch: usize) -> Vec<Tile> {
        let (height, width) = (self.out_height(), self.out_width());
        // Few enough pixels for the workspace, and enough tiles for the threads.
        let share = (batch * height * width).div_ceil(4 * rayon::current_num_threads());
        let pixels = (MAX_GATHERED / self.depth()).min(MAX_TILE).min(share).max(MIN_TILE);
        let rows = (pixels / width).clamp(1, height);
        let columns = width.div_ceil(width.div_ceil(pixels));
        let mut tiles = Vec::new();
        for image in 0..batch {
            for first_row in (0..height).step_by(rows) {
                for first_column in (0..width).step_by(columns) {
                    let (rows, columns) = (rows.min(height - first_row), columns.min(width - first_column));
                    tiles.push(Tile { image, first_row, rows, first_column, columns });
                }
            }
        }
        tiles
    }

    fn run(&self, x: &[f32], weight: &[f32], bias: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        let plane = self.out_height() * self.out_width();
        let batch = x.len() / (self.input * self.height * self.width);
        let mut y = vec![0f32; batch * self.output * plane];
        let destination = Destination::new(&mut y);
        self.tiles(batch).into_par_iter().for_each_init(Vec::new, |gathered, tile| {
            let pixels = tile.rows * tile.columns;
            let start = tile.image * self.output * plane + tile.first_row * self.out_width() + tile.first_column;
            for (channel, &bias) in bias.iter().enumerate() {
                let start = start + channel * plane;
                // SAFETY: within `y`, whose element `start` is this channel's first pixel of the tile; the tile's pixels
                // are consecutive there, and no other tile has any of them.
                let y = unsafe { std::slice::from_raw_parts_mut(destination.at(start), pixels) };
                match residual {
                    None => y.fill(bias),
                    Some(residual) => {
                        y.iter_mut().zip(&residual[start..]).for_each(|(y, residual)| *y = residual + bias);
                    }
                }
            }
            let image =
                &x[tile.image * self.input * self.height * self.width..][..self.input * self.height * self.width];
            let (source, stride) = match self.window {
                Window::Point => (&image[tile.first_row * self.width + tile.first_column..], plane),
                _ => {
                    self.gather(image, tile, gathered);
                    (gathered.as_slice(), pixels)
                }
            };
            let depth = self.depth();
            let threads = Parallelism::None; // the tiles are
            let product = Product { rows: self.output, columns: pixels, depth, add: true, factor: 1.0, threads };
            let weight = Matrix { data: weight, row_stride: depth, column_stride: 1 };
            let source = Matrix { data: source, row_stride: stride, column_stride: 1 };
            // SAFETY: `y` as above, in rows of `plane`.
            unsafe { multiply(destination.at(start), plane, product, weight, source) };
        });
        y
    }

    /// Writes `[input * 3 * 3, pixels of the tile]` to `gathered`: for each weight, the pixel that it meets.
    fn gather(&self, image: &[f32], tile: Tile, gathered: &mut Vec<f32>) {
        let kernel = self.window.kernel();
        gathered.resize(self.depth() * tile.rows * tile.columns, 0.0);
        let mut lines = gathered.chunks_exact_mut(tile.columns);
        for channel in image.chunks_exact(self.height * self.width) {
            for (dy, dx) in (0..kernel * kernel).map(|tap| (tap / kernel, tap % kernel)) {
                for (row, line) in (tile.first_row..tile.first_row + tile.rows).zip(&mut lines) {
                    match self.window.source(row, dy, self.height) {
                        Some(row) => {
                            let source = &channel[row * self.width..][..self.width];
                            gather_line(self.window, source, tile.first_column, dx, line);
                        }
                        None => line.fill(0.0),
                    }
                }
            }
        }
    }
}

/// Writes to `line` what weight column `tap` meets of the row `source`, for the output's columns from `first` on.
fn gather_line(window: Window, source: &[f32], first: usize, tap: usize, line: &mut [f32]) {
    let meets = |column: usize| window.source(first + column, tap, source.len());
    // Padding is one column wide, on either side.
    let Some(last) = line.len().checked_sub(1) else { return };
    let start = usize::from(meets(0).is_none());
    let end = if meets(last).is_none() { last } else { last + 1 };
    line[..start].fill(0.0);
    line[end.max(start)..].fill(0.0);
    let Some(from) = (start < end).then(|| meets(start)).flatten() else { return };
    let line = &mut line[start..end];
    match window {
        Window::Point | Window::Same => line.copy_from_slice(&source[from..from + line.len()]),
        Window::Halving => line.iter_mut().zip(source[from..].iter().step_by(2)).for_each(|(to, from)| *to = *from),
        Window::Doubling => {
            // The first one may be the second of a repeated pair.
            let odd = (first + start + tap - 1) % 2;
            line.iter_mut().enumerate().for_each(|(i, to)| *to = source[from + (i + odd) / 2]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Largest difference between ours and candle's own operations.
    fn difference(window: Window, (batch, input, height, width): (usize, usize, usize, usize)) -> Result<f32> {
        let random = |shape: &[usize]| Tensor::randn(0f32, 1., shape, &Device::Cpu);
        let (output, kernel) = (5, window.kernel());
        let x = random(&[batch, input, height, width])?;
        let weight = (random(&[output, input, kernel, kernel])? / ((input * kernel * kernel) as f64).sqrt())?;
        let bias = random(&[output])?;
        let expected = match window {
            Window::Point => x.conv2d(&weight, 0, 1, 1, 1)?,
            Window::Same => x.conv2d(&weight, 1, 1, 1, 1)?,
            Window::Halving => x.pad_with_zeros(2, 0, 1)?.pad_with_zeros(3, 0, 1)?.conv2d(&weight, 0, 2, 1, 1)?,
            Window::Doubling => x.upsample_nearest2d(2 * height, 2 * width)?.conv2d(&weight, 1, 1, 1, 1)?,
        };
        let expected = expected.broadcast_add(&bias.reshape((1, output, 1, 1))?)?;
        let residual = random(expected.dims())?;
        let largest = |x: Tensor| x.abs()?.max_all()?.to_scalar::<f32>();
        let alone = largest((conv2d(&x, &weight, &bias, None, window)? - &expected)?)?;
        let with_residual = conv2d(&x, &weight, &bias, Some(&residual), window)?;
        Ok(alone.max(largest((with_residual - (expected + residual)?)?)?))
    }

    const WINDOWS: [Window; 4] = [Window::Point, Window::Same, Window::Halving, Window::Doubling];

    #[test]
    fn every_window_equals_candles_convolution() -> Result<()> {
        for window in WINDOWS {
            for shape in [(1, 1, 2, 2), (2, 3, 4, 6), (1, 7, 34, 62), (1, 2, 2, 700), (1, 2, 700, 2)] {
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

    #[test]
    fn tiles_cover_each_pixel_once_within_the_workspace() {
        for (input, height, width) in [(512, 64, 64), (512, 128, 196), (3, 16, 8192), (1 << 16, 8, 8), (16, 7, 13)] {
            let problem = Problem { window: Window::Same, input, output: 1, height, width };
            let mut seen = vec![0; 2 * height * width];
            for tile in problem.tiles(2) {
                let pixels = tile.rows * tile.columns;
                assert!(tile.rows == 1 || tile.columns == width, "not one run of pixels");
                assert!(pixels * problem.depth() <= MAX_GATHERED.max(MIN_TILE * problem.depth()));
                let start = (tile.image * height + tile.first_row) * width + tile.first_column;
                seen[start..start + pixels].iter_mut().for_each(|count| *count += 1);
            }
            assert!(seen.iter().all(|&count| count == 1));
        }
    }
}
