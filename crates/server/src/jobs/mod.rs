//! The queue: jobs are accepted, done in order, and followed while they are.
//!
//! The store has the last word on a job; what is in memory is what a step changes: its place in the queue, its progress and
//! whether it is to be cancelled. A change is durable before anyone is told of it.

pub mod files;
pub mod job;
pub mod store;
pub mod worker;

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use tokio::sync::{Notify, watch};

use crate::metrics::Metrics;
use job::Status;
use store::{Acceptance, Accepted, Record, Store, StoreError};

/// Milliseconds since 1970.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64
}

/// How far a running job is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Which of its images, from 0.
    pub image: usize,
    pub images: usize,
    /// Steps of that image that are done.
    pub step: usize,
    pub steps: usize,
    /// A small JPEG of what the image is about to be.
    pub preview: Option<Arc<[u8]>>,
}

impl Progress {
    /// From 0 to 1, over all images.
    pub fn share(&self) -> f64 {
        let of_image = self.step as f64 / self.steps.max(1) as f64;
        (self.image as f64 + of_image) / self.images.max(1) as f64
    }
}

/// What the followers of a job are told.
#[derive(Debug, Clone, Default)]
pub struct Signal {
    /// Counts the changes that the store knows of.
    pub revision: u64,
    pub progress: Option<Progress>,
    /// Nothing more comes.
    pub ended: bool,
}

/// A job that has not ended.
pub struct Live {
    pub id: String,
    owner: String,
    /// Ends the engine's work.
    cancel: Arc<AtomicBool>,
    /// Its owner wants it ended; else it is the service that stops.
    asked: AtomicBool,
    running: AtomicBool,
    signal: watch::Sender<Signal>,
    viewers: AtomicUsize,
}

impl Queue {
    fn running(&self) -> usize {
        self.live.values().filter(|live| live.running.load(Ordering::Relaxed)).count()
    }
}

impl Live {
    fn new(id: String, owner: String) -> Arc<Self> {
        let signal = watch::channel(Signal::default()).0;
        Arc::new(Self {
            id,
            owner,
            cancel: Arc::default(),
            asked: AtomicBool::new(false),
            running: AtomicBool::new(false),
            signal,
            viewers: AtomicUsize::new(0),
        })
    }

    fn changed(&self) {
        self.signal.send_modify(|signal| signal.revision += 1);
    }

    pub fn subscribe(&self) -> watch::Receiver<Signal> {
        self.signal.subscribe()
    }

    /// As long as this is held, previews are made.
    pub fn view(self: &Arc<Self>) -> Viewer {
        self.viewers.fetch_add(1, Ordering::Relaxed);
        Viewer(self.clone())
    }

    fn is_viewed(&self) -> bool {
        self.viewers.load(Ordering::Relaxed) > 0
    }

