//! 3x3 convolutions by Winograd's algorithm: a quarter of the plain sum's multiplications, as 36 matrix products over runs of
//! 4x4 tiles of the output.
//!
//! Of `c` input and `k` output channels, the transformed filters take `144 c k` bytes, which are there for the time of the
//! convolution (38 MB for 512 and 512), and a thread's run of tiles `144 (c + k)` for each of at most [`MAX_RUN`] (19 MB).

use std::{
    ops::Range,
    slice,
    sync::atomic::{AtomicUsize, Ordering},
};

use rayon::prelude::*;

use super::{
    Problem,
    transforms::{LANES, LINE, Lanes, POINTS, SIDE, TILE, transform_filters, transform_input, transform_output},
};
use crate::{
    Window,
    cpu::{
        buffer::zeros,
        matrix::{Destination, Matrix, Parallelism, Product, multiply},
        simd::vectorised,
    },
};

/// Most tiles that a thread takes at a time.
const MAX_RUN: usize = 128;

/// Fewer input channels leave the products less to do than the transforms cost.
const MIN_INPUTS: usize = 16;

/// For fewer tiles transforming the filters costs more than is saved.
const MIN_TILES: usize = 64;

/// Tiles that follow each other in reading order through all images.
struct Run<'a> {
    problem: &'a Problem,
    tiles: usize,
    parts: Vec<Neighbours>,
}

/// Neighbouring tiles of one row, at most [`LANES`].
struct Neighbours {
    image: usize,
    /// Where the first of them is, counted in tiles.
    row: usize,
    column: usize,
    count: usize,
    /// The first one's place in the run.
    first: usize,
}

impl<'a> Run<'a> {
    fn new(problem: &'a Problem, tiles: Range<usize>) -> Self {
        let (rows, columns) = problem.grid();
        let mut parts = Vec::new();
        let mut tile = tiles.start;
        while tile < tiles.end {
            let (image, row, column) = (tile / columns / rows, tile / columns % rows, tile % columns);
            let count = LANES.min(columns - column).min(tiles.end - tile);
            parts.push(Neighbours { image, row, column, count, first: tile - tiles.start });
            tile += count;
        }
        Self { problem, tiles: tiles.len(), parts }
    }
}

impl Problem {
    /// Tiles along the output's height and width.
    fn grid(&self) -> (usize, usize) {
        (self.out_height().div_ceil(TILE), self.out_width().div_ceil(TILE))
    }

    /// Whether [`Self::by_winograd`] is possible, and faster.
    pub fn suits_winograd(&self, batch: usize) -> bool {
        let (rows, columns) = self.grid();
        matches!(self.window, Window::Same | Window::Doubling)
            && self.input >= MIN_INPUTS
            && batch * rows * columns >= MIN_TILES
    }

    /// The output of a window of 3x3 with stride 1, `[batch, output, height, width]`.
    pub fn by_winograd(&self, x: &[f32], weight: &[f32], bias: &[f32], residual: Option<&[f32]>) -> Vec<f32> {
        let (rows, columns) = self.grid();
        let batch = x.len() / (self.input * self.height * self.width);
        let tiles = batch * rows * columns;
        let mut y = zeros(batch * self.output * self.out_height() * self.out_width());
        let destination = Destination::new(&mut y);
        let filters = self.filters(weight);
        // Equal shares, of whole vectors.
        let threads = rayon::current_num_threads();
        let runs = tiles.div_ceil(MAX_RUN).next_multiple_of(threads);
        let length = tiles.div_ceil(runs).next_multiple_of(LANES);
        let next = AtomicUsize::new(0);
        (0..threads).into_par_iter().for_each(|_| {
            let mut workspace = None;
            loop {
                let start = next.fetch_add(length, Ordering::Relaxed);
                if start >= tiles {
                    return;
                }
                let run = Run::new(self, start..tiles.min(start + length));
                let workspace = workspace.get_or_insert_with(|| Workspace::new(self, length));
                workspace.read(&run, x);
                workspace.multiply(&run, &filters);
                workspace.write(&run, bias, residual, destination);
            }
        });
        y
    }

