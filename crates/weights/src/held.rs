//! Parameters on the host in the form in which a device takes them.

use std::{ops::Range, sync::Arc};

use candle_core::{CpuStorage, Storage, Tensor, WithDType, bail, quantized::QTensor};
use retouch_kernels::{
    Fp8, Part,
    streaming::{Feed, Form, Pinned, Spec},
};

use crate::{Result, Store};

/// A parameter.
pub(crate) enum Held {
    Tensor(Values),
    /// A matrix in fewer bits than are computed with, its rows from above.
    Parts(Vec<HeldPart>),
    /// A matrix in 8-bit floats that are multiplied as they are.
    Rows {
        codes: Values,
        scales: Values,
    },
}

pub(crate) struct HeldPart {
    pub values: Values,
    /// Of 8-bit floats.
    pub fp8: Option<(Fp8, f32)>,
}

/// Values in one form and place.
pub(crate) struct Values {
    pub spec: Spec,
    pub bytes: Bytes,
}

/// Where values are.
pub(crate) enum Bytes {
    /// In tensors of files, one after the other.
    Files(Arc<Store>, Vec<String>),
    Tensor(Tensor),
    /// In some of the rows.
    Blocks(Arc<QTensor>, Range<usize>),
    Pinned(Pinned),
}

impl Held {
    pub fn bytes(&self) -> usize {
        self.values().map(|values| values.spec.bytes()).sum()
    }

    fn values(&self) -> impl Iterator<Item = &Values> {
        let (two, parts): ([Option<&Values>; 2], &[HeldPart]) = match self {
            Self::Tensor(values) => ([Some(values), None], &[]),
            Self::Parts(parts) => ([None, None], parts),
            Self::Rows { codes, scales } => ([Some(codes), Some(scales)], &[]),
        };
        two.into_iter().flatten().chain(parts.iter().map(|part| &part.values))
    }

    /// Moves all values to pinned memory, if there is some to be had.
    pub fn pin(&mut self, feed: &dyn Feed) -> Result<()> {
        match self {
            Self::Tensor(values) => values.pin(feed),
            Self::Parts(parts) => parts.iter_mut().try_for_each(|part| part.values.pin(feed)),
            Self::Rows { codes, scales } => codes.pin(feed).and_then(|()| scales.pin(feed)),
        }
    }
}

impl HeldPart {
    /// One on the CPU.
    pub fn of(part: Part) -> Result<Self> {
        Ok(match part {
            Part::Dense(tensor) => Self { values: Values::of_tensor(tensor)?, fp8: None },
            Part::Fp8 { codes, format, scale } => {
                Self { values: Values::of_tensor(codes)?, fp8: Some((format, scale)) }
            }
            Part::Blocks { blocks, rows } => {
                let (_, columns) = blocks.shape().dims2()?;
                let spec = Spec { form: Form::Blocks(blocks.dtype()), shape: vec![rows.len(), columns] };
                Self { values: Values { spec, bytes: Bytes::Blocks(blocks, rows) }, fp8: None }
            }
        })
    }
}

impl Values {
    /// Those of a tensor on the CPU.
    pub fn of_tensor(tensor: Tensor) -> Result<Self> {
        let spec = Spec { form: Form::Dense(tensor.dtype()), shape: tensor.dims().to_vec() };
        Ok(Self { spec, bytes: Bytes::Tensor(tensor.contiguous()?) })
    }

    fn pin(&mut self, feed: &dyn Feed) -> Result<()> {
        if let Some(pinned) = self.bytes.with_pieces(|pieces| Ok(feed.pin(pieces)))? {
            self.bytes.release();
            self.bytes = Bytes::Pinned(pinned);
        }
        Ok(())
    }
}

impl Bytes {
    /// Hands over the bytes, one piece after the other.
    pub fn with_pieces<T>(&self, f: impl FnOnce(&[&[u8]]) -> Result<T>) -> Result<T> {
        match self {
            Self::Files(store, names) => {
                let pieces = names.iter().map(|name| store.bytes_of(name)).collect::<Result<Vec<_>>>()?;
                f(&pieces)
            }
            Self::Tensor(tensor) => {
                let (storage, layout) = tensor.storage_and_layout();
                let all = bytes_of(&storage)?;
                let size = tensor.dtype().size_in_bytes();
                let start = layout.start_offset() * size;
                f(&[&all[start..start + tensor.elem_count() * size]])
            }
            Self::Blocks(blocks, rows) => {
                let (all, data) = (blocks.shape().dims2()?.0, blocks.data()?);
                let row = data.len() / all.max(1);
                f(&[&data[rows.start * row..rows.end * row]])
            }
            Self::Pinned(pinned) => f(&[pinned]),
        }
    }

    /// Says that they were read: gives pages of files back.
    pub fn release(&self) {
        if let Self::Files(store, names) = self {
            names.iter().for_each(|name| store.release(name));
        }
    }
}

/// Of the dtypes that weights have.
fn bytes_of(storage: &Storage) -> candle_core::Result<&[u8]> {
    /// Of plain numbers.
    fn bytes<T: WithDType>(values: &[T]) -> &[u8] {
        // SAFETY: any bits are bytes; values are aligned to bytes, so that all of them are in the middle.
        unsafe { values.align_to().1 }
    }
    match storage {
        Storage::Cpu(CpuStorage::U8(values)) => Ok(values),
        Storage::Cpu(CpuStorage::F32(values)) => Ok(bytes(values)),
        Storage::Cpu(CpuStorage::F16(values)) => Ok(bytes(values)),
        Storage::Cpu(CpuStorage::BF16(values)) => Ok(bytes(values)),
        other => bail!("weights in {:?} on {:?} cannot be sent", other.dtype(), other.device().location()),
    }
}
