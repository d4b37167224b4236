//! Matrix products on slices.

pub use gemm::Parallelism;
use rayon::prelude::*;

/// A matrix in a slice.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl Matrix<'_> {
    fn holds(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// `y = factor * a b`, or with `add` `y += factor * a b`: `y` is `rows` x `columns`, `a` `rows` x `depth`.
#[derive(Clone, Copy)]
pub struct Product {
    pub rows: usize,
    pub columns: usize,
    pub depth: usize,
    pub add: bool,
    pub factor: f32,
    pub threads: Parallelism,
}

/// Computes a product into rows of `y` that are `y_stride` apart.
///
/// # Safety
/// `y` points to `rows` rows of `columns` f32 that nothing else reads or writes meanwhile.
pub unsafe fn multiply(y: *mut f32, y_stride: usize, product: Product, a: Matrix<'_>, b: Matrix<'_>) {
    let Product { rows, columns, depth, add, factor, threads } = product;
    assert!(a.holds(rows, depth) && b.holds(depth, columns), "a matrix product reads past its operands");
    // SAFETY: the operands hold what is read (just checked), the caller vouches for `y`.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            depth,
            y,
            1,
            y_stride as isize,
            add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            threads,
        );
    }
}

/// Side of the squares that a transposition goes by: a line of the cache each way.
const TILE: usize = 16;

/// `y[column * y_stride + row] = x[row, column]` for the `rows` x `columns` of `x`, whose columns are adjacent. Each row of `y` goes
/// to `finish` when it is written.
pub fn transpose(
    x: Matrix<'_>,
    (rows, columns): (usize, usize),
    y: &mut [f32],
    y_stride: usize,
    finish: impl Fn(&mut [f32]) + Sync,
) {
    y.par_chunks_mut(TILE * y_stride).enumerate().for_each(|(band, y)| {
        let column = band * TILE;
        let width = TILE.min(columns.saturating_sub(column));
        for row in (0..rows).step_by(TILE) {
            let height = TILE.min(rows - row);
            // Whole pieces of rows first: rows at distances of a power of two would push each other out of the cache.
            let mut tile = [[0f32; TILE]; TILE];
            for (i, tile) in tile[..height].iter_mut().enumerate() {
                tile[..width].copy_from_slice(&x.data[(row + i) * x.row_stride + column..][..width]);
            }
            for j in 0..width {
                let y = &mut y[j * y_stride + row..][..height];
                y.iter_mut().zip(&tile).for_each(|(y, tile)| *y = tile[j]);
            }
        }
        for j in 0..width {
            finish(&mut y[j * y_stride..][..rows]);
        }
    });
}

/// An output that several threads write to, each to its own elements.
#[derive(Clone, Copy)]
pub struct Destination(*mut f32);

// SAFETY: whoever takes a pointer from it says why no two threads write to the same element.
unsafe impl Sync for Destination {}
// SAFETY: as above.
unsafe impl Send for Destination {}

impl Destination {
    pub fn new(y: &mut [f32]) -> Self {
        Self(y.as_mut_ptr())
    }

    /// # Safety
    /// `index` is within the output.
    pub unsafe fn at(&self, index: usize) -> *mut f32 {
        // SAFETY: by the caller.
        unsafe { self.0.add(index) }
    }
}