    /// The transformed filters, for each point `[output, input]`.
    fn filters(&self, weight: &[f32]) -> Vec<f32> {
        let stride = stride(self.output, self.input);
        let mut filters = zeros(POINTS * stride);
        let destination = Destination::new(&mut filters);
        weight.par_chunks(self.depth()).enumerate().for_each(|(output, weight)| {
            vectorised(|| {
                for (part, weight) in weight.chunks(LANES * 9).enumerate() {
                    let mut taps = [[0f32; LANES]; 9];
                    for (lane, filter) in weight.as_chunks::<9>().0.iter().enumerate() {
                        filter.iter().zip(&mut taps).for_each(|(weight, tap)| tap[lane] = *weight);
                    }
                    let count = weight.len() / 9;
                    transform_filters(&taps, |point, lanes| {
                        let start = point * stride + output * self.input + part * LANES;
                        // SAFETY: `count` inputs of this output, from `part * LANES` on; each output is one thread's.
                        let to = unsafe { slice::from_raw_parts_mut(destination.at(start), count) };
                        match <&mut Lanes>::try_from(&mut *to) {
                            Ok(whole) => *whole = *lanes,
                            Err(_) => to.copy_from_slice(&lanes[..count]),
                        }
                    });
                }
            });
        });
        filters
    }
}

/// What a thread computes a run in. A row, of one channel, is written [`LANES`] tiles at a time: what is too much is overwritten
/// by the next row, and there is room for it behind the last.
struct Workspace {
    /// Transformed input, for each point `[input, tiles]`.
    inputs: Vec<f32>,
    /// Products, for each point `[output, tiles]`.
    products: Vec<f32>,
}

/// Elements from one point's matrix to the next one's: with room for a vector, and an odd number of cache lines, as those at
/// powers of two would take each other's place in the caches.
fn stride(rows: usize, columns: usize) -> usize {
    (rows * columns).next_multiple_of(2 * LANES) + LANES
}

impl Workspace {
    fn new(problem: &Problem, tiles: usize) -> Self {
        let of = |channels: usize| zeros(POINTS * stride(channels, tiles));
        Self { inputs: of(problem.input), products: of(problem.output) }
    }

    /// Transforms the input.
    fn read(&mut self, run: &Run<'_>, x: &[f32]) {
        let Problem { window, input, height, width, .. } = *run.problem;
        let stride = stride(input, run.tiles);
        vectorised(|| {
            let mut rows = [[0f32; LINE]; SIDE];
            for channel in 0..input {
                for part in &run.parts {
                    let image = &x[(part.image * input + channel) * height * width..][..height * width];
                    for (i, line) in rows.iter_mut().enumerate() {
                        // Tiles meet the rows that a kernel of their side would.
                        match window.source(part.row * TILE, i, height) {
                            Some(row) => pixels_under(window, &image[row * width..][..width], part.column, line),
                            None => line.fill(0.0),
                        }
                    }
                    let start = channel * run.tiles + part.first;
                    transform_input(&rows, |point, lanes| {
                        self.inputs[point * stride + start..][..LANES].copy_from_slice(lanes);
                    });
                }
            }
        });
    }

    fn multiply(&mut self, run: &Run<'_>, filters: &[f32]) {
        let (&Problem { input, output, .. }, tiles) = (run.problem, run.tiles);
        let threads = Parallelism::None; // the runs are
        let product = Product { rows: output, columns: tiles, depth: input, add: false, factor: 1.0, threads };
        for point in 0..POINTS {
            let filters = &filters[point * stride(output, input)..];
            let inputs = &self.inputs[point * stride(input, tiles)..];
            let products = &mut self.products[point * stride(output, tiles)..][..output * tiles];
            let filters = Matrix { data: filters, row_stride: input, column_stride: 1 };
            let inputs = Matrix { data: inputs, row_stride: tiles, column_stride: 1 };
            // SAFETY: `products` has `output` rows of `tiles`, and is ours alone.
            unsafe { multiply(products.as_mut_ptr(), tiles, product, filters, inputs) };
        }
    }

