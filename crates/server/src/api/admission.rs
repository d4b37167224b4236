//! How much of requests is held in memory together.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::StreamExt;

use super::error::{ApiError, ApiResult};
use crate::app::App;

/// A permit stands for this many bytes.
const UNIT: usize = 1024;

/// Room for the bodies of `bytes` together.
pub fn room(bytes: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new((bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS)))
}

/// What one request holds, for as long as this lives.
#[derive(Clone, Default)]
pub struct Held {
    permits: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
    none_left: Arc<AtomicBool>,
}

/// Counts the body of a request while it arrives. A caller who is slow holds what it has sent, and no more.
pub fn admit(app: &App, request: Request) -> (Request, Held) {
    let (held, room) = (Held::default(), app.uploads.clone());
    let count = held.clone();
    let counted = |body: Body| {
        Body::from_stream(body.into_data_stream().map(move |chunk| {
            let chunk = chunk.map_err(io::Error::other)?;
            count.take(&room, chunk.len()).map(|()| chunk)
        }))
    };
    (request.map(counted), held)
}

impl Held {
    fn take(&self, room: &Arc<Semaphore>, bytes: usize) -> io::Result<()> {
        let units = u32::try_from(bytes.div_ceil(UNIT)).unwrap_or(u32::MAX);
        let Ok(permit) = room.clone().try_acquire_many_owned(units) else {
            self.none_left.store(true, Ordering::Relaxed);
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        let mut permits = self.permits.lock().unwrap_or_else(PoisonError::into_inner);
        match permits.as_mut() {
            Some(permits) => permits.merge(permit),
            None => *permits = Some(permit),
        }
        Ok(())
    }

    /// Says so where it was for want of room that a body could not be read.
    pub fn explain<T>(&self, read: ApiResult<T>) -> ApiResult<T> {
        if self.none_left.load(Ordering::Relaxed) { Err(ApiError::busy()) } else { read }
    }
}

/// The size that a request announces.
pub fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
