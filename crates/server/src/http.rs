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
/// For the head of a request, from the first byte or since the last request.
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// For the caller to take something of an answer.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);
/// For answers that are under way when the service stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Serves `routes` until `stop`.
pub async fn serve(listener: TcpListener, routes: Router, stop: impl Future<Output = ()>) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(HEADER_TIMEOUT).max_concurrent_streams(64);
    tokio::pin!(stop);
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { break };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of file handles, say: it passes.
                Err(_) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                }
            },
            () = &mut stop => break,
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

fn patient(stream: TcpStream) -> Pin<Box<TimeoutStream<TcpStream>>> {
    // Small answers are not held back to be sent with later ones; a stream that does not know this works as well.
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_TIMEOUT));
    Box::pin(stream)
}
