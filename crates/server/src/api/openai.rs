//! Routes in the form of OpenAI's image API: each answers with the result.

use std::{
    borrow::Cow,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    extract::{Request, State},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use retouch::image::OutputFormat;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use utoipa::{
    PartialSchema, ToSchema,
    openapi::{KnownFormat, ObjectBuilder, RefOr, Schema, SchemaFormat, Type},
};

use super::{
    caller::{Base, Caller},
    error::{ApiError, ApiResult, ErrorBody},
    input::{self, File, Image, blocking},
    submit::{self, Submission, submit},
};
use crate::{
    app::App,
    jobs::{
        files,
        job::{ImageFormat, NewJob, Status},
    },
};

/// How results come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    #[default]
    B64Json,
    Url,
}

/// Makes an image from words alone.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ImageRequest {
    #[schema(required, min_length = 1)]
    prompt: String,
    /// The model that this service runs; can be left out.
    model: Option<String>,
    /// How many images; 1 if left out.
    #[schema(minimum = 1)]
    n: Option<usize>,
    /// `auto`, or width and height in multiples of 16.
    #[schema(example = "1024x1024")]
    size: Option<String>,
    #[schema(value_type = Option<ImageFormat>)]
    output_format: Option<OutputFormat>,
    /// Quality of a JPEG, 1 to 100.
    #[schema(minimum = 0, maximum = 100)]
    output_compression: Option<u8>,
    response_format: Option<ResponseFormat>,
    /// Beyond OpenAI: the seed of the first image.
    seed: Option<u64>,
    /// Beyond OpenAI: denoise steps.
    #[schema(minimum = 1, maximum = 1000)]
    steps: Option<usize>,
    /// Beyond OpenAI: how closely to follow the prompt.
    guidance: Option<f64>,
    /// Only `auto` is taken.
    quality: Option<String>,
    /// Only `auto` and `opaque` are taken.
    background: Option<String>,
    /// Only false is taken.
    stream: Option<bool>,
}

/// A form of an edit: an [`ImageRequest`] and the image.
pub struct EditForm;

impl PartialSchema for EditForm {
    fn schema() -> RefOr<Schema> {
        let mut schema = ImageRequest::schema();
        if let RefOr::T(Schema::Object(form)) = &mut schema {
            let image = ObjectBuilder::new()
                .schema_type(Type::String)
                .format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)))
                .content_media_type("application/octet-stream")
                .description(Some("The image to edit; `image[]` is the same. One is taken."));
            form.properties.insert("image".into(), image.into());
            form.required.push("image".into());
            form.description = Some("An edit.".into());
        }
        schema
    }
}

impl ToSchema for EditForm {
    fn name() -> Cow<'static, str> {
        "EditForm".into()
    }

    fn schemas(schemas: &mut Vec<(String, RefOr<Schema>)>) {
        ImageRequest::schemas(schemas);
    }
}

/// Results, each by its address or in base64.
#[derive(Serialize, ToSchema)]
pub struct ImageResponse {
    /// Seconds since 1970.
    created: u64,
    data: Vec<ImageData>,
    output_format: &'static str,
    size: String,
}

#[derive(Serialize, ToSchema)]
pub struct ImageData {
    #[serde(skip_serializing_if = "Option::is_none")]
    b64_json: Option<String>,
    /// Needs no key.
    #[serde(skip_serializing_if = "Option::is_none")]
    url: Option<String>,
}

