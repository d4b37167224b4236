//! The routes of the hosted FLUX.1 Kontext service, so that its callers change a base URL and nothing else.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Query, Request, State},
};
use retouch::{AspectRatio, image::OutputFormat};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::{
    caller::{Base, Caller},
    error::{ApiError, HostedError, HostedErrorBody},
    input::{self, Image, blocking},
    submit::{self, Submission, submit},
};
use crate::{
    app::App,
    jobs::{
        files,
        job::{ImageFormat, NewJob, Status},
        store::Record,
    },
};

/// An edit, or without an image a generation.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct HostedRequest {
    #[schema(required, min_length = 1)]
    prompt: String,
    /// The image to edit: base64, a data URL, or (where the service allows it) an address.
    input_image: Option<String>,
    /// Not supported yet: only null is taken.
    input_image_2: Option<String>,
    /// Not supported yet: only null is taken.
    input_image_3: Option<String>,
    /// Not supported yet: only null is taken.
    input_image_4: Option<String>,
    seed: Option<u64>,
    /// From 3:7 to 7:3.
    #[schema(example = "16:9")]
    aspect_ratio: Option<String>,
    #[schema(value_type = Option<ImageFormat>)]
    output_format: Option<OutputFormat>,
    /// Is told when the job has ended.
    webhook_url: Option<String>,
    /// Signs what the webhook is told.
    webhook_secret: Option<String>,
    /// Not supported: only false is taken.
    prompt_upsampling: Option<bool>,
    /// There is no moderation here: only 6, the least strict, is taken.
    #[schema(minimum = 0, maximum = 6)]
    safety_tolerance: Option<u8>,
    /// Beyond the hosted service: denoise steps.
    #[schema(minimum = 1, maximum = 1000)]
    steps: Option<usize>,
    /// Beyond the hosted service: how closely to follow the prompt.
    guidance: Option<f64>,
    /// Beyond the hosted service: several images, with seeds counting up.
    #[schema(minimum = 1)]
    num_images: Option<usize>,
    /// Beyond the hosted service: the exact size, in multiples of 16.
    width: Option<usize>,
    height: Option<usize>,
}

/// Where to ask for the result.
#[derive(Serialize, ToSchema)]
pub struct Submitted {
    id: String,
    polling_url: String,
    status: HostedStatus,
    /// As it was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook_url: Option<String>,
}

impl HostedRequest {
    /// Names what has no meaning here instead of passing over it.
    fn check(&self) -> Result<(), ApiError> {
        let refuse = |field: &str, reason: &str| Err(ApiError::invalid(format!("{field} {reason}")).about(field));
        for (field, image) in [
            ("input_image_2", &self.input_image_2),
            ("input_image_3", &self.input_image_3),
            ("input_image_4", &self.input_image_4),
        ] {
            if image.is_some() {
                return refuse(field, "is not supported yet: give one input_image");
            }
        }
        if self.prompt_upsampling == Some(true) {
            return refuse(
                "prompt_upsampling",
                "is not supported: the prompt is taken as it is; leave it out or say false",
            );
        }
        if self.safety_tolerance.is_some_and(|tolerance| tolerance != 6) {
            return refuse("safety_tolerance", "has no meaning here, as nothing is moderated; leave it out or say 6");
        }
        if let Some(text) = &self.aspect_ratio {
            let AspectRatio(ratio) = text.parse().map_err(|e: String| ApiError::invalid(e).about("aspect_ratio"))?;
            // As far as 21:9 and 9:21, with room for rounding.
            if !(3.0 / 7.0 - 1e-9..=7.0 / 3.0 + 1e-9).contains(&ratio) {
                return refuse("aspect_ratio", "is out of range; give one from 3:7 to 7:3");
            }
        }
        if self.output_format == Some(OutputFormat::Webp) {
            return refuse("output_format", "is jpeg or png");
        }
        Ok(())
    }
}

macro_rules! model_route {
    ($name:ident, $path:literal, $id:literal) => {
        /// Asks for an edit
        ///
        /// The three routes of the hosted service are one here: the model is the one that this service runs.
        #[utoipa::path(
            post, path = $path, tag = "hosted", operation_id = $id,
            params(("idempotency-key" = Option<String>, Header, description = "Two requests of one key are one job", max_length = 255)),
            request_body = HostedRequest,
            responses(
                (status = 200, body = Submitted),
                (status = "4XX", body = HostedErrorBody),
                (status = 507, description = "The disk is full", body = HostedErrorBody),
            ),
        )]
        pub async fn $name(
            state: State<Arc<App>>,
            caller: Result<Caller, ApiError>,
            base: Base,
            request: Request,
        ) -> Result<Json<Submitted>, HostedError> {
            create(state, caller?, base, request).await
        }
    };
}

model_route!(pro, "/v1/flux-kontext-pro", "flux_kontext_pro");
model_route!(max, "/v1/flux-kontext-max", "flux_kontext_max");
model_route!(dev, "/v1/flux-kontext-dev", "flux_kontext_dev");

