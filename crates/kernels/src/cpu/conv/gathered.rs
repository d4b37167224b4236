//! Convolutions as one matrix product for each tile of the output: what its pixels meet is gathered into a matrix.

use rayon::prelude::*;

use super::Problem;
use crate::{
    Window,
    cpu::{
        buffer::zeros,
        matrix::{Destination, Matrix, Parallelism, Product, multiply},
    },
};

/// Most elements of the matrix that a tile's pixels are gathered into: 8 MiB for each thread.
const MAX_GATHERED: usize = 1 << 21;

/// Most pixels of a tile: more do not make the product faster.
const MAX_TILE: usize = 1024;

/// Fewest: less gives the product too little to do.
const MIN_TILE: usize = 64;

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

    /// The output, `[batch, output, height, width]`.
    pub fn by_gathering(&self, x: &[f32], weight: &[f32], bias: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        let plane = self.out_height() * self.out_width();
        let batch = x.len() / (self.input * self.height * self.width);
        let mut y = zeros(batch * self.output * plane);
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