    /// Whether its owner wants it ended.
    fn is_cancelled(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// Whether its work is to end, for whatever reason.
    fn is_to_end(&self) -> bool {
        self.cancel.load(Ordering::Relaxed)
    }
}

/// See [`Live::view`].
pub struct Viewer(Arc<Live>);

impl Drop for Viewer {
    fn drop(&mut self) {
        self.0.viewers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Why a job was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("the queue is full ({0} jobs); try again later")]
    QueueFull(usize),
    #[error("the Idempotency-Key was used for another request; use a new one for a new request")]
    Conflict,
    #[error("the service is stopping; try again when it is back")]
    Stopping,
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Arc<Live>>,
    live: HashMap<String, Arc<Live>>,
    /// Jobs that are being made durable, and have a place.
    entering: usize,
    stopping: bool,
}

/// All jobs of a service.
pub struct Jobs {
    pub store: Store,
    pub metrics: Arc<Metrics>,
    queue: Mutex<Queue>,
    arrived: Condvar,
    /// Counts what moves the places of waiting jobs.
    moved: watch::Sender<u64>,
    /// Wakes who calls webhooks.
    pub ended: Notify,
    max_queue: usize,
    workers: usize,
    /// Seconds that a job takes, smoothed.
    pace: Mutex<f64>,
    /// Set while a result waits for room on the disk.
    disk_full: AtomicBool,
}

impl Jobs {
    /// Takes up the jobs that an earlier service left behind.
    pub fn new(store: Store, max_queue: usize, workers: usize, metrics: Arc<Metrics>) -> store::Result<Arc<Self>> {
        store.remove_orphans()?;
        let mut queue = Queue::default();
        for id in store.unfinished()? {
            let Some(record) = store.job(&id)? else { continue };
            let live = Live::new(record.id, record.owner);
            queue.waiting.push_back(live.clone());
            queue.live.insert(id, live);
        }
        if !queue.waiting.is_empty() {
            tracing::info!("{} jobs of an earlier service go on", queue.waiting.len());
        }
        metrics.queue_depth.set(queue.waiting.len() as i64);
        Ok(Arc::new(Self {
            store,
            metrics,
            queue: Mutex::new(queue),
            arrived: Condvar::new(),
            moved: watch::channel(0).0,
            ended: Notify::new(),
            max_queue,
            workers,
            pace: Mutex::new(1.0),
            disk_full: AtomicBool::new(false),
        }))
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a place, before a request is read. [`Self::accept`] decides.
    pub fn has_room(&self) -> Result<(), Refusal> {
        self.room_in(&self.queue())
    }

    fn room_in(&self, queue: &Queue) -> Result<(), Refusal> {
        if self.disk_full.load(Ordering::Relaxed) {
            return Err(StoreError::Full.into());
        }
        if queue.stopping {
            return Err(Refusal::Stopping);
        }
        if queue.waiting.len() + queue.entering >= self.max_queue {
            return Err(Refusal::QueueFull(self.max_queue));
        }
        Ok(())
    }

    /// The job that an earlier request of that idempotency key became, also where the queue is full.
    pub fn known(&self, owner: &str, key: &str, hash: &str) -> Result<Option<String>, Refusal> {
        match self.store.known(owner, key, hash)? {
            Some(Acceptance::Known(id)) => Ok(Some(id)),
            Some(Acceptance::Conflict) => Err(Refusal::Conflict),
            Some(Acceptance::New) | None => Ok(None),
        }
    }

    /// Makes a job durable and puts it in the queue; its id, which for a repeated request is that of the first.
    pub fn accept(&self, job: Accepted) -> Result<String, Refusal> {
        let live = Live::new(job.id.clone(), job.owner.clone());
        let mut queue = self.queue();
        self.room_in(&queue)?;
        queue.entering += 1;
        // Known before it is durable: who finds it in the store finds it here as well.
        queue.live.insert(job.id.clone(), live.clone());
        drop(queue);
        let accepted = self.store.accept(&job, now());
        let mut queue = self.queue();
        queue.entering -= 1;
        if !matches!(accepted, Ok(Acceptance::New)) {
            queue.live.remove(&job.id);
        }
        match accepted? {
            Acceptance::Known(id) => Ok(id),
            Acceptance::Conflict => Err(Refusal::Conflict),
            Acceptance::New => {
                queue.waiting.push_back(live);
                self.metrics.queue_depth.set(queue.waiting.len() as i64);
                drop(queue);
                self.arrived.notify_one();
                Ok(job.id)
            }
        }
    }

    /// Seconds until a place in a full queue may be free.
    pub fn retry_after(&self) -> u64 {
        let pace = *self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        ((pace / self.workers as f64).ceil() as u64).clamp(1, 120)
    }

    pub fn live(&self, id: &str) -> Option<Arc<Live>> {
        self.queue().live.get(id).cloned()
    }

    /// The place of a waiting job; 0 is next.
    pub fn position(&self, id: &str) -> Option<usize> {
        self.queue().waiting.iter().position(|live| live.id == id)
    }

    /// Told when places in the queue move.
    pub fn moves(&self) -> watch::Receiver<u64> {
        self.moved.subscribe()
    }

    /// Waiting and running jobs.
    pub fn counts(&self) -> (usize, usize) {
        let queue = self.queue();
        (queue.waiting.len(), queue.running())
    }

    pub fn is_stopping(&self) -> bool {
        self.queue().stopping
    }

    /// The status and progress of an owner's job that has not ended, without asking the store.
    pub fn pending(&self, id: &str, owner: &str) -> Option<(Status, f64)> {
        let live = self.live(id).filter(|live| live.owner == owner)?;
        let progress = live.signal.borrow().progress.as_ref().map_or(0.0, Progress::share);
        let status = if live.running.load(Ordering::Relaxed) { Status::Running } else { Status::Queued };
        Some((status, progress))
    }

    /// An owner's job.
    pub fn job(&self, id: &str, owner: &str) -> store::Result<Option<Record>> {
        Ok(self.store.job(id)?.filter(|job| job.owner == owner))
    }

    /// Ends a waiting job at once, a running one within a step. Whether it had not ended yet.
    ///
    /// The wish is on the disk when this returns. Where it cannot be, the job still ends when a worker comes to it.
    pub fn cancel(&self, id: &str) -> store::Result<bool> {
        let Some(live) = self.live(id) else { return Ok(false) };
        live.asked.store(true, Ordering::Relaxed);
        live.cancel.store(true, Ordering::Relaxed);
        self.store.finish(&live.id, Status::Cancelled, None, now())?;
        let mut queue = self.queue();
        let place = queue.waiting.iter().position(|waiting| waiting.id == id);
        let waited = place.and_then(|place| queue.waiting.remove(place)).is_some();
        self.metrics.queue_depth.set(queue.waiting.len() as i64);
        drop(queue);
        if waited {
            self.conclude(&live, Status::Cancelled);
        }
        Ok(true)
    }

    /// The next job for a worker, waiting for one; none when the service stops.
    fn next(&self) -> Option<Arc<Live>> {
        let mut queue = self.queue();
        loop {
            if queue.stopping {
                return None;
            }
            if let Some(live) = queue.waiting.pop_front() {
                live.running.store(true, Ordering::Relaxed);
                self.metrics.queue_depth.set(queue.waiting.len() as i64);
                self.metrics.running.set(queue.running() as i64);
                drop(queue);
                self.moved.send_modify(|moves| *moves += 1);
                return Some(live);
            }
            queue = self.arrived.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends a job for good, on the disk first.
    fn end(&self, live: &Live, status: Status, error: Option<&str>) -> store::Result<()> {
        self.store.finish(&live.id, status, error, now())?;
        self.conclude(live, status);
        Ok(())
    }

    /// Tells everyone that a job has ended.
    fn conclude(&self, live: &Live, status: Status) {
        let mut queue = self.queue();
        queue.live.remove(&live.id);
        self.metrics.running.set(queue.running() as i64);
        drop(queue);
        self.metrics.ended(status);
        live.signal.send_modify(|signal| {
            signal.revision += 1;
            signal.ended = true;
        });
        self.moved.send_modify(|moves| *moves += 1);
        self.ended.notify_one();
    }

    fn note_pace(&self, took: Duration) {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        *pace = 0.8 * *pace + 0.2 * took.as_secs_f64();
    }

    /// No job is begun any more. Running ones have until `deadline` to end; then they go back into the queue of the service
    /// that comes after this one.
    pub fn stop(&self, deadline: Instant) {
        self.queue().stopping = true;
        self.arrived.notify_all();
        while self.counts().1 > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let queue = self.queue();
        for live in queue.live.values().filter(|live| live.running.load(Ordering::Relaxed)) {
            live.cancel.store(true, Ordering::Relaxed);
        }
        // Followers need not wait for what will not come.
        for live in queue.live.values() {
            live.signal.send_modify(|signal| signal.ended = true);
        }
    }
}
