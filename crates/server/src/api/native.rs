//! The service's own API, which the page uses: jobs, and what happens to them.

use std::{convert::Infallible, sync::Arc};

use axum::{
    Json,
    body::Bytes,
    extract::{Path, Query, Request, State},
    http::StatusCode,
    response::{
        IntoResponse, Response,
        sse::{Event, KeepAlive, Sse},
    },
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use utoipa::{IntoParams, ToSchema};

use super::{
    caller::Caller,
    error::{ApiError, ApiResult, ErrorBody},
    input::{self, Image, blocking},
    submit::{self, Submission, submit},
};
use crate::{
    app::App,
    jobs::{
        Live, files,
        job::{JobRequest, NewJob, Status},
        store::Record,
    },
};

/// A job as its owner sees it. Times are milliseconds since 1970.
#[derive(Debug, Serialize, ToSchema)]
pub struct Job {
    pub id: String,
    pub status: Status,
    pub created_at: i64,
    pub started_at: Option<i64>,
    pub finished_at: Option<i64>,
    /// The place of a waiting job; 0 is next.
    pub position: Option<usize>,
    /// From 0 to 1.
    pub progress: f64,
    pub request: JobRequest,
    pub model: String,
    pub input: Option<JobInput>,
    /// Those that are done, in the order of the seeds.
    pub images: Vec<JobImage>,
    /// Why it failed, in a sentence.
    pub error: Option<String>,
    /// The command line that makes the same images.
    pub command: String,
    /// What it took, once it has ended.
    pub seconds: Option<f64>,
}

/// The source image. The addresses need no key.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobInput {
    pub url: String,
    pub thumbnail_url: String,
    pub width: u32,
    pub height: u32,
    /// The name of the file that was sent.
    pub name: Option<String>,
}

/// A result. The addresses need no key.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobImage {
    pub index: usize,
    pub url: String,
    pub thumbnail_url: String,
    pub seed: u64,
    pub width: u32,
    pub height: u32,
    /// png, jpeg or webp.
    pub format: &'static str,
}

/// The file of a source image, for [`super::images`].
pub const INPUT: &str = "input";
pub const INPUT_THUMBNAIL: &str = "input-small.jpg";

impl Job {
    pub fn of(app: &App, record: Record) -> Self {
        let Record { id, status, request, model, input, images, .. } = record;
        let pending = app.jobs.pending(&id, &record.owner);
        // The store knows when a job ends, the queue when it begins.
        let status = pending.filter(|_| !status.is_final()).map_or(status, |(status, _)| status);
        let progress = match status {
            Status::Done => 1.0,
            _ => pending.map_or(0.0, |(_, progress)| progress),
        };
        let image = |(index, (width, height)): (usize, (u32, u32))| JobImage {
            index,
            url: app.image_path(&id, &files::image_name(index, request.output_format)),
            thumbnail_url: app.image_path(&id, &files::thumbnail_name(index)),
            seed: request.seeds.get(index).copied().unwrap_or_default(),
            width,
            height,
            format: request.output_format.name(),
        };
        let named = |name: &Option<String>| name.clone().unwrap_or_else(|| "photo.png".into());
        Self {
            status,
            created_at: record.created_at,
            started_at: record.started_at,
            finished_at: record.finished_at,
            position: if status == Status::Queued { app.jobs.position(&id) } else { None },
            progress,
            images: images.into_iter().enumerate().map(image).collect(),
            command: request.command(&model, input.as_ref().map(|input| named(&input.name)).as_deref()),
            input: input.map(|input| JobInput {
                url: app.image_path(&id, INPUT),
                thumbnail_url: app.image_path(&id, INPUT_THUMBNAIL),
                width: input.width,
                height: input.height,
                name: input.name,
            }),
            error: record.error,
            seconds: record.started_at.zip(record.finished_at).map(|(start, end)| (end - start) as f64 / 1000.0),
            id,
            request,
            model,
        }
    }

    async fn find(app: &Arc<App>, owner: &str, id: &str) -> ApiResult<Self> {
        let (app, owner, id) = (app.clone(), owner.to_string(), id.to_string());
        blocking(move || {
            let read = || app.jobs.job(&id, &owner)?.ok_or_else(|| ApiError::not_found("job"));
            let record = read()?;
            // It may have ended since it was read: what is not followed any more is read again.
            let record = if record.status.is_final() || app.jobs.live(&id).is_some() { record } else { read()? };
            Ok(Self::of(&app, record))
        })
        .await
    }
}

