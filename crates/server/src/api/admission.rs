//! How much of requests is held in memory together.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderMap, header},
    middleware::Next,
    response::Response,
};
use futures_util::stream::{self, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::{ApiError, ApiResult};
use crate::app::App;

/// A permit stands for this many bytes.
const UNIT: usize = 1024;

/// Room for the bodies of `bytes` together.
pub fn room(bytes: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new((bytes / UNIT).clamp(1, Semaphore::MAX_PERMITS)))
}

/// What one request holds, for as long as this lives.
#[derive(Clone)]
pub struct Held {
    room: Arc<Semaphore>,
    taken: Arc<Mutex<Taken>>,
    none_left: Arc<AtomicBool>,
}

#[derive(Default)]
struct Taken {
    bytes: usize,
    permits: Option<OwnedSemaphorePermit>,
}

/// How long the body of a refused request is read.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Reads what a refused request still sends, and drops it, for a while: most callers look at an answer only once they have sent
/// everything, and take a connection that is closed before for a failure of the network.
pub async fn read_to_the_end(request: Request, next: Next) -> Response {
    let (head, body) = request.into_parts();
    let body = Arc::new(tokio::sync::Mutex::new(body.into_data_stream()));
    let read = stream::unfold(body.clone(), async |body| {
        let chunk = body.lock().await.next().await?;
        Some((chunk, body))
    });
    let response = next.run(Request::from_parts(head, Body::from_stream(read))).await;
    if !response.status().is_success() {
        let drained = async { while let Some(Ok(_)) = body.lock().await.next().await {} };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
    }
    response
}

/// Counts the body of a request while it arrives. A caller who is slow holds what it has sent, and no more. One that announces
/// more than is taken is refused.
pub fn admit(app: &App, request: Request) -> ApiResult<(Request, Held)> {
    if announced(request.headers()).is_some_and(|length| length > app.options.max_upload) {
        return Err(ApiError::too_large_for(app.options.max_upload));
    }
    let held = Held { room: app.uploads.clone(), taken: Arc::default(), none_left: Arc::default() };
    let count = held.clone();
    let counted = |body: Body| {
        Body::from_stream(body.into_data_stream().map(move |chunk| {
            let chunk = chunk.map_err(io::Error::other)?;
            count.take(chunk.len()).map(|()| chunk)
        }))
    };
    Ok((request.map(counted), held))
}

impl Held {
    /// Takes room for more bytes, if there is some.
    pub fn take(&self, bytes: usize) -> io::Result<()> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.bytes += bytes;
        let units = taken.bytes.div_ceil(UNIT) - taken.permits.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let Ok(permit) = self.room.clone().try_acquire_many_owned(u32::try_from(units).unwrap_or(u32::MAX)) else {
            self.none_left.store(true, Ordering::Relaxed);
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        match taken.permits.as_mut() {
            Some(permits) => permits.merge(permit),
            None => taken.permits = Some(permit),
        }
        Ok(())
    }

    /// Says so where it was for want of room that a body could not be read.
    pub fn explain<T>(&self, read: ApiResult<T>) -> ApiResult<T> {
        if self.none_left.load(Ordering::Relaxed) { Err(ApiError::busy()) } else { read }
    }
}

/// The size that a request announces.
fn announced(headers: &HeaderMap) -> Option<usize> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
