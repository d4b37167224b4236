//! A GPU's two lanes: the device's stream, in which everything is computed, and one for copies.

use std::{ops::Deref, slice, sync::Arc};

use candle_core::{
    CudaDevice, Device, Result, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaEvent, CudaStream, PinnedHostSlice, result},
    },
    quantized::{QStorage, QTensor, cuda::QCudaStorage},
};

use super::{
    device::address,
    slots::{Lanes, Slots},
    upload::{copy, send_pieces},
};
use crate::streaming::{Feed, Form, Pinned, Placed, Source, Spec};

/// What is sent at a time, so that the small copies of the computation get a turn on the bus.
const PIECE: usize = 8 << 20;

/// None where there is no second stream to be had.
pub fn feed(device: &CudaDevice) -> Option<Arc<dyn Feed>> {
    let copies = device.cuda_stream().context().new_stream().ok()?;
    Some(Arc::new(Slots::new(Streams { device: device.clone(), copies })))
}

struct Streams {
    device: CudaDevice,
    copies: Arc<CudaStream>,
}

impl Lanes for Streams {
    /// candle takes and gives back a tensor's memory in the device's stream.
    type Place = Placed;
    type Mark = CudaEvent;

    fn place(&self, spec: &Spec) -> Result<Placed> {
        let shape = spec.shape.as_slice();
        Ok(match spec.form {
            Form::Dense(dtype) => {
                // SAFETY: numbers of any value are valid, and what computes with them waits for all of them.
                Placed::Dense(unsafe { Tensor::empty(shape, dtype, &Device::Cuda(self.device.clone())) }?)
            }
            Form::Blocks(kind) => {
                let storage = QCudaStorage::zeros(&self.device, shape.iter().product(), kind)?;
                Placed::Blocks(Arc::new(QTensor::new(QStorage::Cuda(storage), shape)?))
            }
        })
    }

    fn send(&self, place: &Placed, source: Source<'_>) -> Result<()> {
        let start = match place {
            Placed::Dense(tensor) => address(tensor)?,
            Placed::Blocks(blocks) => blocks.device_ptr()?.addr() as u64,
        };
        match source {
            Source::Pieces(pieces) => send_pieces(pieces, start, &self.copies),
            Source::Pinned(memory) => {
                self.copies.context().bind_to_thread().w()?;
                for (i, piece) in memory.chunks(PIECE).enumerate() {
                    let to = start + (i * PIECE) as u64;
                    // SAFETY: within the place, which is as large, and is neither given back nor computed with before the
                    // copy's end; nobody writes to `memory`, which waits for it when dropped.
                    unsafe { result::memcpy_htod_async(to, piece, self.copies.cu_stream()) }.w()?;
                }
                Ok(())
            }
        }
    }

    fn copied(&self) -> Result<CudaEvent> {
        self.copies.record_event(None).w()
    }

    fn computed(&self) -> Result<CudaEvent> {
        self.device.cuda_stream().record_event(None).w()
    }

    fn copy_after(&self, mark: &CudaEvent) -> Result<()> {
        self.copies.wait(mark).w()
    }

    fn compute_after(&self, mark: &CudaEvent) -> Result<()> {
        self.device.cuda_stream().wait(mark).w()
    }

    fn pin(&self, pieces: &[&[u8]]) -> Option<Pinned> {
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        // SAFETY: written before it is read.
        let mut memory = unsafe { self.copies.context().alloc_pinned::<u8>(bytes) }.ok()?;
        let mut rest = memory.as_mut_slice().ok()?;
        for piece in pieces {
            let (to, after) = rest.split_at_mut(piece.len());
            copy(piece, to);
            rest = after;
        }
        let start = memory.as_ptr().ok()?;
        Some(Pinned::new(Memory { start, memory, copies: self.copies.clone() }))
    }
}

/// Pinned memory that the stream of the copies reads.
struct Memory {
    start: *const u8,
    memory: PinnedHostSlice<u8>,
    copies: Arc<CudaStream>,
}

// SAFETY: `start` is that of `memory`, which is both, and nobody writes to it.
unsafe impl Send for Memory {}
unsafe impl Sync for Memory {}

impl Deref for Memory {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: as long as `memory`, and all of it was written.
        unsafe { slice::from_raw_parts(self.start, self.memory.len()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // What still reads it; an error is one of the GPU, which then reads nothing.
        let _ = self.copies.synchronize();
    }
}