/// A form of a new job.
#[derive(ToSchema)]
#[expect(dead_code, reason = "describes a form that is read field by field")]
pub struct JobForm {
    /// A [`NewJob`] as JSON.
    request: String,
    /// The image to edit; without one the prompt alone makes a picture.
    #[schema(value_type = Option<String>, format = Binary, content_media_type = "application/octet-stream")]
    image: Option<Vec<u8>>,
}

/// Asks for an edit
///
/// The job is durable when this returns. The same `Idempotency-Key` for the same request gives the same job.
#[utoipa::path(
    post, path = "/api/jobs", tag = "jobs",
    params(("idempotency-key" = Option<String>, Header, description = "Two requests of one key are one job", max_length = 255)),
    request_body(content((NewJob = "application/json"), (JobForm = "multipart/form-data"))),
    responses(
        (status = 202, description = "Accepted", body = Job),
        (status = "4XX", description = "Refused", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    ),
)]
pub async fn create(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    request: Request,
) -> ApiResult<(StatusCode, Json<Job>)> {
    let (request, entry) = submit::enter(&app, request)?;
    let (job, image, asked) = entry.held.explain(match input::media_type(&request).as_str() {
        "multipart/form-data" => read_form(&app, request).await,
        _ => read_json(&app, request).await,
    })?;
    let id = submit(&app, Submission { owner: owner.clone(), entry, job, asked, image, webhook: None }).await?;
    Ok((StatusCode::ACCEPTED, Json(Job::find(&app, &owner, &id).await?)))
}

/// A job, its image with the field that it came in, and the request as it was sent but for an image that is a file.
type NewJobWithImage = (NewJob, Option<(Image, &'static str)>, Bytes);

async fn read_form(app: &Arc<App>, request: Request) -> ApiResult<NewJobWithImage> {
    let (mut job, mut image) = (None, None);
    for (name, file) in input::form(app, request).await? {
        match name.as_str() {
            "request" if job.is_none() => {
                let text = file.text("request")?;
                let read = serde_json::from_str::<NewJob>(&text);
                let read = read.map_err(|e| ApiError::invalid(format!("request: {e}")).about("request"))?;
                if read.input_image.is_some() {
                    return Err(
                        ApiError::invalid("send the image as the field `image` of the form").about("input_image")
                    );
                }
                job = Some(read);
            }
            "image" if image.is_none() => image = Some(file),
            "request" | "image" => return Err(ApiError::invalid(format!("{name} was sent twice")).about(name)),
            _ => {
                let message = format!("`{name}` is not a field of this form; it has `request` and `image`");
                return Err(ApiError::invalid(message).about(name));
            }
        }
    }
    let job = job.ok_or_else(|| ApiError::invalid("the form has no field `request`").about("request"))?;
    let asked = serde_json::to_vec(&job).map_err(|e| ApiError::internal(e.to_string()))?.into();
    Ok((job, image.map(|file| (Image::File(file), "image")), asked))
}

async fn read_json(app: &Arc<App>, request: Request) -> ApiResult<NewJobWithImage> {
    let (mut job, asked): (NewJob, _) = input::json(app, request).await?;
    let image = job.input_image.take().map(|text| (Image::Text(text), "input_image"));
    Ok((job, image, asked))
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Page {
    /// How many; 50 if left out.
    #[param(minimum = 1, maximum = 200)]
    limit: Option<usize>,
    /// Those accepted before this job.
    before: Option<String>,
}

/// Some jobs, the newest first.
#[derive(Serialize, ToSchema)]
pub struct JobList {
    jobs: Vec<Job>,
    /// What to give as `before` for those that follow; none at the end.
    next: Option<String>,
}

/// Lists jobs, the newest first
#[utoipa::path(
    get, path = "/api/jobs", tag = "jobs", params(Page),
    responses((status = 200, body = JobList), (status = "4XX", body = ErrorBody)),
)]
pub async fn list(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    page: Result<Query<Page>, axum::extract::rejection::QueryRejection>,
) -> ApiResult<Json<JobList>> {
    let Query(Page { limit, before }) = page.map_err(|e| ApiError::invalid(e.body_text()))?;
    let limit = limit.unwrap_or(50);
    if !(1..=200).contains(&limit) {
        return Err(ApiError::invalid(format!("limit is {limit}; give 1 to 200")).about("limit"));
    }
    blocking(move || {
        // One more tells whether there is a next page.
        let mut records = app.jobs.store.jobs(&owner, before.as_deref(), limit + 1)?;
        let more = records.len() > limit;
        records.truncate(limit);
        let next = records.last().filter(|_| more).map(|record| record.id.clone());
        Ok(Json(JobList { jobs: records.into_iter().map(|record| Job::of(&app, record)).collect(), next }))
    })
    .await
}

/// Shows a job
#[utoipa::path(
    get, path = "/api/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = Job), (status = "4XX", body = ErrorBody)),
)]
pub async fn show(State(app): State<Arc<App>>, Caller(owner): Caller, Path(id): Path<String>) -> ApiResult<Json<Job>> {
    Ok(Json(Job::find(&app, &owner, &id).await?))
}

