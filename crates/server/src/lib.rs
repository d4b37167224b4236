//! The local service of retouch: HTTP, a durable queue and the web page. No model code.
//!
//! A request becomes a job in `api` (native, as the hosted service, as OpenAI's), which is durable in `jobs::store` before it
//! is answered; `jobs::worker` takes it from the queue to an engine, and what comes of it goes to files.

mod api;
mod app;
mod fetch;
mod http;
mod jobs;
mod metrics;
mod options;
mod signature;
mod webhooks;

use std::{
    io,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use retouch::Engine;
use tokio::net::TcpListener;
use tracing::{info, warn};

pub use options::ServerOptions;

use app::App;
use jobs::{Jobs, now, store::Store};
use metrics::Metrics;

/// How long a running edit may take to end when the service stops; then it goes back into the queue.
const GRACE: Duration = Duration::from_secs(8);
/// How often is looked for jobs that are to go, at least.
const EXPIRY_PAUSE: Duration = Duration::from_secs(60);

/// Why the service cannot run.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("{0}")]
    Options(String),
    #[error("{address}: {source}; stop what uses that port, or give another by --port")]
    Address { address: SocketAddr, source: io::Error },
    #[error(transparent)]
    State(#[from] jobs::store::StoreError),
    #[error("the service cannot be started: {0}")]
    Start(io::Error),
}

/// Opens an engine for a worker, the same each time.
pub type OpenEngine = Box<dyn Fn() -> retouch::Result<Engine> + Send>;

/// The description of the HTTP API (OpenAPI 3.1), as JSON.
pub fn api_description() -> String {
    // What is described is fixed when the program is built, and is a tree of texts.
    api::description().to_pretty_json().unwrap_or_default()
}

/// Serves until SIGINT or SIGTERM, with a worker for each engine. `listening` is called with the address once it is open.
///
/// A stop lets running edits end for some seconds and puts them back into the queue else; a second signal ends the process.
///
/// # Errors
/// Options that would let others in by mistake, a port or folder that cannot be used.
pub fn serve(
    options: ServerOptions,
    engines: Vec<(Engine, OpenEngine)>,
    listening: impl FnOnce(SocketAddr),
) -> Result<(), ServeError> {
    options.check().map_err(ServeError::Options)?;
    let Some((first, _)) = engines.first() else { return Err(ServeError::Options("give at least one device".into())) };
    let rules = first.rules();
    let devices = engines.iter().map(|(engine, _)| engine.device().to_string()).collect();
    let store = Store::open(&options.state)?;
    let jobs = Jobs::new(store, options.max_queue, engines.len(), Arc::new(Metrics::new()))?;
    let (address, keep) = (options.address, options.keep);
    let base = options.public_url.as_ref().map(|url| url.as_str().trim_end_matches('/').to_string());
    let app = App::new(options, rules, devices, jobs.clone())?;

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(ServeError::Start)?;
    let listener = runtime.block_on(TcpListener::bind(address));
    let listener = listener.map_err(|source| ServeError::Address { address, source })?;
    let address = listener.local_addr().map_err(ServeError::Start)?;
    let workers: Vec<_> = engines.into_iter().map(|(engine, open)| start_worker(engine, open, jobs.clone())).collect();
    let workers: Vec<_> = workers.into_iter().collect::<io::Result<_>>().map_err(ServeError::Start)?;
    runtime.block_on(async {
        tokio::spawn(webhooks::run(app.clone(), base.unwrap_or_else(|| format!("http://{address}"))));
        tokio::spawn(expire(jobs.clone(), keep));
        listening(address);
        http::serve(listener, api::router(app), stop(jobs)).await;
    });
    for worker in workers {
        // A worker that has panicked has said so.
        let _ = worker.join();
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    info!("stopped");
    Ok(())
}

fn start_worker(engine: Engine, open: OpenEngine, jobs: Arc<Jobs>) -> io::Result<thread::JoinHandle<()>> {
    let name = format!("worker {}", engine.device());
    thread::Builder::new().name(name).spawn(move || jobs::worker::run(engine, open, &jobs))
}

/// Ends when the service is to stop, and its jobs have ended or gone back into the queue.
async fn stop(jobs: Arc<Jobs>) {
    signalled().await;
    info!("stopping; a second signal ends the running edit as well");
    tokio::spawn(async {
        signalled().await;
        std::process::exit(130);
    });
    // The door stays open meanwhile: who waits for a result that is about to be there gets it.
    let _ = tokio::task::spawn_blocking(move || jobs.stop(Instant::now() + GRACE)).await;
}

#[cfg(unix)]
async fn signalled() {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        // Without them, only being killed is left.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

#[cfg(not(unix))]
async fn signalled() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending().await
    }
}

/// Removes jobs some time after they ended.
async fn expire(jobs: Arc<Jobs>, keep: Duration) {
    loop {
        let jobs = jobs.clone();
        let removed = tokio::task::spawn_blocking(move || {
            let old = jobs.store.ended_before(now() - keep.as_millis().min(i64::MAX as u128 / 2) as i64)?;
            for id in &old {
                jobs.store.remove(id)?;
            }
            if !old.is_empty() {
                jobs.store.shrink()?;
            }
            Ok::<_, jobs::store::StoreError>(old.len())
        });
        match removed.await {
            Ok(Ok(0)) => {}
            Ok(Ok(removed)) => info!("{removed} old jobs are removed"),
            Ok(Err(error)) => warn!("{error}"),
            Err(_) => {}
        }
        tokio::time::sleep(keep.clamp(Duration::from_secs(1), EXPIRY_PAUSE)).await;
    }
}