async fn create(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    Base(base): Base,
    request: Request,
) -> Result<Json<Submitted>, HostedError> {
    let (request, entry) = submit::enter(&app, request)?;
    let (asked, body): (HostedRequest, _) = entry.held.explain(input::json(&app, request).await)?;
    asked.check()?;
    let webhook = submit::webhook(&app, asked.webhook_url.clone(), asked.webhook_secret)?;
    let image = asked.input_image.map(|text| (Image::Text(text), "input_image"));
    let job = NewJob {
        prompt: asked.prompt,
        seed: asked.seed,
        num_images: asked.num_images,
        steps: asked.steps,
        guidance: asked.guidance,
        width: asked.width,
        height: asked.height,
        aspect_ratio: asked.aspect_ratio,
        output_format: asked.output_format,
        ..Default::default()
    };
    let id = submit(&app, Submission { owner, entry, job, asked: body, image, webhook }).await?;
    Ok(Json(Submitted {
        polling_url: format!("{base}/v1/get_result?id={id}"),
        id,
        status: HostedStatus::Pending,
        webhook_url: asked.webhook_url,
    }))
}

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ResultQuery {
    id: String,
}

/// How far a job is, in the hosted service's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub enum HostedStatus {
    Pending,
    Ready,
    Error,
    #[serde(rename = "Task not found")]
    TaskNotFound,
}

/// What came of a job.
#[derive(Debug, Serialize, ToSchema)]
pub struct HostedResult {
    id: String,
    status: HostedStatus,
    result: Option<Sample>,
    /// From 0 to 1.
    progress: Option<f64>,
    /// Why there is no result, in a sentence.
    #[schema(value_type = Option<Object>)]
    details: Option<Details>,
}

#[derive(Debug, Serialize)]
struct Details {
    message: String,
}

/// A result, and what made it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Sample {
    /// The address of the image; it needs no key.
    sample: String,
    /// The addresses of all images of the job.
    samples: Vec<String>,
    prompt: String,
    /// Of the first image.
    seed: u64,
    /// Seconds since 1970.
    start_time: f64,
    end_time: f64,
    duration: f64,
}

impl HostedResult {
    fn new(id: &str, status: HostedStatus) -> Self {
        Self { id: id.to_string(), status, result: None, progress: None, details: None }
    }

    /// What a job that is kept has come to; `base` is the address of the service.
    pub fn of(app: &App, base: &str, record: &Record) -> Self {
        let failed = |message: &str| Self {
            details: Some(Details { message: message.to_string() }),
            ..Self::new(&record.id, HostedStatus::Error)
        };
        match record.status {
            Status::Queued | Status::Running => {
                Self { progress: Some(0.0), ..Self::new(&record.id, HostedStatus::Pending) }
            }
            Status::Failed => failed(record.error.as_deref().unwrap_or("the job failed")),
            Status::Cancelled => failed("the job was cancelled"),
            Status::Done => {
                let url = |index| {
                    let name = files::image_name(index, record.request.output_format);
                    format!("{base}{}", app.image_path(&record.id, &name))
                };
                let seconds = |time: Option<i64>| time.unwrap_or_default() as f64 / 1000.0;
                let (start_time, end_time) = (seconds(record.started_at), seconds(record.finished_at));
                let sample = Sample {
                    sample: url(0),
                    samples: (0..record.images.len()).map(url).collect(),
                    prompt: record.request.prompt.clone(),
                    seed: record.request.seeds.first().copied().unwrap_or_default(),
                    start_time,
                    end_time,
                    duration: end_time - start_time,
                };
                Self { result: Some(sample), progress: Some(1.0), ..Self::new(&record.id, HostedStatus::Ready) }
            }
        }
    }
}

/// Shows what came of a job
#[utoipa::path(
    get, path = "/v1/get_result", tag = "hosted", params(ResultQuery),
    responses((status = 200, body = HostedResult), (status = "4XX", body = HostedErrorBody)),
)]
pub async fn get_result(
    State(app): State<Arc<App>>,
    caller: Result<Caller, ApiError>,
    Base(base): Base,
    query: Result<Query<ResultQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Json<HostedResult>, HostedError> {
    let Caller(owner) = caller?;
    let Query(ResultQuery { id }) = query.map_err(|e| ApiError::invalid(e.body_text()).about("id"))?;
    // Asked for often: what has not ended is answered from memory.
    if let Some((_, progress)) = app.jobs.pending(&id, &owner) {
        return Ok(Json(HostedResult { progress: Some(progress), ..HostedResult::new(&id, HostedStatus::Pending) }));
    }
    let result = blocking(move || {
        Ok(match app.jobs.job(&id, &owner)? {
            Some(record) => HostedResult::of(&app, &base, &record),
            None => HostedResult::new(&id, HostedStatus::TaskNotFound),
        })
    })
    .await?;
    Ok(Json(result))
}
