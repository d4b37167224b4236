//! Attention without a matrix of all scores.
//!
//! Each task takes a run of one head's queries through all keys, a run of keys at a time: scores of a tile by a matrix
//! product, their exponentials against the largest score so far, and the tile's share of the output by another product
//! (the online softmax of Milakov and Gimelshein, 2018; tiled as in FlashAttention by Dao et al., 2022).

use candle_core::{Result, Tensor, bail};
use rayon::prelude::*;

use super::{
    buffer::zeros,
    matrix::{Destination, Matrix, Parallelism, Product, multiply},
    simd::{exp, gelu, max, sum, vectorised},
    view::{Rows, View, narrowed, widened},
};

/// Queries of a task, and keys of a tile: the scores (256 KiB) stay in the second-level cache.
const QUERIES: usize = 128;
const KEYS: usize = 512;

/// With `inner`, each row of the result is followed by its GELU.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
    scale: f64,
    inner: Option<&Tensor>,
) -> Result<Tensor> {
    let ((batch, queries, heads, head_dim), dtype) = (q.dims4()?, q.dtype());
    let keys = k.dim(1)?;
    let expected = [batch, keys, heads, head_dim];
    if k.dims() != expected || v.dims() != expected || keys == 0 {
        bail!("queries of {:?} with keys of {:?} and values of {:?}", q.shape(), k.shape(), v.shape())
    }
    if let Some(bias) = bias
        && ![1, heads].map(|heads| [1, heads, queries, keys]).iter().any(|expected| bias.dims() == expected)
    {
        bail!("a bias of {:?} for {heads} heads of {queries} queries and {keys} keys", bias.shape())
    }
    let inner_rows = inner.map(Rows::of).transpose()?;
    if let Some(rows) = &inner_rows
        && rows.count != batch * queries
    {
        bail!("attention of {queries} queries beside {:?}", rows.tensor.shape())
    }
    let hidden = heads * head_dim;
    let width = hidden + inner_rows.as_ref().map_or(0, |rows| rows.width);
    let mut y = zeros(batch * queries * width);

    let last_axis_contiguous = |x: &Tensor| {
        let x = widened(x)?;
        if x.stride()[3] == 1 { Ok(x) } else { x.contiguous() }
    };
    let (q_wide, k_wide, v_wide) = (last_axis_contiguous(q)?, last_axis_contiguous(k)?, last_axis_contiguous(v)?);
    let bias = bias.map(|bias| widened(bias)?.contiguous()).transpose()?;
    let (q, k, v) = (View::of(&q_wide), View::of(&k_wide), View::of(&v_wide));
    let bias_view = bias.as_ref().map(View::of);
    let problem = Problem {
        queries,
        keys,
        head_dim,
        scale: scale as f32,
        q: Tokens { data: q.floats()?, strides: q.strides() },
        k: Tokens { data: k.floats()?, strides: k.strides() },
        v: Tokens { data: v.floats()?, strides: v.strides() },
        bias: bias_view.as_ref().map(|view| view.floats()).transpose()?,
        bias_stride: if bias.as_ref().is_some_and(|bias| bias.dims()[1] == 1) { 0 } else { queries * keys },
    };
    let destination = Destination::new(&mut y);
    let runs = queries.div_ceil(QUERIES);
    (0..batch * heads * runs).into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        let (image, head, first) = (task / (heads * runs), task / runs % heads, task % runs * QUERIES);
        // SAFETY: the first `head_dim` channels of the head of rows `first..` of this image: no other task's.
        unsafe {
            let y = destination.at((image * queries + first) * width + head * head_dim);
            problem.run(image, head, first, y, width, scratch);
        }
    });
    if let Some(rows) = &inner_rows {
        let view = View::of(&rows.tensor);
        let data = view.floats()?;
        y.par_chunks_mut(width).enumerate().for_each(|(row, y)| {
            let x = &data[row * rows.stride..][..rows.width];
            vectorised(|| y[hidden..].iter_mut().zip(x).for_each(|(y, &x)| *y = gelu(x)));
        });
    }
    narrowed(y, (batch, queries, width), dtype)
}

/// `[batch, tokens, heads, head_dim]` with the last axis contiguous.
#[derive(Clone, Copy)]
struct Tokens<'a> {
    data: &'a [f32],
    strides: &'a [usize],
}

