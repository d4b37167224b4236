//! A feed of layers on the CPU, which has the form of a GPU's and none of its lateness.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::SeqCst},
};

use candle_core::{
    Device, Result, Tensor, bail,
    quantized::{QStorage, QTensor},
};
use retouch_kernels::streaming::{Delivery, Feed, Form, Pinned, Placed, Source, Spec};

pub struct HostFeed {
    pins: bool,
    counts: Arc<Counts>,
}

#[derive(Default)]
struct Counts {
    layers: AtomicUsize,
    pinned: AtomicUsize,
    pieces: AtomicUsize,
}

impl HostFeed {
    /// With pinned memory or without.
    pub fn new(pins: bool) -> Arc<Self> {
        Arc::new(Self { pins, counts: Arc::default() })
    }

    /// Bytes sent since the last call, from pinned memory and from elsewhere.
    pub fn sent(&self) -> (usize, usize) {
        (self.counts.pinned.swap(0, SeqCst), self.counts.pieces.swap(0, SeqCst))
    }
}

impl Feed for HostFeed {
    fn next(&self) -> Result<Box<dyn Delivery>> {
        if self.counts.layers.fetch_add(1, SeqCst) >= 2 {
            bail!("a third layer")
        }
        Ok(Box::new(Layer { counts: self.counts.clone(), finished: false }))
    }

    fn pin(&self, pieces: &[&[u8]]) -> Option<Pinned> {
        self.pins.then(|| Pinned::new(pieces.concat()))
    }
}

struct Layer {
    counts: Arc<Counts>,
    finished: bool,
}

impl Delivery for Layer {
    fn put(&mut self, spec: Spec, source: Source<'_>) -> Result<Placed> {
        assert!(!self.finished, "sent after the end");
        let (count, bytes) = match source {
            Source::Pinned(pinned) => (&self.counts.pinned, pinned.to_vec()),
            Source::Pieces(pieces) => (&self.counts.pieces, pieces.concat()),
        };
        assert_eq!(bytes.len(), spec.bytes());
        count.fetch_add(bytes.len(), SeqCst);
        let shape = spec.shape.as_slice();
        Ok(match spec.form {
            Form::Dense(dtype) => Placed::Dense(Tensor::from_raw_buffer(&bytes, dtype, shape, &Device::Cpu)?),
            Form::Blocks(kind) => {
                let storage = QStorage::from_data(bytes.into(), &Device::Cpu, kind)?;
                Placed::Blocks(Arc::new(QTensor::new(storage, shape)?))
            }
        })
    }

    fn finish(&mut self) -> Result<()> {
        self.finished = true;
        Ok(())
    }

    fn arrive(&mut self) -> Result<()> {
        assert!(self.finished, "computed with before the end");
        Ok(())
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.counts.layers.fetch_sub(1, SeqCst);
    }
}
