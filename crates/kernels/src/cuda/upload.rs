//! Tensors from bytes of the host, such as mapped files of weights, through pinned buffers: the bus takes from them at its full
//! rate, and all threads fill them, so that pages of a file are fetched by several at a time.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use candle_core::{
    CudaDevice, DType, Device, Result, Tensor,
    cuda_backend::{
        WrapErr,
        cudarc::driver::{CudaEvent, CudaStream, DriverError, PinnedHostSlice, result, sys},
    },
};
use rayon::prelude::*;

use super::{
    device::address,
    staging::{Buffers, send},
};

/// What fewer bytes than these gain is not worth a wait.
const LEAST: usize = 1 << 20;
/// What a thread copies at a time.
const PIECE: usize = 1 << 20;

/// The buffers of one GPU, and where they are sent.
struct Staging {
    buffers: Vec<Buffer>,
    next: usize,
    /// In which the copies are.
    stream: Arc<CudaStream>,
    /// Address of what is written.
    destination: u64,
}

struct Buffer {
    memory: PinnedHostSlice<u8>,
    /// Reached when its last copy is done.
    arrived: CudaEvent,
}

impl Staging {
    fn new(stream: &Arc<CudaStream>) -> std::result::Result<Self, DriverError> {
        let context = stream.context();
        let buffer = |_| {
            // SAFETY: written before it is read.
            let memory = unsafe { context.alloc_pinned(Self::SIZE)? };
            Ok(Buffer { memory, arrived: context.new_event(Some(sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC))? })
        };
        let buffers = (0..Self::COUNT).map(buffer).collect::<std::result::Result<_, DriverError>>()?;
        Ok(Self { buffers, next: 0, stream: stream.clone(), destination: 0 })
    }
}

impl Buffers for Staging {
    const COUNT: usize = 2;
    const SIZE: usize = 32 << 20;

    fn wait(&mut self, buffer: usize) -> Result<()> {
        self.buffers[buffer].arrived.synchronize().w() // at once where nothing was sent
    }

    fn fill(&mut self, buffer: usize, bytes: &[u8]) -> Result<()> {
        copy(bytes, &mut self.buffers[buffer].memory.as_mut_slice().w()?[..bytes.len()]);
        Ok(())
    }

    fn send(&mut self, buffer: usize, bytes: usize, offset: usize) -> Result<()> {
        let Buffer { memory, arrived } = &self.buffers[buffer];
        let bytes = &memory.as_slice().w()?[..bytes];
        // SAFETY: the destination is a tensor's memory that is there at this moment of the stream and until the copy's end (who
        // gives both promises it); the buffer is not written before `arrived`.
        unsafe { result::memcpy_htod_async(self.destination + offset as u64, bytes, self.stream.cu_stream()) }.w()?;
        arrived.record(&self.stream).w()
    }
}

/// Copies between slices of one length by all threads.
pub fn copy(from: &[u8], to: &mut [u8]) {
    to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
}

/// Does something with the buffers of the stream's GPU; none where there are none to be had.
fn with_buffers<T>(stream: &Arc<CudaStream>, f: impl FnOnce(&mut Staging) -> Result<T>) -> Result<Option<T>> {
    static STAGINGS: Mutex<BTreeMap<usize, Option<Staging>>> = Mutex::new(BTreeMap::new());
    let mut stagings = STAGINGS.lock().unwrap_or_else(PoisonError::into_inner);
    let staging = stagings.entry(stream.context().ordinal()).or_insert_with(|| Staging::new(stream).ok());
    let Some(staging) = staging.as_mut().filter(|staging| staging.stream.context() == stream.context()) else {
        return Ok(None);
    };
    stream.context().bind_to_thread().w()?;
    staging.stream = stream.clone();
    f(staging).map(Some)
}

/// Sends pieces, one after the other, to the address `destination` in `stream`. They are read before it returns.
pub fn send_pieces(pieces: &[&[u8]], destination: u64, stream: &Arc<CudaStream>) -> Result<()> {
    let sent = with_buffers(stream, |staging| {
        staging.destination = destination;
        let mut next = staging.next;
        for piece in pieces {
            send(staging, &mut next, piece)?;
            staging.next = next;
            staging.destination += piece.len() as u64;
        }
        Ok(())
    })?;
    if sent.is_some() {
        return Ok(());
    }
    let mut to = destination;
    for piece in pieces {
        // SAFETY: as where a buffer is sent; memory that is not pinned is read before this returns.
        unsafe { result::memcpy_htod_async(to, piece, stream.cu_stream()) }.w()?;
        to += piece.len() as u64;
    }
    Ok(())
}

/// None for what is small or of another dtype than weights have, and where there are no buffers to be had.
pub fn upload(bytes: &[u8], dtype: DType, shape: &[usize], device: &CudaDevice) -> Result<Option<Tensor>> {
    let elements = shape.iter().try_fold(dtype.size_in_bytes(), |bytes, &size| bytes.checked_mul(size));
    let known = matches!(dtype, DType::U8 | DType::F32 | DType::BF16 | DType::F16);
    if bytes.len() < LEAST || !known || elements != Some(bytes.len()) {
        return Ok(None);
    }
    let stream = device.cuda_stream();
    with_buffers(&stream, |staging| {
        // SAFETY: numbers of any value are valid, and all are written before anything later in the stream reads them.
        let x = unsafe { Tensor::empty(shape, dtype, &Device::Cuda(device.clone())) }?;
        staging.destination = address(&x)?;
        let mut next = staging.next;
        send(staging, &mut next, bytes)?;
        staging.next = next;
        Ok(x)
    })
}
