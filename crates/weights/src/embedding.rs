//! The embedding table, of which each text needs a few rows.

use candle_core::Tensor;

use crate::{Matrix, Result, Weights};

/// From ids to rows of a table `[ids, width]`.
#[derive(Debug, Clone)]
pub struct Embedding {
    table: Matrix,
    dtype: candle_core::DType,
}

impl Embedding {
    /// Reads `weight` `[rows, width]`.
    pub fn load(weights: &Weights, rows: usize, width: usize) -> Result<Self> {
        Ok(Self { table: weights.matrix((rows, width), "weight")?, dtype: weights.dtype() })
    }

    /// The rows of `ids` `[b, tokens]` (u32, below the number of rows): `[b, tokens, width]` in the weights' dtype.
    pub fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        let flat = ids.flatten_all()?;
        let rows = match &self.table {
            Matrix::Dense(table) => table.index_select(&flat, 0)?,
            Matrix::Packed(table) => table.select(&flat, self.dtype)?,
        };
        let (b, tokens) = ids.dims2()?;
        rows.reshape((b, tokens, ()))
    }
}