    /// Writes the output's pixels.
    fn write(&self, run: &Run<'_>, bias: &[f32], residual: Option<&[f32]>, y: Destination) {
        let (height, width) = (run.problem.out_height(), run.problem.out_width());
        let stride = stride(run.problem.output, run.tiles);
        vectorised(|| {
            for (channel, &bias) in bias.iter().enumerate() {
                for part in &run.parts {
                    let start = channel * run.tiles + part.first;
                    let pixels = transform_output(|point| {
                        let mut lanes = [0f32; LANES];
                        lanes.copy_from_slice(&self.products[point * stride + start..][..LANES]);
                        lanes
                    });
                    let (first_row, column) = (part.row * TILE, part.column * TILE);
                    let columns = (part.count * TILE).min(width - column);
                    for (row, line) in (first_row..height).zip(&pixels) {
                        let start = ((part.image * run.problem.output + channel) * height + row) * width + column;
                        // SAFETY: within the output, and pixels of these tiles, which no other thread has.
                        let y = unsafe { slice::from_raw_parts_mut(y.at(start), columns) };
                        match residual {
                            None => y.iter_mut().zip(line).for_each(|(y, x)| *y = x + bias),
                            Some(residual) => {
                                let residual = &residual[start..start + columns];
                                y.iter_mut().zip(line).zip(residual).for_each(|((y, x), r)| *y = x + bias + r);
                            }
                        }
                    }
                }
            }
        });
    }
}

/// Writes what the tiles from `column` on meet of the row `source`, padded by zeros.
#[inline(always)]
fn pixels_under(window: Window, source: &[f32], column: usize, line: &mut [f32; LINE]) {
    if window == Window::Doubling {
        let mut once = [0f32; LINE / 2 + 1];
        padded(source, column * TILE / 2, &mut once);
        line.iter_mut().enumerate().for_each(|(i, pixel)| *pixel = once[i.div_ceil(2)]);
    } else {
        padded(source, column * TILE, line);
    }
}

/// Copies from the pixel before `first` on, with zeros for what is outside of `source`.
#[inline(always)]
fn padded<const N: usize>(source: &[f32], first: usize, to: &mut [f32; N]) {
    if let Some(all) = first.checked_sub(1).and_then(|first| source.get(first..first + N)) {
        to.copy_from_slice(all);
        return;
    }
    let before = usize::from(first == 0);
    let source = source.get(first + before - 1..).unwrap_or_default();
    let count = source.len().min(N - before);
    to[..before].fill(0.0);
    to[before..before + count].copy_from_slice(&source[..count]);
    to[before + count..].fill(0.0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -1 and 1.
    fn numbers(count: usize) -> Vec<f32> {
        (0..count as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
    }

    #[test]
    fn it_equals_the_sum_for_any_size() {
        // One pixel, one tile, a column and a row more than tiles, rows longer than a vector of tiles, and runs over the
        // ends of rows and images.
        let sizes = [(1, 1, 1, 1, 1), (1, 3, 2, 4, 4), (2, 5, 3, 5, 9), (1, 17, 18, 3, 131), (3, 2, 1, 70, 66)];
        for window in [Window::Same, Window::Doubling] {
            for (batch, input, output, height, width) in sizes {
                let problem = Problem { window, input, output, height, width };
                let (x, weight) = (numbers(batch * input * height * width), numbers(output * problem.depth()));
                let bias = numbers(output);
                let residual = numbers(batch * output * problem.out_height() * problem.out_width());
                for residual in [None, Some(&residual[..])] {
                    let expected = problem.by_gathering(&x, &weight, &bias, residual);
                    let found = problem.by_winograd(&x, &weight, &bias, residual);
                    assert_eq!(found.len(), expected.len());
                    let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
                    for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                        let difference = (found - expected).abs() / largest;
                        assert!(difference < 2e-6, "{window:?} {batch}x{input}x{height}x{width}, {i}: {difference}");
                    }
                }
            }
        }
    }

    #[test]
    fn runs_have_each_tile_once() {
        let problem = Problem { window: Window::Same, input: 1, output: 1, height: 25, width: 150 };
        let mut seen = vec![0; 2 * 7 * 38];
        for start in (0..seen.len()).step_by(48) {
            let run = Run::new(&problem, start..seen.len().min(start + 48));
            let mut count = 0;
            for part in &run.parts {
                assert!(part.count <= LANES && part.column + part.count <= 38);
                assert_eq!(part.first, count);
                count += part.count;
                let first = (part.image * 7 + part.row) * 38 + part.column;
                seen[first..first + part.count].iter_mut().for_each(|count| *count += 1);
            }
            assert_eq!(count, run.tiles);
        }
        assert!(seen.iter().all(|&count| count == 1));
    }
}
