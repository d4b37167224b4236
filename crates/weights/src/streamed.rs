//! Parameters of layers that are sent to a device for each pass: from the host's memory, where they stay as the device takes
//! them, or from their files.
//!
//! What a file has in another form than the device's (another dtype, LoRAs to be merged, matrices to be quantised) is made on the
//! host: once where it stays there, else at each pass.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use candle_core::{DType, Device, Shape, Tensor};
use retouch_kernels::{
    Fp8Rows, Packed, Part,
    streaming::{Delivery, Feed, Form, Placed, Source, Spec},
};

use crate::{
    Encoding, Matrix, Result, Store, Weights, WeightsError,
    held::{Bytes, Held, HeldPart, Values},
    lora::Added,
    naming::Recipe,
};

/// Smaller ones stay on the host in any case: they would be on their way in vain for most of the time.
const SMALL: usize = 1 << 20;

/// The layers of one part of a model that do not stay on the device.
pub(crate) struct Streamed {
    feed: Arc<dyn Feed>,
    /// Whether what was read stays in the host's memory.
    keep: bool,
    held: Mutex<HashMap<(String, DType), Arc<Held>>>,
    /// What LoRAs add to layers stays on the device.
    added: Mutex<HashMap<String, Option<Added>>>,
}

impl Streamed {
    pub fn new(feed: Arc<dyn Feed>, keep: bool) -> Arc<Self> {
        Arc::new(Self { feed, keep, held: Mutex::default(), added: Mutex::default() })
    }

    /// Begins with the next layer.
    pub fn sender(self: &Arc<Self>) -> Result<Sender> {
        Ok(Sender { streamed: self.clone(), delivery: Arc::new(Mutex::new(self.feed.next()?)) })
    }

    /// A parameter as it was kept, else as it is read now.
    fn held(&self, name: String, dtype: DType, read: impl FnOnce() -> Result<Held>) -> Result<Arc<Held>> {
        let key = (name, dtype);
        if let Some(held) = lock(&self.held).get(&key) {
            return Ok(held.clone());
        }
        let mut held = read()?;
        if !self.keep && held.bytes() >= SMALL {
            return Ok(Arc::new(held));
        }
        held.pin(&*self.feed)?;
        let held = Arc::new(held);
        lock(&self.held).insert(key, held.clone());
        Ok(held)
    }
}

/// Sends the parameters that a layer's code asks for; cheap to clone.
#[derive(Clone)]
pub(crate) struct Sender {
    streamed: Arc<Streamed>,
    /// Dropped with the last clone, when the layer has been run.
    delivery: Arc<Mutex<Box<dyn Delivery>>>,
}

impl Sender {
    /// Says that the layer has all it asked for.
    pub fn finish(&self) -> Result<()> {
        Ok(lock(&self.delivery).finish()?)
    }

    /// What is computed from now on has the parameters.
    pub fn arrive(&self) -> candle_core::Result<()> {
        lock(&self.delivery).arrive()
    }

    pub fn tensor(&self, weights: &Weights, shape: &Shape, full_name: &str, dtype: DType) -> Result<Tensor> {
        let read = || weights.on_host().held_tensor(shape, full_name, dtype);
        match &*self.streamed.held(full_name.to_string(), dtype, read)? {
            Held::Tensor(values) => self.dense(values),
            _ => Err(mixed_up(full_name)),
        }
    }

    pub fn matrix(&self, weights: &Weights, shape: (usize, usize), name: &str) -> Result<Matrix> {
        let full_name = weights.full_name(name);
        let read = || weights.on_host().held_matrix(shape, name);
        match &*self.streamed.held(full_name.clone(), weights.dtype(), read)? {
            Held::Tensor(values) => Ok(Matrix::Dense(self.dense(values)?)),
            Held::Parts(parts) => {
                let parts = parts.iter().map(|part| self.part(part)).collect::<Result<_>>()?;
                Ok(Matrix::Packed(Packed::stack(parts)?))
            }
            Held::Rows { .. } => Err(mixed_up(&full_name)),
        }
    }

    pub fn fp8_rows(&self, weights: &Weights, shape: (usize, usize), name: &str) -> Result<Option<Fp8Rows>> {
        let full_name = weights.full_name(name);
        let read = || match weights.on_host().fp8_rows(shape, name)? {
            Some(Fp8Rows { codes, scales }) => {
                Ok(Held::Rows { codes: Values::of_tensor(codes)?, scales: Values::of_tensor(scales)? })
            }
            None => Err(mixed_up(&full_name)),
        };
        match &*self.streamed.held(full_name.clone(), DType::U8, read)? {
            Held::Rows { codes, scales } => {
                Ok(Some(Fp8Rows { codes: self.dense(codes)?, scales: self.dense(scales)? }))
            }
            _ => Err(mixed_up(&full_name)),
        }
    }

    pub fn added(&self, full_name: &str, make: impl FnOnce() -> Result<Option<Added>>) -> Result<Option<Added>> {
        if let Some(added) = lock(&self.streamed.added).get(full_name) {
            return Ok(added.clone());
        }
        let added = make()?;
        lock(&self.streamed.added).insert(full_name.to_string(), added.clone());
        Ok(added)
    }