/// Cancels a job that has not ended, within a step; removes one that has, with its images
#[utoipa::path(
    delete, path = "/api/jobs/{id}", tag = "jobs", params(("id" = String, Path)),
    responses(
        (status = 200, description = "Cancelled, or about to be", body = Job),
        (status = 204, description = "Removed"),
        (status = "4XX", body = ErrorBody),
    ),
)]
pub async fn remove(State(app): State<Arc<App>>, Caller(owner): Caller, Path(id): Path<String>) -> ApiResult<Response> {
    blocking(move || {
        let record = app.jobs.job(&id, &owner)?.ok_or_else(|| ApiError::not_found("job"))?;
        if app.jobs.cancel(&id)? {
            let record = app.jobs.job(&id, &owner)?.unwrap_or(record);
            return Ok(Json(Job::of(&app, record)).into_response());
        }
        app.jobs.store.remove(&id)?;
        Ok(StatusCode::NO_CONTENT.into_response())
    })
    .await
}

/// What a step tells: the data of a `step` event.
#[derive(Serialize, ToSchema)]
pub struct StepEvent<'a> {
    /// Which image, from 0.
    image: usize,
    images: usize,
    /// Steps of that image that are done.
    step: usize,
    steps: usize,
    progress: f64,
    /// What the image is about to be: a data URL of a small JPEG.
    preview: Option<&'a str>,
}

/// Follows a job
///
/// Server-sent events: `job` with the [`Job`] whenever it changes, at once and in the end; `step` with a [`StepEvent`] for each
/// step. The stream ends with the job.
#[utoipa::path(
    get, path = "/api/jobs/{id}/events", tag = "jobs", params(("id" = String, Path)),
    responses((status = 200, body = StepEvent, content_type = "text/event-stream"), (status = "4XX", body = ErrorBody)),
)]
pub async fn events(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
) -> ApiResult<impl IntoResponse> {
    // Followed before it is looked at: no change falls in between.
    let live = app.jobs.live(&id);
    let job = Job::find(&app, &owner, &id).await?;
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        // An end of the stream is no failure: the follower has gone.
        let _ = follow(&app, &owner, job, live, &sender).await;
    });
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()))
}

/// The follower of a job has gone.
struct Gone;

async fn follow(
    app: &Arc<App>,
    owner: &str,
    job: Job,
    live: Option<Arc<Live>>,
    sender: &mpsc::Sender<Result<Event, Infallible>>,
) -> Result<(), Gone> {
    let send = async |event: &str, data: serde_json::Result<String>| {
        let event = Event::default().event(event).data(data.unwrap_or_default());
        sender.send(Ok(event)).await.map_err(|_| Gone)
    };
    let mut position = job.position;
    send("job", serde_json::to_string(&job)).await?;
    let Some(live) = live else { return Ok(()) };
    let _viewer = live.view();
    let (mut signals, mut moves) = (live.subscribe(), app.jobs.moves());
    let mut revision = None;
    loop {
        let signal = signals.borrow_and_update().clone();
        let moved = position.is_some() && app.jobs.position(&job.id) != position;
        if signal.ended || moved || revision.is_some_and(|revision| revision != signal.revision) {
            // A removed job has no more to tell.
            let Ok(now) = Job::find(app, owner, &job.id).await else { return Ok(()) };
            position = now.position;
            send("job", serde_json::to_string(&now)).await?;
        }
        revision = Some(signal.revision);
        if signal.ended {
            return Ok(());
        }
        if let Some(progress) = &signal.progress {
            let preview =
                progress.preview.as_ref().map(|jpeg| format!("data:image/jpeg;base64,{}", STANDARD.encode(jpeg)));
            let step = StepEvent {
                image: progress.image,
                images: progress.images,
                step: progress.step,
                steps: progress.steps,
                progress: progress.share(),
                preview: preview.as_deref(),
            };
            send("step", serde_json::to_string(&step)).await?;
        }
        tokio::select! {
            changed = signals.changed() => if changed.is_err() { return Ok(()) },
            _ = moves.changed(), if position.is_some() => {}
            () = sender.closed() => return Err(Gone),
        }
    }
}
