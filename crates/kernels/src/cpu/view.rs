//! Between tensors and slices of f32.

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Device, Result, Shape, Storage, Tensor, bail};
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

use super::buffer::zeros;

/// Elements that a thread takes at a time where an operation has no rows.
pub const CHUNK: usize = 1 << 14;

/// `x` in f32: itself where it is, else a contiguous copy.
pub fn widened(x: &Tensor) -> Result<Tensor> {
    if x.dtype() == DType::F32 {
        return Ok(x.clone());
    }
    let x = x.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let mut wide = zeros(x.elem_count());
    match &*storage {
        Storage::Cpu(narrow) => widen(narrow, layout.start_offset(), &mut wide)?,
        _ => bail!("{NOT_HERE}"),
    }
    drop(storage);
    Tensor::from_vec(wide, x.shape(), &Device::Cpu)
}

const NOT_HERE: &str = "a CPU kernel was given a tensor of another device";

/// Writes the elements from `start` on to `wide`, as many as it has.
pub fn widen(narrow: &CpuStorage, start: usize, wide: &mut [f32]) -> Result<()> {
    let end = start + wide.len();
    match narrow {
        CpuStorage::F32(narrow) => wide.copy_from_slice(&narrow[start..end]),
        CpuStorage::BF16(narrow) => convert(&narrow[start..end], wide, |from, to| from.convert_to_f32_slice(to)),
        CpuStorage::F16(narrow) => convert(&narrow[start..end], wide, |from, to| from.convert_to_f32_slice(to)),
        other => bail!("a CPU kernel was given {:?}; it takes f32, bf16 and f16", other.dtype_name()),
    }
    Ok(())
}

/// The names of what [`widen`] refuses.
trait DTypeName {
    fn dtype_name(&self) -> DType;
}

impl DTypeName for CpuStorage {
    fn dtype_name(&self) -> DType {
        candle_core::backend::BackendStorage::dtype(self)
    }
}

/// A result of f32 as a tensor of `dtype`.
pub fn narrowed(wide: Vec<f32>, shape: impl Into<Shape>, dtype: DType) -> Result<Tensor> {
    let shape = shape.into();
    match dtype {
        DType::F32 => Tensor::from_vec(wide, shape, &Device::Cpu),
        DType::BF16 => {
            let mut narrow = vec![bf16::ZERO; wide.len()];
            convert(&wide, &mut narrow, |from, to| to.convert_from_f32_slice(from));
            Tensor::from_vec(narrow, shape, &Device::Cpu)
        }
        DType::F16 => {
            let mut narrow = vec![f16::ZERO; wide.len()];
            convert(&wide, &mut narrow, |from, to| to.convert_from_f32_slice(from));
            Tensor::from_vec(narrow, shape, &Device::Cpu)
        }
        other => bail!("a CPU kernel cannot write {other:?}"),
    }
}

fn convert<A: Sync, B: Send>(from: &[A], to: &mut [B], f: impl Fn(&[A], &mut [B]) + Sync) {
    to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| f(from, to));
}

/// A tensor of f32 with its storage held open.
pub struct View<'a, S> {
    storage: S,
    tensor: &'a Tensor,
}

impl<'a> View<'a, ()> {
    /// `tensor` is f32, as [`widened`] returns it.
    pub fn of(tensor: &'a Tensor) -> View<'a, impl Deref<Target = Storage> + 'a> {
        View { storage: tensor.storage_and_layout().0, tensor }
    }
}

impl<S: Deref<Target = Storage>> View<'_, S> {
    /// All elements from the tensor's first on; those of other tensors of the same storage may lie between and behind.
    pub fn floats(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok(&storage.as_slice::<f32>()?[self.tensor.layout().start_offset()..]),
            _ => bail!("{NOT_HERE}"),
        }
    }

    pub fn strides(&self) -> &[usize] {
        self.tensor.stride()
    }
}

/// A tensor as rows along its last axis, a fixed stride apart; copied only if it is not that already.
pub struct Rows {
    pub tensor: Tensor,
    pub count: usize,
    pub width: usize,
    pub stride: usize,
}

impl Rows {
    /// In f32 whatever the dtype of `x`.
    pub fn of(x: &Tensor) -> Result<Self> {
        let x = widened(x)?;
        let x = if row_stride(&x).is_some() { x } else { x.contiguous()? };
        let width = *x.dims().last().unwrap_or(&1);
        let stride = row_stride(&x).unwrap_or(width);
        Ok(Self { count: x.elem_count() / width.max(1), width, stride, tensor: x })
    }
}

fn row_stride(x: &Tensor) -> Option<usize> {
    let (dims, strides) = (x.dims(), x.stride());
    let last = dims.len().checked_sub(1)?;
    if strides[last] != 1 {
        return None;
    }
    // Axes of one element may have any stride.
    let outer: Vec<usize> = (0..last).filter(|&i| dims[i] != 1).collect();
    let regular = outer.windows(2).all(|pair| strides[pair[0]] == strides[pair[1]] * dims[pair[1]]);
    regular.then(|| outer.last().map_or(dims[last], |&i| strides[i]))
}

/// The elements of a small parameter (a bias, a scale) in f32.
pub fn vector(x: &Tensor, len: usize, what: &str) -> Result<Vec<f32>> {
    if x.elem_count() != len {
        bail!("{what} has {} elements, expected are {len}", x.elem_count())
    }
    x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}
