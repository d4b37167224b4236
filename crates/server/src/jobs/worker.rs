//! A device at work: takes jobs from the queue, one after the other.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use retouch::{
    Control, EditedImage, Engine, Error, Event, Observer, Seeds,
    image::{OutputFormat, encode, read_image},
};
use tracing::{error, info, warn};

use super::{
    Jobs, Live, Progress, files,
    job::Status,
    now,
    store::{self, Record, StoreError},
};

/// A job that was running this often when the service ended without a chance to put it back is what ended it.
const MAX_ATTEMPTS: u32 = 10;

/// Previews are shown to people.
const PREVIEW_PAUSE: Duration = Duration::from_millis(200);

/// How long to wait before trying again what the disk did not let happen.
const DISK_PAUSE: Duration = Duration::from_secs(1);
/// How long to try what fails for other reasons than a full disk, such as too many open files.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a job ended.
enum Outcome {
    Done,
    Failed(String),
    Cancelled,
    /// It is to be done by the service that comes after this one.
    PutBack,
}

/// Does jobs until the service stops. `open` gives an engine in place of one that failed in an unforeseen way.
pub fn run(engine: Engine, open: impl Fn() -> retouch::Result<Engine>, jobs: &Jobs) {
    note_memory(&engine, jobs);
    let mut engine = Some(engine);
    while let Some(live) = jobs.next() {
        let (id, start) = (&live.id, Instant::now());
        let work = || -> store::Result<Outcome> {
            let opened = match engine.take().map_or_else(&open, Ok) {
                Ok(opened) => engine.insert(opened),
                Err(error) => return Ok(Outcome::Failed(error.to_string())),
            };
            edit(opened, jobs, &live)
        };
        let outcome = match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) if live.is_cancelled() => Outcome::Cancelled,
            Ok(Err(_)) if jobs.is_stopping() => Outcome::PutBack,
            Ok(Err(error)) => {
                error!("job {id}: {error}");
                Outcome::Failed("the service could not read or write what belongs to the job; its log says why".into())
            }
            Err(_) => {
                // What was half done in it is not to be trusted: it goes before another is opened.
                engine = None;
                Outcome::Failed("this is a bug in retouch; please report it with the request".into())
            }
        };
        jobs.note_pace(start.elapsed());
        if let Some(engine) = &engine {
            note_memory(engine, jobs);
        }
        let seconds = start.elapsed().as_secs_f64();
        let (status, reason) = match outcome {
            Outcome::Done => (Status::Done, None),
            Outcome::Cancelled => (Status::Cancelled, None),
            Outcome::Failed(reason) => (Status::Failed, Some(reason)),
            Outcome::PutBack => {
                info!("job {id} goes back into the queue");
                if let Err(error) = jobs.store.requeue(id) {
                    // It is found as begun, and done again.
                    warn!("job {id}: {error}");
                }
                continue;
            }
        };
        // Reasons can quote what was asked for.
        info!("job {id} {} after {seconds:.2} s", status.name());
        // Without this on the disk it is done again by the service that comes after this one.
        while let Err(error) = jobs.end(&live, status, reason.as_deref()) {
            warn!("the end of job {id} cannot be noted: {error}");
            if jobs.is_stopping() {
                break;
            }
            std::thread::sleep(DISK_PAUSE);
        }
    }
}

fn note_memory(engine: &Engine, jobs: &Jobs) {
    if let Some(bytes) = engine.free_memory() {
        jobs.metrics.free_memory(engine.device(), bytes);
    }
}

/// From what was asked for to files.
fn edit(engine: &mut Engine, jobs: &Jobs, live: &Arc<Live>) -> store::Result<Outcome> {
    let Some(record) = patiently(jobs, live, || jobs.store.job(&live.id))? else { return Ok(Outcome::Cancelled) };
    let Some(attempts) = patiently(jobs, live, || jobs.store.start(&live.id, now()))? else {
        return Ok(Outcome::Cancelled);
    };
    live.changed();
    if attempts > MAX_ATTEMPTS {
        return Ok(Outcome::Failed(format!("the service ended {MAX_ATTEMPTS} times while this job ran; see its log")));
    }
    let picture = match patiently(jobs, live, || jobs.store.input(&live.id))? {
        Some(bytes) => match read_image(&bytes, "the image") {
            Ok(picture) => Some(picture),
            Err(error) => return Ok(Outcome::Failed(error.to_string())),
        },
        None => None,
    };
    // Images that an interrupted attempt finished are kept: whoever has seen one never sees another in its place.
    let done = record.images.len();
    let request = match record.request.edit(picture, &record.request.seeds[done.min(record.request.seeds.len())..]) {
        _ if done >= record.request.seeds.len() => return Ok(Outcome::Done),
        Ok(request) => request,
        Err(reason) => return Ok(Outcome::Failed(reason)),
    };
    let mut follower = Follower { live, first: done, images: record.request.seeds.len(), last_preview: None };
    let mut delivery = Delivery { jobs, live, record: &record, position: done, kept: Ok(()) };
    let made = engine.edit_each(&request, &mut follower, |image, _| delivery.take(image));
    delivery.kept?;
    debug_assert!(matches!(request.seeds, Seeds::Each(_)), "each image is repeatable on its own");
    Ok(match made {
        Ok(timings) => {
            jobs.metrics.stages(&timings);
            Outcome::Done
        }
        Err(Error::Cancelled) if live.is_cancelled() => Outcome::Cancelled,
        Err(Error::Cancelled) => Outcome::PutBack,
        Err(error) => {
            jobs.metrics.error("job");
            Outcome::Failed(error.to_string())
        }
    })
}

