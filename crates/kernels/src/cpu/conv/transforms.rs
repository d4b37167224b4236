//! The transforms of Winograd's convolution F(4x4, 3x3), for as many tiles side by side as [`LANES`].
//!
//! Of an input tile `d` (6x6) and a filter `g` (3x3) the 4x4 output pixels are `A^T ((G g G^T) * (B^T d B)) A`, where `*` is
//! by elements. The matrices evaluate polynomials at the points 0, ±1/√2, ±√2 and infinity. Points in pairs make sums and
//! differences of the same even and odd parts, and this choice of them keeps the factors near 1: the result in f32 is a few
//! times as far from the exact one as that of the plain sum, a quarter as far as with the usual points 0, ±1, ±2.
//!
//! Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2015); for the choice of points Barabasz,
//! Anderson, Soodhalter and Gregg, "Error Analysis and Improving the Accuracy of Winograd Convolution for Deep Neural
//! Networks" (2020).

use std::array::from_fn;

/// Output pixels along each side of a tile.
pub const TILE: usize = 4;

/// Input pixels, and points, along each side of a tile.
pub const SIDE: usize = TILE + 2;

/// Products that make a tile.
pub const POINTS: usize = SIDE * SIDE;

/// Tiles that are transformed at a time: a vector of AVX-512, two of AVX2, four of NEON.
pub const LANES: usize = 16;

/// One value of each tile.
pub type Lanes = [f32; LANES];

/// Pixels of an input row under [`LANES`] neighbouring tiles, and two more to make whole tiles.
pub const LINE: usize = TILE * (LANES + 1);

const A: f32 = std::f32::consts::FRAC_1_SQRT_2;
const B: f32 = std::f32::consts::SQRT_2;

/// `B^T d`: rows are `x^4 - 5/2 x^2 + 1`, then without the factor `x ∓ p` and with `x` for each point, then `x` times the first.
#[inline(always)]
fn input(d: [f32; SIDE]) -> [f32; SIDE] {
    let (even_a, odd_a) = (d[4] - 2.0 * d[2], A * d[3] - B * d[1]);
    let (even_b, odd_b) = (d[4] - 0.5 * d[2], B * d[3] - A * d[1]);
    let (first, last) = (d[0] - 2.5 * d[2] + d[4], d[1] - 2.5 * d[3] + d[5]);
    [first, even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, last]
}

/// `G g`: the filter's polynomial at each point, over the product of the point's distances from the others.
#[inline(always)]
fn filter(g: [f32; 3]) -> [f32; SIDE] {
    let (even_a, odd_a) = ((g[0] + 0.5 * g[2]) / -1.5, A * g[1] / -1.5);
    let (even_b, odd_b) = ((g[0] + 2.0 * g[2]) / 6.0, B * g[1] / 6.0);
    [g[0], even_a + odd_a, even_a - odd_a, even_b + odd_b, even_b - odd_b, g[2]]
}

/// `A^T m`: powers of the points.
#[inline(always)]
fn output(m: [f32; SIDE]) -> [f32; TILE] {
    let (even_a, odd_a) = (m[1] + m[2], A * (m[1] - m[2]));
    let (even_b, odd_b) = (m[3] + m[4], B * (m[3] - m[4]));
    [m[0] + even_a + even_b, odd_a + odd_b, 0.5 * even_a + 2.0 * even_b, 0.5 * odd_a + 2.0 * odd_b + m[5]]
}

/// Transforms neighbouring tiles, given the rows of pixels under them; `write` takes the point and its value of each tile.
#[inline(always)]
pub fn transform_input(rows: &[[f32; LINE]; SIDE], mut write: impl FnMut(usize, &Lanes)) {
    let mut lines = [[0f32; LINE]; SIDE];
    for column in 0..LINE {
        let line = input(from_fn(|row| rows[row][column]));
        (0..SIDE).for_each(|row| lines[row][column] = line[row]);
    }
    for (row, line) in lines.iter().enumerate() {
        // The first four pixels of a tile, beside which are the first two of the next.
        let mut pixels = [[0f32; LANES + 1]; TILE];
        for (tile, four) in line.as_chunks::<TILE>().0.iter().enumerate() {
            (0..TILE).for_each(|column| pixels[column][tile] = four[column]);
        }
        let mut points = [[0f32; LANES]; SIDE];
        for tile in 0..LANES {
            let [p0, p1, p2, p3] = &pixels;
            let values = input([p0[tile], p1[tile], p2[tile], p3[tile], p0[tile + 1], p1[tile + 1]]);
            (0..SIDE).for_each(|column| points[column][tile] = values[column]);
        }
        points.iter().enumerate().for_each(|(column, lanes)| write(row * SIDE + column, lanes));
    }
}

/// Transforms as many filters as there are lanes, `taps` in reading order; `write` takes the point and its value of each.
#[inline(always)]
pub fn transform_filters(taps: &[Lanes; 9], mut write: impl FnMut(usize, &Lanes)) {
    let mut lines = [[[0f32; LANES]; 3]; SIDE];
    for column in 0..3 {
        for lane in 0..LANES {
            let values = filter(from_fn(|row| taps[3 * row + column][lane]));
            (0..SIDE).for_each(|row| lines[row][column][lane] = values[row]);
        }
    }
    for (row, line) in lines.iter().enumerate() {
        let mut points = [[0f32; LANES]; SIDE];
        for lane in 0..LANES {
            let values = filter(from_fn(|column| line[column][lane]));
            (0..SIDE).for_each(|column| points[column][lane] = values[column]);
        }
        points.iter().enumerate().for_each(|(column, lanes)| write(row * SIDE + column, lanes));
    }
}

/// The rows of pixels that neighbouring tiles make; `read` gives a point's value of each tile.
#[inline(always)]
pub fn transform_output(read: impl Fn(usize) -> Lanes) -> [[f32; TILE * LANES]; TILE] {
    let mut columns = [[[0f32; LANES]; TILE]; SIDE];
    for (column, lines) in columns.iter_mut().enumerate() {
        let points: [Lanes; SIDE] = from_fn(|row| read(row * SIDE + column));
        for lane in 0..LANES {
            let values = output(from_fn(|row| points[row][lane]));
            (0..TILE).for_each(|row| lines[row][lane] = values[row]);
        }
    }
    let mut pixels = [[0f32; TILE * LANES]; TILE];
    for (row, line) in pixels.iter_mut().enumerate() {
        for (lane, four) in line.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
            *four = output(from_fn(|column| columns[column][row][lane]));
        }
    }
    pixels
}
