//! What a model module takes its parameters from: a store, the naming of its tensors, a prefix, a dtype and a device.

use std::{
    fmt::Display,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use candle_core::{DType, Device, Shape, Tensor};
use candle_nn::{VarBuilder, var_builder::SimpleBackend};
use retouch_kernels::{Fp8, Fp8Rows, Kernels, Packed, Part, streaming::Feed};

use crate::{
    Adapters, Component, Encoding, Matrix, Result, Store, WeightsError,
    convert::{self, Target},
    lora::{Added, merge},
    naming::{Naming, Recipe},
    streamed::Sender,
    tally::{self, Tally},
};

/// A place in a tree of parameters; cheap to clone.
///
/// ```ignore
/// let q = weights.pp("attn").pp("to_q").get((hidden, hidden), "weight")?;
/// ```
#[derive(Clone)]
pub struct Weights {
    store: Arc<Store>,
    naming: Arc<dyn Naming>,
    prefix: String,
    dtype: DType,
    device: Device,
    kernels: &'static dyn Kernels,
    quantisation: Option<(Component, Target)>,
    fp8: bool,
    cancel: Option<Arc<AtomicBool>>,
    adapters: Option<Arc<Adapters>>,
    /// Nothing is read where there is one.
    tally: Option<Arc<Tally>>,
    feed: Option<Arc<dyn Feed>>,
    /// Of the layer that is read, where it does not stay on the device.
    sender: Option<Sender>,
    /// Whether what is read is in the host's memory on its way to a device.
    to_be_sent: bool,
}

impl Weights {
    /// `naming` turns the names that the model's code asks for into those in the store.
    pub fn new(store: Store, naming: impl Naming + 'static, dtype: DType, device: &Device) -> Self {
        Self {
            store: Arc::new(store),
            naming: Arc::new(naming),
            prefix: String::new(),
            dtype,
            device: device.clone(),
            kernels: retouch_kernels::for_device(device),
            quantisation: None,
            fp8: false,
            cancel: None,
            adapters: None,
            tally: None,
            feed: None,
            sender: None,
            to_be_sent: false,
        }
    }

    /// The parameters below `name`.
    pub fn pp(&self, name: impl Display) -> Self {
        let prefix = self.full_name(&name.to_string());
        Self { prefix, ..self.clone() }
    }

    /// The same parameters, converted to another dtype when read.
    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dtype, ..self.clone() }
    }

    /// The same parameters, those of `component`: its large matrices become `target` when read, a few rows at a time, where the
    /// file does not have them in fewer bits already.
    pub fn quantised(self, component: Component, target: Target) -> Self {
        Self { quantisation: Some((component, target)), ..self }
    }

    /// The same parameters, those of a transformer: the matrices of its blocks are multiplied as 8-bit floats.
    pub fn in_fp8(self) -> Self {
        Self { fp8: true, ..self }
    }

    /// The same parameters, of which none is read any more once `cancel` is set: all of a large model take minutes.
    pub fn with_cancel(self, cancel: Arc<AtomicBool>) -> Self {
        Self { cancel: Some(cancel), ..self }
    }

    pub(crate) fn without_cancel(&self) -> Self {
        Self { cancel: None, ..self.clone() }
    }

    /// The same parameters changed by LoRAs, which were matched to them.
    ///
    /// What is dense when read has the changes merged: computed and added in f32, rounded once. Matrices that stay in
    /// fewer bits stay as they are, and their layers add the changes to their outputs.
    pub fn with_adapters(self, adapters: Arc<Adapters>) -> Self {
        Self { adapters: Some(adapters), ..self }
    }

    /// The same parameters; those of layers that do not stay on the device are sent to it by `feed`, and not by the device's own.
    pub fn with_feed(self, feed: Arc<dyn Feed>) -> Self {
        Self { feed: Some(feed), ..self }
    }

    /// What sends layers to the device while it computes, where it can.
    pub(crate) fn feed(&self) -> Option<Arc<dyn Feed>> {
        self.feed.clone().or_else(|| retouch_kernels::streaming::feed(&self.device))
    }

    /// The same parameters, which are sent to the device.
    pub(crate) fn sent_by(&self, sender: Sender) -> Self {
        Self { sender: Some(sender), ..self.clone() }
    }

    /// The same parameters in the host's memory, to be sent to the device.
    pub(crate) fn on_host(&self) -> Self {
        let kernels = retouch_kernels::for_device(&Device::Cpu);
        Self { device: Device::Cpu, kernels, sender: None, to_be_sent: true, ..self.clone() }
    }

    /// Whether the CPU computes with what is read.
    pub(crate) fn stays_on_cpu(&self) -> bool {
        self.device.is_cpu() && !self.to_be_sent
    }

    pub(crate) fn with_tally(&self, tally: Arc<Tally>) -> Self {
        Self { tally: Some(tally), ..self.clone() }
    }

    /// How matrices are taken to be stored, if they are nowhere.
    pub(crate) fn assumed_target(&self) -> Option<Target> {
        self.tally.as_ref()?.assumed
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The operations of the device, for a module to keep.
    pub fn kernels(&self) -> &'static dyn Kernels {
        self.kernels
    }

    /// The same parameters for modules that compute with other operations than the device's usual ones.
    pub fn with_kernels(self, kernels: &'static dyn Kernels) -> Self {
        Self { kernels, ..self }
    }

    /// The store behind, for looking at names and shapes.
    pub fn store(&self) -> &Store {
        &self.store
    }

    pub(crate) fn shared_store(&self) -> &Arc<Store> {
        &self.store
    }

    pub(crate) fn naming(&self) -> &dyn Naming {
        &*self.naming
    }

    pub fn has(&self, name: &str) -> bool {
        self.naming.recipe(&self.full_name(name)).parts().iter().all(|part| self.store.has(part))
    }

    /// The shape of a parameter, if it is there; nothing is read.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.shape_by_full_name(&self.full_name(name))
    }

    pub(crate) fn shape_by_full_name(&self, full_name: &str) -> Option<Vec<usize>> {
        self.shape_of(&self.naming.recipe(full_name))
    }

    /// Reads a parameter and checks its shape.
    pub fn get(&self, shape: impl Into<Shape>, name: &str) -> Result<Tensor> {
        self.read(&shape.into(), &self.full_name(name), self.dtype, &self.device)
    }

    /// Reads the matrix `shape` (out, in) of a linear layer and checks its shape.
    ///
    /// What the file holds in fewer bits than are computed with stays in them.
    pub fn matrix(&self, shape: (usize, usize), name: &str) -> Result<Matrix> {
        if let Some(sender) = &self.sender {
            return sender.matrix(self, shape, name);
        }
        let full_name = self.full_name(name);
        self.check_cancelled()?;
        let recipe = self.naming.recipe(&full_name);
        if let Some(tally) = &self.tally {
            if tally.assumed.is_none() {
                self.check_shape(&recipe, &[shape.0, shape.1])?;
            }
            let bytes = self.matrix_bytes(&recipe, shape, &full_name);
            return tally.matrix(full_name, shape, self.dtype, bytes);
        }
        self.check_shape(&recipe, &[shape.0, shape.1])?;
        if let Some(target) = self.quantised_as(&recipe, shape, &full_name) {
            return Ok(Matrix::Packed(convert::quantised(self, name, shape, target)?));
        }
        let packed = |part: &String| self.store.packed(part, self.dtype, &self.device);
        let parts = recipe.parts().iter().map(packed).collect::<Result<Vec<_>>>()?;
        if matches!(recipe, Recipe::Reshaped(_)) || parts.iter().all(Option::is_none) {
            return Ok(Matrix::Dense(self.read(&shape.into(), &full_name, self.dtype, &self.device)?));
        }
        let parts = parts.into_iter().zip(recipe.parts()).map(|(packed, name)| match packed {
            Some(part) => Ok(part),
            None => Ok(Part::Dense(self.store.tensor(name, self.dtype, &self.device)?)),
        });
        let packed = Packed::stack(parts.collect::<Result<_>>()?)?;
        Ok(Matrix::Packed(match recipe {
            Recipe::SwappedHalves(_) => {
                let (rows, half) = (packed.rows(), packed.rows() / 2);
                let halves = [packed.narrow(half..rows)?, packed.narrow(0..half)?];
                Packed::stack(halves.iter().flat_map(Packed::parts).cloned().collect())?
            }
            _ => packed,
        }))
    }

    /// The matrix `shape` (out, in) of a linear layer, checked, if it is multiplied as 8-bit floats.
    ///
    /// What the file has in such floats is taken as it is, everything else is rounded a row at a time.
    pub fn fp8_rows(&self, shape: (usize, usize), name: &str) -> Result<Option<Fp8Rows>> {
        let full_name = self.full_name(name);
        if !self.fp8 || !convert::is_worthwhile(Component::Transformer, &full_name, shape) {
            return Ok(None);
        }
        if let Some(sender) = &self.sender {
            return sender.fp8_rows(self, shape, name);
        }
        self.check_cancelled()?;
        let recipe = self.naming.recipe(&full_name);
        if self.assumed_target().is_none() {
            self.check_shape(&recipe, &[shape.0, shape.1])?;
        }
        if let Some(tally) = &self.tally {
            let scales = tally.tensor(format!("{full_name}.scales"), &shape.0.into(), DType::F32)?;
            return Ok(Some(Fp8Rows { codes: tally.tensor(full_name, &shape.into(), DType::U8)?, scales }));
        }
        let rows = |part: &String| {
            Ok(match self.store.packed(part, DType::F32, &self.device)? {
                Some(Part::Fp8 { codes, format: Fp8::E4m3, scale }) => {
                    Fp8Rows { scales: Tensor::full(scale, codes.dim(0)?, &self.device)?, codes }
                }
                Some(Part::Dense(half)) => self.kernels.quantise_rows(&half)?,
                Some(part) => self.kernels.quantise_rows(&part.dequantise(DType::F32)?)?,
                None => self.kernels.quantise_rows(&self.store.tensor(part, DType::F32, &self.device)?)?,
            })
        };
        // The blocks' matrices are tensors of the file, or several on top of each other.
        Ok(Some(Fp8Rows::stack(&recipe.parts().iter().map(rows).collect::<Result<Vec<_>>>()?)?))
    }

    /// The rows `range` of a parameter along its first axis, in f32 on the CPU: `[rows, elements of a row]`.
    pub fn rows(&self, name: &str, range: Range<usize>) -> Result<Tensor> {
        self.check_cancelled()?;
        let recipe = self.naming.recipe(&self.full_name(name));
        // Where each of the parts' rows begin: (part, its first row, its rows).
        let rows_of = |part: &String| self.store.shape(part).and_then(<[usize]>::first).copied().unwrap_or(1);
        let pieces: Vec<(&String, usize, usize)> = match &recipe {
            Recipe::SwappedHalves(part) => {
                let half = rows_of(part) / 2;
                vec![(part, half, half), (part, 0, half)]
            }
            other => other.parts().iter().map(|part| (part, 0, rows_of(part))).collect(),
        };
        let (mut before, mut read) = (0, Vec::new());
        for (part, first, rows) in pieces {
            let (start, end) = (range.start.max(before), range.end.min(before + rows));
            if start < end {
                read.push(self.store.rows(part, first + start - before..first + end - before)?);
            }
            before += rows;
        }
        Ok(if read.len() == 1 { read.remove(0) } else { Tensor::cat(&read, 0)? })
    }

    /// How the file holds a parameter; of stacked tensors the first one speaks for all.
    pub fn stored_encoding(&self, name: &str) -> Option<&Encoding> {
        self.store.encoding(&self.naming.recipe(&self.full_name(name)).parts()[0])
    }

    /// The tensor that a parameter is, where it is one as it is in the file.
    pub fn single_tensor(&self, name: &str) -> Option<String> {
        match self.naming.recipe(&self.full_name(name)) {
            Recipe::Same(part) => Some(part),
            _ => None,
        }
    }

    pub(crate) fn adapters(&self) -> Option<&Arc<Adapters>> {
        self.adapters.as_ref()
    }

    /// Whether a parameter is a matrix that has fewer bits in memory than are computed with, by its whole name.
    pub(crate) fn stays_packed(&self, full_name: &str, shape: &[usize]) -> Result<bool> {
        let &[out, input] = shape else { return Ok(false) };
        let recipe = self.naming.recipe(full_name);
        if self.quantised_as(&recipe, (out, input), full_name).is_some() {
            return Ok(true);
        }
        for part in recipe.parts() {
            if self.store.stays_packed(part, self.dtype)? {
                return Ok(!matches!(recipe, Recipe::Reshaped(_)));
            }
        }
        Ok(false)
    }

    /// What LoRAs add to the output of this layer of `out` outputs, if its matrix stays as it is.
    pub(crate) fn added(&self, out: usize) -> Result<Option<Added>> {
        let Some(adapters) = &self.adapters else { return Ok(None) };
        let full_name = self.full_name("weight");
        let make = || Ok(Added::new(adapters.pieces(&full_name, self)?, out, self.dtype)?);
        match &self.sender {
            Some(sender) => sender.added(&full_name, make),
            None => make(),
        }
    }

    /// A view of this place for modules written against candle's own [`VarBuilder`].
    pub fn var_builder(&self) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), self.dtype, self.device.clone())
    }

    pub(crate) fn full_name(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    pub(crate) fn read(&self, shape: &Shape, full_name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        if let Some(sender) = &self.sender {
            return sender.tensor(self, shape, full_name, dtype);
        }
        match &self.adapters {
            Some(adapters) if adapters.change(full_name) => {
                let parameter = self.read_unchanged(shape, full_name, DType::F32, device)?;
                merge(&parameter, &adapters.pieces(full_name, self)?)?;
                Ok(parameter.to_dtype(dtype)?)
            }
            _ => self.read_unchanged(shape, full_name, dtype, device),
        }
    }

    fn read_unchanged(&self, shape: &Shape, full_name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.check_cancelled()?;
        let recipe = self.naming.recipe(full_name);
        if let Some(tally) = self.tally.as_ref().filter(|tally| tally.assumed.is_some()) {
            return tally.tensor(full_name.to_string(), shape, dtype);
        }
        // Against the header first: a file of another model is refused before gigabytes of it are read.
        self.check_shape(&recipe, shape.dims())?;
        if let Some(tally) = &self.tally {
            return tally.tensor(full_name.to_string(), shape, dtype);
        }
        let read = |part: &String| self.store.tensor(part, dtype, device);
        Ok(match &recipe {
            Recipe::Same(part) => read(part)?,
            Recipe::Reshaped(part) => read(part)?.reshape(shape)?,
            Recipe::Rows(parts) => {
                // Each to its place: joined when all are there, they would be in memory twice.
                let (all, mut rows) = (Tensor::zeros(shape, dtype, device)?, 0);
                for part in parts {
                    let part = read(part)?;
                    all.slice_set(&part, 0, rows)?;
                    rows += part.dim(0)?;
                }
                all
            }
            Recipe::SwappedHalves(part) => {
                let (whole, half) = (read(part)?, shape.dims()[0] / 2);
                Tensor::cat(&[whole.narrow(0, half, half)?, whole.narrow(0, 0, half)?], 0)?
            }
        })
    }

    /// What a matrix is quantised to when it is read, if it is.
    pub(crate) fn quantised_as(&self, recipe: &Recipe, shape: (usize, usize), full_name: &str) -> Option<Target> {
        let (component, target) = self.quantisation?;
        let is_small = |part| matches!(self.store.encoding(part), Some(Encoding::Blocks(_) | Encoding::Fp8(_)));
        let small = recipe.parts().iter().any(|part| is_small(part));
        (convert::is_worthwhile(component, full_name, shape) && !small).then_some(target)
    }

    /// What a matrix will take in memory.
    fn matrix_bytes(&self, recipe: &Recipe, shape: (usize, usize), full_name: &str) -> u64 {
        if let Some(target) = self.quantised_as(recipe, shape, full_name) {
            return tally::matrix_bytes(target, shape, self.dtype);
        }
        match recipe {
            Recipe::Reshaped(_) => (shape.0 * shape.1 * self.dtype.size_in_bytes()) as u64,
            _ => recipe.parts().iter().map(|part| self.bytes_in_memory(part)).sum(),
        }
    }

    /// What a tensor of the file takes as a part of a matrix: no more bits than are computed with.
    fn bytes_in_memory(&self, part: &str) -> u64 {
        let values: usize = self.store.shape(part).map_or(0, elements);
        let dense = values.saturating_mul(self.dtype.size_in_bytes());
        self.store.bytes(part).map_or(dense, |stored| stored.min(dense)) as u64
    }

    pub(crate) fn check_cancelled(&self) -> Result<()> {
        let cancelled = self.cancel.as_ref().is_some_and(|cancel| cancel.load(Ordering::Relaxed));
        if cancelled { Err(WeightsError::Cancelled) } else { Ok(()) }
    }

    /// The shape of the parameter that `recipe` makes, where its parts are there and fit each other.
    fn shape_of(&self, recipe: &Recipe) -> Option<Vec<usize>> {
        let mut parts = recipe.parts().iter().map(|part| self.store.shape(part));
        let mut shape = parts.next()??.to_vec();
        for part in parts {
            let (rows, rest) = part?.split_first()?;
            let (total, expected) = shape.split_first_mut()?;
            if rest != expected {
                return None;
            }
            *total += rows;
        }
        Some(shape)
    }

    pub(crate) fn check_shape(&self, recipe: &Recipe, expected: &[usize]) -> Result<()> {
        let parts = recipe.parts();
        for part in parts {
            if !self.store.has(part) {
                return Err(WeightsError::MissingTensor { files: self.store.describe(), tensor: part.clone() });
            }
        }
        let fits = match (self.shape_of(recipe), recipe) {
            (Some(found), Recipe::Reshaped(_)) => elements(&found) == elements(expected),
            (Some(found), Recipe::SwappedHalves(_)) => {
                found == expected && found.first().is_some_and(|rows| rows.is_multiple_of(2))
            }
            (Some(found), _) => found == expected,
            (None, _) => false,
        };
        if fits {
            return Ok(());
        }
        // Of stacked parts, either one does not fit its neighbours, or all of them together have too many rows.
        let found = self.shape_of(recipe).or_else(|| {
            let misfit = |part: &String| self.store.shape(part).filter(|shape| shape.get(1..) != expected.get(1..));
            parts.iter().find_map(misfit).map(<[usize]>::to_vec)
        });
        Err(WeightsError::WrongShape {
            file: self.store.file_of(&parts[0]),
            tensor: parts.join(" + "),
            expected: expected.to_vec(),
            found: found.unwrap_or_default(),
        })
    }
}

fn elements(shape: &[usize]) -> usize {
    shape.iter().product()
}

impl SimpleBackend for Weights {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: candle_nn::Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        self.read(&shape, &self.full_name(name), dtype, device).map_err(candle_core::Error::from)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> candle_core::Result<Tensor> {
        let name = self.full_name(name);
        let recipe = self.naming.recipe(&name);
        // Without a shape to expect, the file's own is taken; where its parts do not fit, `read` says why.
        let shape = Shape::from(self.shape_of(&recipe).unwrap_or_default());
        self.read(&shape, &name, dtype, device).map_err(candle_core::Error::from)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.has(name)
    }
}