impl<'a> Tokens<'a> {
    /// From token `first` of one head on.
    fn from(self, image: usize, first: usize, head: usize) -> Matrix<'a> {
        let start = image * self.strides[0] + first * self.strides[1] + head * self.strides[2];
        Matrix { data: &self.data[start..], row_stride: self.strides[1], column_stride: 1 }
    }
}

struct Problem<'a> {
    queries: usize,
    keys: usize,
    head_dim: usize,
    scale: f32,
    q: Tokens<'a>,
    k: Tokens<'a>,
    v: Tokens<'a>,
    /// `[queries, keys]` of every head, `bias_stride` apart; 0 where all heads have the same.
    bias: Option<&'a [f32]>,
    bias_stride: usize,
}

/// What a task keeps between its tiles; made once per thread.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    /// Per query: the largest score so far, and the sum of the exponentials against it.
    largest: Vec<f32>,
    sums: Vec<f32>,
}

impl Problem<'_> {
    /// Writes one head's output for the run of queries that begins at `first`.
    ///
    /// # Safety
    /// `y` points to that many rows of `head_dim` f32, `y_stride` apart, that nothing else reads or writes meanwhile.
    unsafe fn run(&self, image: usize, head: usize, first: usize, y: *mut f32, y_stride: usize, scratch: &mut Scratch) {
        let rows = QUERIES.min(self.queries - first);
        let threads = Parallelism::None; // the tasks are
        let Scratch { scores, largest, sums } = scratch;
        scores.resize(QUERIES * KEYS, 0.0);
        largest.clear();
        largest.resize(rows, f32::MIN);
        sums.clear();
        sums.resize(rows, 0.0);
        let q = self.q.from(image, first, head);
        for first_key in (0..self.keys).step_by(KEYS) {
            let columns = KEYS.min(self.keys - first_key);
            let k = self.k.from(image, first_key, head);
            let k = Matrix { row_stride: 1, column_stride: k.row_stride, ..k };
            let product = Product { rows, columns, depth: self.head_dim, add: false, factor: self.scale, threads };
            // SAFETY: `scores` is this thread's, and large enough for a whole tile.
            unsafe { multiply(scores.as_mut_ptr(), columns, product, q, k) };
            for (row, scores) in scores.chunks_exact_mut(columns).take(rows).enumerate() {
                let bias = self
                    .bias
                    .map(|bias| &bias[head * self.bias_stride + (first + row) * self.keys + first_key..][..columns]);
                // SAFETY: row `row` of `y`, by the caller.
                let y = unsafe { std::slice::from_raw_parts_mut(y.add(row * y_stride), self.head_dim) };
                let y = (first_key > 0).then_some(y);
                vectorised(|| exponentials(scores, bias, y, &mut largest[row], &mut sums[row]));
            }
            let v = self.v.from(image, first_key, head);
            let scores = Matrix { data: scores, row_stride: columns, column_stride: 1 };
            let add = first_key > 0;
            let product = Product { rows, columns: self.head_dim, depth: columns, add, factor: 1.0, threads };
            // SAFETY: `y` by the caller.
            unsafe { multiply(y, y_stride, product, scores, v) };
        }
        for (row, (&total, &largest)) in sums.iter().zip(&*largest).enumerate() {
            // SAFETY: as above.
            let y = unsafe { std::slice::from_raw_parts_mut(y.add(row * y_stride), self.head_dim) };
            // A query that sees no key has no result. The sum is not 0: `exp` goes down to the smallest normal number only.
            let inverse = if largest > f32::MIN { 1.0 / total } else { f32::NAN };
            vectorised(|| y.iter_mut().for_each(|y| *y *= inverse));
        }
    }
}

/// Turns a query's scores for a tile of keys into exponentials against the largest score so far, and brings what was
/// summed up before (`total`, and the output `y`) to that same scale.
#[inline(always)]
fn exponentials(scores: &mut [f32], bias: Option<&[f32]>, y: Option<&mut [f32]>, largest: &mut f32, total: &mut f32) {
    if let Some(bias) = bias {
        scores.iter_mut().zip(bias).for_each(|(score, &bias)| *score += bias);
    }
    let new = largest.max(max(scores));
    if new > *largest {
        let factor = exp(*largest - new);
        *total *= factor;
        if let Some(y) = y {
            y.iter_mut().for_each(|y| *y *= factor);
        }
        *largest = new;
    }
    scores.iter_mut().for_each(|score| *score = exp(*score - new));
    *total += sum(scores, |x| x);
}
