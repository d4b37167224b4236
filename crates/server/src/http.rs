//! Connections: bounded in number, and none may hold one open by being slow.

use std::{pin::Pin, sync::Arc, time::Duration};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto::Builder, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tokio_io_timeout::TimeoutStream;

const MAX_CONNECTIONS: usize = 1024;
/// File handles that are left to the rest: the database, results, the model.
const OTHER_FILES: usize = 256;
/// For the head of a request, from the first byte or since the last request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// For the caller to take something of an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// For answers that are under way when the service stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves `routes` until `stop`.
pub async fn serve(listener: TcpListener, routes: Router, stop: impl Future<Output = ()>) {
    let connections = Arc::new(Semaphore::new(max_connections()));
    let graceful = GracefulShutdown::new();
    // HTTP/1.1 alone: to find out which version a caller speaks, it would have to be waited for without a limit.
    let mut builder = Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    tokio::pin!(stop);
    loop {
        let next = async { (connections.clone().acquire_owned().await, listener.accept().await) };
        let (permit, stream) = tokio::select! {
            biased;
            () = &mut stop => break,
            next = next => match next {
                (Ok(permit), Ok((stream, _))) => (permit, stream),
                // Out of file handles, say: it passes.
                _ => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
        };
        let service = TowerToHyperService::new(routes.clone());
        let connection = graceful.watch(builder.serve_connection(TokioIo::new(patient(stream)), service).into_owned());
        tokio::spawn(async move {
            // How a connection ends is the caller's business.
            let _ = connection.await;
            drop(permit);
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(STOP_TIMEOUT, graceful.shutdown()).await;
}

/// As many as there are file handles for, of which the system is asked for more first.
#[cfg(unix)]
fn max_connections() -> usize {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return MAX_CONNECTIONS / 4 };
    let wanted = ((MAX_CONNECTIONS + OTHER_FILES) as u64).min(hard).max(soft);
    let soft = if setrlimit(Resource::RLIMIT_NOFILE, wanted, hard).is_ok() { wanted } else { soft };
    (soft as usize).saturating_sub(OTHER_FILES).clamp(16, MAX_CONNECTIONS)
}

#[cfg(not(unix))]
fn max_connections() -> usize {
    MAX_CONNECTIONS
}

fn patient(stream: TcpStream) -> Pin<Box<TimeoutStream<TcpStream>>> {
    // Small answers are not held back to be sent with later ones; a stream that does not know this works as well.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    Box::pin(stream)
}