impl ImageRequest {
    /// Names what has no meaning here instead of passing over it.
    fn job(self, app: &App) -> ApiResult<(NewJob, ResponseFormat)> {
        let refuse = |field: &str, reason: String| Err(ApiError::invalid(format!("{field} {reason}")).about(field));
        if let Some(model) = &self.model
            && *model != app.rules.name
        {
            return refuse(
                "model",
                format!("is `{model}`; this service runs {}: say that, or leave it out", app.rules.name),
            );
        }
        if self.quality.as_ref().is_some_and(|quality| quality != "auto") {
            return refuse("quality", "is not supported; use `steps`, or leave it out".into());
        }
        if self.background.as_ref().is_some_and(|background| background != "auto" && background != "opaque") {
            return refuse("background", "can only be opaque".into());
        }
        if self.stream == Some(true) {
            return refuse("stream", "is not supported here; follow a job of /api/jobs by its events".into());
        }
        let (width, height) = match self.size.as_deref() {
            None | Some("auto") => (None, None),
            Some(size) => match size.split_once('x').map(|(width, height)| (width.parse(), height.parse())) {
                Some((Ok(width), Ok(height))) => (Some(width), Some(height)),
                _ => return refuse("size", format!("is `{size}`; give it as 1024x1024, or auto")),
            },
        };
        let format = self.output_format.unwrap_or_default();
        if self.output_compression.is_some() && format != OutputFormat::Jpeg {
            return refuse("output_compression", "acts on a jpeg alone; ask for that, or leave it out".into());
        }
        let job = NewJob {
            prompt: self.prompt,
            seed: self.seed,
            num_images: self.n,
            steps: self.steps,
            guidance: self.guidance,
            width,
            height,
            output_format: self.output_format,
            // The smallest that there is.
            quality: self.output_compression.map(|quality| quality.max(1)),
            ..Default::default()
        };
        Ok((job, self.response_format.unwrap_or_default()))
    }
}

/// Edits an image
#[utoipa::path(
    post, path = "/v1/images/edits", tag = "openai",
    params(("idempotency-key" = Option<String>, Header, description = "Two requests of one key are one job", max_length = 255)),
    request_body(content = EditForm, content_type = "multipart/form-data"),
    responses(
        (status = 200, body = ImageResponse),
        (status = "4XX", body = ErrorBody),
        (status = 500, description = "The edit failed", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    ),
)]
pub async fn edits(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    Base(base): Base,
    request: Request,
) -> ApiResult<Json<ImageResponse>> {
    let (request, entry) = submit::enter(&app, request)?;
    let (asked, image) = entry.held.explain(read_form(&app, request).await)?;
    let image = image.ok_or_else(|| ApiError::invalid("the form has no field `image`").about("image"))?;
    let (job, format) = asked.job(&app)?;
    // The job is all that the form's texts say.
    let asked = serde_json::to_vec(&job).map_err(|e| ApiError::internal(e.to_string()))?.into();
    let image = Some((Image::File(image), "image"));
    answer(&app, &base, Submission { owner, entry, job, asked, image, webhook: None }, format).await
}

/// Makes an image from words alone
#[utoipa::path(
    post, path = "/v1/images/generations", tag = "openai",
    params(("idempotency-key" = Option<String>, Header, description = "Two requests of one key are one job", max_length = 255)),
    request_body = ImageRequest,
    responses(
        (status = 200, body = ImageResponse),
        (status = "4XX", body = ErrorBody),
        (status = 500, description = "The edit failed", body = ErrorBody),
        (status = 507, description = "The disk is full", body = ErrorBody),
    ),
)]
pub async fn generations(
    State(app): State<Arc<App>>,
    Caller(owner): Caller,
    Base(base): Base,
    request: Request,
) -> ApiResult<Json<ImageResponse>> {
    let (request, entry) = submit::enter(&app, request)?;
    let (asked, body): (ImageRequest, _) = entry.held.explain(input::json(&app, request).await)?;
    let (job, format) = asked.job(&app)?;
    answer(&app, &base, Submission { owner, entry, job, asked: body, image: None, webhook: None }, format).await
}

/// The fields of a form: texts, and one image.
async fn read_form(app: &Arc<App>, request: Request) -> ApiResult<(ImageRequest, Option<File>)> {
    let (mut asked, mut image) = (ImageRequest::default(), None);
    for (name, file) in input::form(app, request).await? {
        if matches!(name.as_str(), "image" | "image[]") {
            if image.replace(file).is_some() {
                return Err(ApiError::invalid("several images are not supported yet: give one").about("image"));
            }
            continue;
        }
        let text = || file.text(&name);
        match name.as_str() {
            "prompt" => asked.prompt = text()?,
            "model" => asked.model = Some(text()?),
            "size" => asked.size = Some(text()?),
            "quality" => asked.quality = Some(text()?),
            "background" => asked.background = Some(text()?),
            "n" => asked.n = Some(number(&name, &text()?)?),
            "output_compression" => asked.output_compression = Some(number(&name, &text()?)?),
            "seed" => asked.seed = Some(number(&name, &text()?)?),
            "steps" => asked.steps = Some(number(&name, &text()?)?),
            "guidance" => asked.guidance = Some(number(&name, &text()?)?),
            "stream" => asked.stream = Some(number(&name, &text()?)?),
            "output_format" => asked.output_format = Some(word(&name, text()?)?),
            "response_format" => asked.response_format = Some(word(&name, text()?)?),
            _ => return Err(ApiError::invalid(format!("`{name}` is not supported; leave it out")).about(name)),
        }
    }
    Ok((asked, image))
}