    fn part(&self, HeldPart { values, fp8 }: &HeldPart) -> Result<Part> {
        Ok(match (self.put(values)?, fp8) {
            (Placed::Dense(codes), &Some((format, scale))) => Part::Fp8 { codes, format, scale },
            (Placed::Dense(tensor), None) => Part::Dense(tensor),
            (Placed::Blocks(blocks), _) => {
                let (rows, _) = blocks.shape().dims2()?;
                Part::Blocks { blocks, rows: 0..rows }
            }
        })
    }

    fn dense(&self, values: &Values) -> Result<Tensor> {
        match self.put(values)? {
            Placed::Dense(tensor) => Ok(tensor),
            Placed::Blocks(_) => Err(candle_core::Error::Msg("blocks where a tensor is needed".into()).into()),
        }
    }

    fn put(&self, values: &Values) -> Result<Placed> {
        let spec = values.spec.clone();
        let mut delivery = lock(&self.delivery);
        match &values.bytes {
            Bytes::Pinned(pinned) => Ok(delivery.put(spec, Source::Pinned(pinned))?),
            bytes => {
                let placed = bytes.with_pieces(|pieces| Ok(delivery.put(spec, Source::Pieces(pieces))?))?;
                bytes.release();
                Ok(placed)
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same code asks for the same parameters in the same way at each pass.
fn mixed_up(full_name: &str) -> WeightsError {
    candle_core::Error::Msg(format!("`{full_name}` was read in another form before")).into()
}

impl Weights {
    /// As [`Weights::get`] reads it.
    fn held_tensor(&self, shape: &Shape, full_name: &str, dtype: DType) -> Result<Held> {
        self.check_cancelled()?;
        let recipe = self.naming().recipe(full_name);
        self.check_shape(&recipe, shape.dims())?;
        let as_it_is = |part: &String| self.store().in_dtype(part) == Some(dtype);
        let changed = self.adapters().is_some_and(|adapters| adapters.change(full_name));
        if !changed && !matches!(recipe, Recipe::SwappedHalves(_)) && recipe.parts().iter().all(as_it_is) {
            let spec = Spec { form: Form::Dense(dtype), shape: shape.dims().to_vec() };
            return Ok(Held::Tensor(self.in_files(spec, recipe.parts())));
        }
        Ok(Held::Tensor(Values::of_tensor(self.read(shape, full_name, dtype, &Device::Cpu)?)?))
    }

    /// As [`Weights::matrix`] reads it; one in 16 bits of another kind than are computed with is converted on the device.
    fn held_matrix(&self, shape: (usize, usize), name: &str) -> Result<Held> {
        let full_name = self.full_name(name);
        let recipe = self.naming().recipe(&full_name);
        self.check_shape(&recipe, &[shape.0, shape.1])?;
        if self.quantised_as(&recipe, shape, &full_name).is_none() {
            let packed = self.stays_packed(&full_name, &[shape.0, shape.1])?;
            let merged = !packed && self.adapters().is_some_and(|adapters| adapters.change(&full_name));
            if let (Recipe::Same(_) | Recipe::Rows(_), false) = (&recipe, merged)
                && let Some(parts) = recipe.parts().iter().map(|part| self.held_part(part)).collect::<Result<_>>()?
            {
                self.check_cancelled()?;
                return Ok(Held::Parts(parts));
            }
            if !packed {
                return self.held_tensor(&shape.into(), &full_name, self.dtype());
            }
        }
        Ok(match self.matrix(shape, name)? {
            Matrix::Dense(tensor) => Held::Tensor(Values::of_tensor(tensor)?),
            Matrix::Packed(packed) => {
                Held::Parts(packed.parts().iter().cloned().map(HeldPart::of).collect::<Result<_>>()?)
            }
        })
    }

    /// A tensor of the file that goes to the device as it is, and is not in the dtype that is computed with.
    fn held_part(&self, part: &str) -> Result<Option<HeldPart>> {
        let (store, dtype) = (self.store(), self.dtype());
        let half = |half: DType| {
            let as_it_is = dtype != half && store.in_dtype(part) == Some(half);
            as_it_is.then_some((Form::Dense(half), None))
        };
        let form = match store.encoding(part) {
            Some(Encoding::Blocks(kind)) => Some((Form::Blocks(*kind), None)),
            Some(Encoding::Fp8(format)) => Some((Form::Dense(DType::U8), Some((*format, store.scale(part)?)))),
            Some(Encoding::F16) => half(DType::F16),
            Some(Encoding::Bf16) => half(DType::BF16),
            _ => None,
        };
        let (Some((form, fp8)), Some(shape @ [_, _])) = (form, store.shape(part)) else { return Ok(None) };
        let spec = Spec { form, shape: shape.to_vec() };
        Ok(Some(HeldPart { values: self.in_files(spec, &[part.to_string()]), fp8 }))
    }

    fn in_files(&self, spec: Spec, parts: &[String]) -> Values {
        Values { spec, bytes: Bytes::Files(self.shared_store().clone(), parts.to_vec()) }
    }
}

impl Store {
    /// The dtype that a tensor's bytes are in as they are.
    fn in_dtype(&self, name: &str) -> Option<DType> {
        let dtype = match self.encoding(name)? {
            Encoding::F32 => DType::F32,
            Encoding::F16 => DType::F16,
            Encoding::Bf16 => DType::BF16,
            _ => return None,
        };
        (self.scale(name).ok()? == 1.0).then_some(dtype)
    }
}
