//! What a model's parameters will take in memory, counted by the very code that loads them, with nothing read.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{DType, Device, Shape, Tensor};

use crate::{Matrix, Result, Store, Weights, convert::Target, naming::SameNames};

/// Bytes of a matrix in memory that is stored as `target`, where nothing is kept in more bits than `dtype`, which is computed
/// with. Rows that are no whole number of blocks are stored in 16 bits.
pub(crate) fn matrix_bytes(target: Target, (out, input): (usize, usize), dtype: DType) -> u64 {
    let dense = (out as u64).saturating_mul(input as u64);
    let stored = target.encoding().bytes(&[out, input]).map_or(2 * dense, |bytes| bytes as u64);
    stored.min(dense.saturating_mul(dtype.size_in_bytes() as u64))
}

/// Bytes in memory by the names of parameters.
pub type Counted = BTreeMap<String, u64>;

/// Collects what is asked for.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    counted: Mutex<Counted>,
    /// How matrices are taken to be stored, where no file says it.
    pub assumed: Option<Target>,
}

impl Tally {
    fn add(&self, name: String, bytes: u64) {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).insert(name, bytes);
    }

    /// A parameter without values.
    pub fn tensor(&self, name: String, shape: &Shape, dtype: DType) -> Result<Tensor> {
        self.add(name, (shape.elem_count() as u64).saturating_mul(dtype.size_in_bytes() as u64));
        hollow(shape, dtype)
    }

    /// A matrix without values; `stored` is what its parts will take, where a file says it.
    pub fn matrix(&self, name: String, shape: (usize, usize), dtype: DType, stored: u64) -> Result<Matrix> {
        self.add(name, self.assumed.map_or(stored, |target| matrix_bytes(target, shape, dtype)));
        Ok(Matrix::Dense(hollow(&shape.into(), dtype)?))
    }
}

/// One zero seen from everywhere.
fn hollow(shape: &Shape, dtype: DType) -> Result<Tensor> {
    Ok(Tensor::zeros((), dtype, &Device::Cpu)?.broadcast_as(shape)?)
}

impl Weights {
    /// What `load` will keep in memory. It gets parameters of the right shapes without values, and must not compute.
    pub fn count<T>(&self, load: impl FnOnce(&Self) -> Result<T>) -> Result<Counted> {
        let tally = Arc::new(Tally { assumed: self.assumed_target(), ..Tally::default() });
        load(&self.with_tally(tally.clone()))?;
        let mut counted = tally.counted.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::take(&mut *counted))
    }

    /// Weights of a model that is not there, for [`Self::count`] alone: they have whatever shape is asked for, and their
    /// matrices are stored as `target`.
    pub fn assumed(target: Target, dtype: DType) -> Result<Self> {
        let tally = Tally { assumed: Some(target), ..Tally::default() };
        Ok(Self::new(Store::open(Vec::new())?, SameNames, dtype, &Device::Cpu).with_tally(Arc::new(tally)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_take_their_bits_and_never_more_than_is_computed_with() {
        let bytes = |name: &str, input, dtype| matrix_bytes(name.parse().unwrap(), (4, input), dtype);
        assert_eq!(bytes("q8_0", 512, DType::BF16), 4 * 512 * 34 / 32);
        assert_eq!(bytes("q4_k", 512, DType::F32), 4 * 512 * 144 / 256);
        assert_eq!(bytes("fp8", 512, DType::BF16), 4 * 512);
        assert_eq!(bytes("bf16", 512, DType::F32), 4 * 512 * 2);
        // No whole number of blocks.
        assert_eq!(bytes("q4_k", 64, DType::F32), 4 * 64 * 2);
    }

    #[test]
    fn nothing_is_counted_twice_or_read() -> Result<()> {
        let weights = Weights::assumed("q8_0".parse().unwrap(), DType::F32)?;
        // A terabyte, were it read.
        let counted = weights.count(|weights| {
            let weights = weights.pp("a");
            weights.matrix((1 << 20, 1 << 18), "weight")?;
            weights.get(1 << 20, "bias")?;
            weights.get(1 << 20, "bias")
        })?;
        let expected = [("a.bias".to_string(), 4 << 20), ("a.weight".to_string(), (1 << 38) / 32 * 34)];
        assert_eq!(counted, Counted::from(expected));
        Ok(())
    }
}
