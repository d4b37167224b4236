//! Tensors as kernels see them: rows along the last axis, in groups.

use candle_core::{DType, Result, Tensor};

use super::{Gpu, wide};

/// `struct Rows` of gpu.cuh: strides in elements.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Rows {
    pub address: u64,
    pub outer_stride: i64,
    pub inner_stride: i64,
}

impl Rows {
    /// For an operand that a kernel does not have.
    pub const NONE: Self = Self { address: 0, outer_stride: 0, inner_stride: 0 };

    /// The columns from `column` on.
    pub fn columns_from(self, column: usize, dtype: DType) -> Self {
        Self { address: self.address + (column * dtype.size_in_bytes()) as u64, ..self }
    }

    /// Whether every row begins where a whole load may.
    pub fn aligned(self, dtype: DType) -> bool {
        let wide = wide(dtype).unwrap_or(1) as i64;
        self.address.is_multiple_of(16) && self.outer_stride % wide == 0 && self.inner_stride % wide == 0
    }
}

/// A tensor whose first axis are the groups and whose others but the last are a group's rows.
pub struct View {
    /// Holds the memory.
    pub tensor: Tensor,
    pub rows: Rows,
    /// Groups.
    pub outer: usize,
    /// Rows of a group.
    pub inner: usize,
    pub width: usize,
}

impl View {
    /// Copies `x` only if a group's rows do not lie at equal distances.
    pub fn of(gpu: &impl Gpu, x: &Tensor) -> Result<Self> {
        let tensor = if inner_stride(x).is_some() { x.clone() } else { x.contiguous()? };
        let dims = tensor.dims();
        let width = dims.last().copied().unwrap_or(1);
        let outer = if dims.len() > 2 { dims[0] } else { 1 };
        let inner = tensor.elem_count() / (outer * width).max(1);
        let rows = Rows {
            address: gpu.address(&tensor)?,
            // Of a single row or group the stride does not matter, but may be odd.
            outer_stride: if outer > 1 { tensor.stride()[0] as i64 } else { 0 },
            inner_stride: if inner > 1 { inner_stride(&tensor).unwrap_or(width) as i64 } else { 0 },
        };
        Ok(Self { outer, inner, width, rows, tensor })
    }

    /// Of all groups together.
    pub fn count(&self) -> usize {
        self.outer * self.inner
    }
}

/// The distance of a group's rows, if they have one and their elements are neighbours.
fn inner_stride(x: &Tensor) -> Option<usize> {
    let (dims, strides) = (x.dims(), x.stride());
    let last = dims.len().checked_sub(1)?;
    if strides[last] != 1 && dims[last] != 1 {
        return None;
    }
    // Axes of one element may have any stride.
    let middle: Vec<usize> = (usize::from(dims.len() > 2)..last).filter(|&i| dims[i] != 1).collect();
    let regular = middle.windows(2).all(|pair| strides[pair[0]] == strides[pair[1]] * dims[pair[1]]);
    regular.then(|| middle.last().map_or(dims[last], |&i| strides[i]))
}