/// Tries until there is room: a full disk is no reason to lose a job or a result. New requests are refused meanwhile. What
/// fails for other reasons is tried for a while.
fn patiently<T>(jobs: &Jobs, live: &Live, keep: impl Fn() -> store::Result<T>) -> store::Result<T> {
    let start = Instant::now();
    loop {
        match keep() {
            Err(StoreError::Full) if !live.is_to_end() => {
                if !jobs.disk_full.swap(true, Ordering::Relaxed) {
                    warn!("the disk is full: a job waits for room, and no new ones are taken");
                }
                std::thread::sleep(DISK_PAUSE);
            }
            Err(StoreError::Failed(reason)) if !live.is_to_end() && start.elapsed() < PATIENCE => {
                warn!("job {}: {reason}", live.id);
                std::thread::sleep(DISK_PAUSE);
            }
            kept => {
                jobs.disk_full.store(false, Ordering::Relaxed);
                return kept;
            }
        }
    }
}

/// Puts images into files as they are made.
struct Delivery<'a> {
    jobs: &'a Jobs,
    live: &'a Live,
    record: &'a Record,
    /// Of the next image.
    position: usize,
    kept: store::Result<()>,
}

impl Delivery<'_> {
    fn take(&mut self, mut image: EditedImage) -> Control {
        image.parameters.source_name = self.record.input.as_ref().and_then(|input| input.name.clone());
        self.kept = patiently(self.jobs, self.live, || self.keep(&image));
        self.position += 1;
        if self.kept.is_err() {
            return Control::Cancel;
        }
        self.jobs.metrics.image();
        self.live.changed();
        Control::Continue
    }

    fn keep(&self, image: &EditedImage) -> store::Result<()> {
        let (id, request) = (&self.live.id, &self.record.request);
        let file = files::result(&image.pixels, request, &image.parameters).map_err(StoreError::Failed)?;
        let small = files::thumbnail(&image.pixels).map_err(StoreError::Failed)?;
        let store = &self.jobs.store;
        store.write_image(id, &files::thumbnail_name(self.position), &small)?;
        store.write_image(id, &files::image_name(self.position, request.output_format), &file)?;
        store.add_image(id, self.position, image.pixels.dimensions())
    }
}

/// Tells the followers of a job how far it is.
struct Follower<'a> {
    live: &'a Arc<Live>,
    /// Images that were there before.
    first: usize,
    images: usize,
    last_preview: Option<Instant>,
}

impl Observer for Follower<'_> {
    fn on(&mut self, event: Event<'_>) -> Control {
        if self.live.is_to_end() {
            return Control::Cancel;
        }
        if let Event::Step { image, step, steps, preview, .. } = event {
            let is_due = self.last_preview.is_none_or(|last| last.elapsed() > PREVIEW_PAUSE);
            // Only where somebody looks. One that cannot be made is no reason to end the job.
            let preview = (is_due && self.live.is_viewed()).then(preview).and_then(Result::ok).flatten();
            let preview = preview.and_then(|picture| encode(&picture, OutputFormat::Jpeg, Some(90), None).ok());
            if preview.is_some() {
                self.last_preview = Some(Instant::now());
            }
            let progress = Progress {
                image: self.first + image,
                images: self.images,
                step: step + 1,
                steps,
                preview: preview.map(Into::into),
            };
            self.live.signal.send_modify(|signal| {
                // The last preview stays until there is another of the same image.
                let last = signal.progress.take().filter(|last| last.image == progress.image);
                let preview = progress.preview.clone().or_else(|| last.and_then(|last| last.preview));
                signal.progress = Some(Progress { preview, ..progress });
            });
        }
        Control::Continue
    }

    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        Some(self.live.cancel.clone())
    }
}