/// A number or a truth value that is written as a text.
fn number<T: DeserializeOwned>(field: &str, text: &str) -> ApiResult<T> {
    serde_json::from_str(text)
        .map_err(|_| ApiError::invalid(format!("{field} is `{text}`, which it cannot be")).about(field))
}

/// One of several words.
fn word<T: DeserializeOwned>(field: &str, text: String) -> ApiResult<T> {
    serde_json::from_value(text.into()).map_err(|e| ApiError::invalid(format!("{field}: {e}")).about(field))
}

/// Waits for a job: ends it if its caller goes away and cannot come back for it.
struct Waiting {
    app: Arc<App>,
    id: String,
    abandon: bool,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.abandon {
            let (app, id) = (self.app.clone(), self.id.clone());
            tokio::task::spawn_blocking(move || app.jobs.cancel(&id));
        }
    }
}

/// Does a job and answers with what came of it; `base` is the address of the service.
async fn answer(
    app: &Arc<App>,
    base: &str,
    submission: Submission,
    format: ResponseFormat,
) -> ApiResult<Json<ImageResponse>> {
    let (owner, abandon) = (submission.owner.clone(), submission.entry.idempotency_key.is_none());
    let id = submit(app, submission).await?;
    let mut waiting = Waiting { app: app.clone(), id, abandon };
    if let Some(live) = app.jobs.live(&waiting.id) {
        // An error is the end of the job as well.
        let _ = live.subscribe().wait_for(|signal| signal.ended).await;
    }
    waiting.abandon = false;
    let (app, id, base) = (app.clone(), waiting.id.clone(), base.to_string());
    blocking(move || {
        let record = app.jobs.job(&id, &owner)?.ok_or_else(|| ApiError::not_found("job"))?;
        match record.status {
            Status::Done => {}
            Status::Cancelled => return Err(ApiError::internal("the job was cancelled").final_()),
            Status::Failed => {
                return Err(ApiError::internal(record.error.unwrap_or_else(|| "the job failed".into())).final_());
            }
            Status::Queued | Status::Running => {
                return Err(ApiError::from_refusal(crate::jobs::Refusal::Stopping, 10));
            }
        }
        let mut data = Vec::with_capacity(record.images.len());
        for index in 0..record.images.len() {
            let name = files::image_name(index, record.request.output_format);
            data.push(match format {
                ResponseFormat::Url => {
                    ImageData { b64_json: None, url: Some(format!("{base}{}", app.image_path(&id, &name))) }
                }
                ResponseFormat::B64Json => {
                    let bytes = std::fs::read(app.jobs.store.image_file(&id, &name));
                    let bytes = bytes.map_err(|_| ApiError::internal("the result is not there any more"))?;
                    ImageData { b64_json: Some(STANDARD.encode(bytes)), url: None }
                }
            });
        }
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let output_format = record.request.output_format.name();
        let size = record.images.first().map_or_else(String::new, |(width, height)| format!("{width}x{height}"));
        Ok(Json(ImageResponse { created, data, output_format, size }))
    })
    .await
}

#[derive(Serialize, ToSchema)]
pub struct ModelList {
    object: &'static str,
    data: Vec<Model>,
}

#[derive(Serialize, ToSchema)]
pub struct Model {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
}

/// Lists the model that this service runs
#[utoipa::path(get, path = "/v1/models", tag = "openai", responses((status = 200, body = ModelList), (status = "4XX", body = ErrorBody)))]
pub async fn models(State(app): State<Arc<App>>, _: Caller) -> Json<ModelList> {
    let model = Model { id: app.rules.name.clone(), object: "model", created: 0, owned_by: "local" };
    Json(ModelList { object: "list", data: vec![model] })
}
