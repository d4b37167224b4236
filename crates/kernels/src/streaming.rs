//! Parameters of layers that do not stay on a GPU: sent to it for each pass, while it computes with those of the layer before.

use std::{fmt, ops::Deref, sync::Arc};

use candle_core::{
    DType, Device, Result, Tensor,
    quantized::{GgmlDType, QTensor},
};

/// How values lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Dense(DType),
    /// Blocks of GGUF along the last axis.
    Blocks(GgmlDType),
}

/// What a place on the device is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    pub form: Form,
    pub shape: Vec<usize>,
}

impl Spec {
    pub fn bytes(&self) -> usize {
        let values: usize = self.shape.iter().product();
        match self.form {
            Form::Dense(dtype) => values * dtype.size_in_bytes(),
            Form::Blocks(kind) => values / kind.block_size() * kind.type_size(),
        }
    }
}

/// Values in their place on the device; cheap to clone.
#[derive(Debug, Clone)]
pub enum Placed {
    Dense(Tensor),
    Blocks(Arc<QTensor>),
}

/// Memory of the host from which the device reads by itself, at the bus's full rate; cheap to clone.
#[derive(Clone)]
pub struct Pinned(Arc<dyn Deref<Target = [u8]> + Send + Sync>);

impl Pinned {
    /// `memory` stays where it is until it is dropped, and waits then for what still reads from it.
    pub fn new(memory: impl Deref<Target = [u8]> + Send + Sync + 'static) -> Self {
        Self(Arc::new(memory))
    }
}

impl Deref for Pinned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.len())
    }
}

/// Where values are sent from.
#[derive(Debug, Clone, Copy)]
pub enum Source<'a> {
    Pinned(&'a Pinned),
    /// Any memory, one piece after the other; read before the call returns.
    Pieces(&'a [&'a [u8]]),
}

impl Source<'_> {
    pub fn bytes(&self) -> usize {
        match self {
            Self::Pinned(pinned) => pinned.len(),
            Self::Pieces(pieces) => pieces.iter().map(|piece| piece.len()).sum(),
        }
    }
}

/// Sends layers to a device, one after the other. Two of them are there at a time: the one that is computed with, and the next.
pub trait Feed: Send + Sync {
    /// Begins the next layer, in the memory of the one before the last.
    ///
    /// # Errors
    /// While there are two layers, and those of the device.
    fn next(&self) -> Result<Box<dyn Delivery>>;

    /// These bytes, one piece after the other, in pinned memory; none where there is none to be had.
    fn pin(&self, pieces: &[&[u8]]) -> Option<Pinned>;
}

/// A layer on its way to the device, and then there. Dropped when all that computes with it is in the device's queue: its
/// memory is the next layer's as soon as that has been computed.
pub trait Delivery: Send {
    /// Sends values; they may be used after [`Self::arrive`].
    ///
    /// # Errors
    /// More or fewer bytes than the values have, and those of the device.
    fn put(&mut self, spec: Spec, source: Source<'_>) -> Result<Placed>;

    /// Says that these were all. Until then the next layer is not begun.
    fn finish(&mut self) -> Result<()>;

    /// What is computed from now on waits, in the device's queue, until all values are there. The caller does not.
    fn arrive(&mut self) -> Result<()>;
}

/// A feed for a device that can copy while it computes.
pub fn feed(device: &Device) -> Option<Arc<dyn Feed>> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::feed(device),
        _ => None,
    }
}
