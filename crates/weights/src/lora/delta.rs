//! What is added to some rows of a parameter, as tensors in f32.

use std::ops::Range;

use candle_core::{D, DType, Result, Tensor};

/// A change to the rows of one parameter, with all scales inside.
#[derive(Debug, Clone)]
pub struct Piece {
    pub rows: Range<usize>,
    pub delta: Delta,
}

/// For `n` rows of a matrix `[out, in]`, or of a vector `[out]`.
#[derive(Debug, Clone)]
pub enum Delta {
    /// `up [n, rank]` times `down [rank, in]`.
    LowRank { up: Tensor, down: Tensor },
    /// The Kronecker product of `left [a, b]` and `right [n / a, in / b]`.
    Kronecker { left: Tensor, right: Tensor },
    /// `[n, in]` or `[n]`.
    Full(Tensor),
}

impl Delta {
    /// `[n, in]` or `[n]`.
    pub fn full(&self) -> Result<Tensor> {
        match self {
            Self::LowRank { up, down } => up.matmul(down),
            Self::Kronecker { left, right } => {
                let ((a, b), (c, d)) = (left.dims2()?, right.dims2()?);
                left.reshape((a, 1, b, 1))?.broadcast_mul(&right.reshape((1, c, 1, d))?)?.reshape((a * c, b * d))
            }
            Self::Full(values) => Ok(values.clone()),
        }
    }

    /// The same with the first and the second half of the rows exchanged.
    pub fn with_swapped_halves(self) -> Result<Self> {
        Ok(match self {
            Self::LowRank { up, down } => Self::LowRank { up: swap_halves(&up)?, down },
            other => Self::Full(swap_halves(&other.full()?)?),
        })
    }

    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(match self {
            Self::LowRank { up, down } => Self::LowRank { up: up.to_dtype(dtype)?, down: down.to_dtype(dtype)? },
            Self::Kronecker { left, right } => {
                Self::Kronecker { left: left.to_dtype(dtype)?, right: right.to_dtype(dtype)? }
            }
            Self::Full(values) => Self::Full(values.to_dtype(dtype)?),
        })
    }

    /// `x delta^T`: `[..., in]` to `[..., n]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::LowRank { up, down } => times_transposed(&times_transposed(x, down)?, up),
            Self::Kronecker { left, right } => {
                // (left (x) right) x is left X right^T, with x as the matrix X [b, in / b].
                let ((a, b), (c, d)) = (left.dims2()?, right.dims2()?);
                let mut shape = x.dims().to_vec();
                shape.pop();
                let tokens: usize = shape.iter().product();
                let y = x.contiguous()?.reshape((tokens * b, d))?.matmul(&right.t()?)?; // [tokens * b, c]
                let y = y.reshape((tokens, b, c))?.transpose(1, 2)?.contiguous()?; // [tokens, c, b]
                let y = y.reshape((tokens * c, b))?.matmul(&left.t()?)?.reshape((tokens, c, a))?;
                shape.push(a * c);
                y.transpose(1, 2)?.contiguous()?.reshape(shape)
            }
            Self::Full(values) => times_transposed(x, values),
        }
    }
}

/// Adds the pieces to a parameter `[out, in]` or `[out]` in f32, in place: no copy of a large matrix is made.
pub fn merge(parameter: &Tensor, pieces: &[Piece]) -> Result<()> {
    for Piece { rows, delta } in pieces {
        let changed = (parameter.narrow(0, rows.start, rows.len())? + delta.full()?)?;
        parameter.slice_set(&changed, 0, rows.start)?;
    }
    Ok(())
}

fn swap_halves(x: &Tensor) -> Result<Tensor> {
    let half = x.dim(0)? / 2;
    Tensor::cat(&[x.narrow(0, half, half)?, x.narrow(0, 0, half)?], 0)
}

/// `x w^T` over the last axis.
fn times_transposed(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    let mut shape = x.dims().to_vec();
    let width = x.dim(D::Minus1)?;
    let y = x.contiguous()?.reshape(((), width))?.matmul(&w.t()?)?;
    if let Some(last) = shape.last_mut() {
        *last = w.dim(0)?;
    }
    y.reshape(shape)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn matrix(rows: usize, columns: usize) -> Tensor {
        let values: Vec<f32> = (0..rows * columns).map(|i| ((i * 7 + rows) % 11) as f32 - 5.0).collect();
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn values(x: &Tensor) -> Vec<f32> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// Small whole numbers: every form must give the very same values.
    #[test]
    fn acting_on_inputs_equals_multiplying_by_the_full_matrix() {
        let x = matrix(2 * 3, 6).reshape((2, 3, 6)).unwrap();
        for delta in [
            Delta::LowRank { up: matrix(4, 2), down: matrix(2, 6) },
            Delta::Kronecker { left: matrix(2, 3), right: matrix(2, 2) },
            Delta::Kronecker { left: matrix(1, 1), right: matrix(4, 6) },
            Delta::Full(matrix(4, 6)),
        ] {
            let full = delta.full().unwrap();
            assert_eq!(full.dims(), [4, 6]);
            let y = delta.forward(&x).unwrap();
            assert_eq!(y.dims(), [2, 3, 4]);
            assert_eq!(values(&y), values(&times_transposed(&x, &full).unwrap()));
            let swapped = delta.with_swapped_halves().unwrap().full().unwrap();
            assert_eq!(values(&swapped.narrow(0, 0, 2).unwrap()), values(&full.narrow(0, 2, 2).unwrap()));
            assert_eq!(values(&swapped.narrow(0, 2, 2).unwrap()), values(&full.narrow(0, 0, 2).unwrap()));
        }
    }

    #[test]
    fn a_kronecker_product_is_blocks_of_the_right_factor() {
        let left = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let right = Tensor::new(&[[1f32, 10.0]], &Device::Cpu).unwrap();
        let full = Delta::Kronecker { left, right }.full().unwrap();
        assert_eq!(full.to_vec2::<f32>().unwrap(), [[1.0, 10.0, 2.0, 20.0], [3.0, 30.0, 4.0, 40.0]]);
    }

    #[test]
    fn merging_changes_the_rows_of_the_pieces_alone() {
        let parameter = matrix(6, 3);
        let before = parameter.copy().unwrap();
        let piece = |rows: Range<usize>| Piece { delta: Delta::Full(matrix(rows.len(), 3)), rows };
        merge(&parameter, &[piece(1..3), piece(2..4)]).unwrap();
        let changed = values(&(parameter - before).unwrap());
        assert_eq!(changed[..3], [0.0; 3]);
        assert_eq!(changed[12..], [0.0; 6]);
        // The row that both change.
        let (first, second) = (values(&matrix(2, 3)), values(&matrix(2, 3)));
        assert_eq!(changed[6..9], [first[3] + second[0], first[4] + second[1], first[5] + second[2]]);
    }
}
