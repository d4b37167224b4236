//! From a request of any of the APIs to a durable job.

use std::sync::Arc;

use axum::http::HeaderMap;
use uuid::Uuid;

use super::{
    error::{ApiError, ApiResult},
    input::{self, File, Source, blocking},
};
use crate::{
    app::App,
    fetch,
    jobs::{
        Refusal,
        job::NewJob,
        store::{Accepted, Webhook},
    },
    signature::sha256_hex,
};

/// The name of the header by which a caller says that two requests are one.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

const MAX_KEY_BYTES: usize = 255;
const MAX_URL_BYTES: usize = 2083;

/// A request with its image in hand.
pub struct Submission {
    pub owner: String,
    pub job: NewJob,
    /// The image, and the field that it came in.
    pub image: Option<(File, &'static str)>,
    pub idempotency_key: Option<String>,
    pub webhook: Option<Webhook>,
}

/// Refuses early what has no place in the queue, before its body is read. A request with a key may be one that has a place.
pub fn check_room(app: &App, idempotency_key: Option<&String>) -> ApiResult<()> {
    match idempotency_key {
        Some(_) => Ok(()),
        None => app.jobs.has_room().map_err(|refusal| refused(app, refusal)),
    }
}

fn refused(app: &App, refusal: Refusal) -> ApiError {
    ApiError::from_refusal(refusal, app.jobs.retry_after())
}

/// The caller's own name of a request.
pub fn idempotency_key(headers: &HeaderMap) -> ApiResult<Option<String>> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    match key.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= MAX_KEY_BYTES => Ok(Some(key.to_string())),
        _ => Err(ApiError::invalid(format!("an Idempotency-Key is 1 to {MAX_KEY_BYTES} visible characters"))
            .about("Idempotency-Key")),
    }
}

/// Checks a webhook as far as that goes without calling it.
pub fn webhook(url: Option<String>, secret: Option<String>) -> ApiResult<Option<Webhook>> {
    let Some(url) = url else {
        return match secret {
            Some(_) => Err(ApiError::invalid("a webhook_secret goes with a webhook_url").about("webhook_secret")),
            None => Ok(None),
        };
    };
    let refused = |reason: String| ApiError::invalid(format!("webhook_url: {reason}")).about("webhook_url");
    if url.len() > MAX_URL_BYTES {
        return Err(refused(format!("it is longer than {MAX_URL_BYTES} bytes")));
    }
    fetch::parse(&url).map_err(refused)?;
    Ok(Some(Webhook { url, secret }))
}

/// Checks a request whole and makes it a job; the job's id. What the model cannot do is refused here, not later.
pub async fn submit(app: &Arc<App>, submission: Submission) -> ApiResult<String> {
    let Submission { owner, job, image, idempotency_key, webhook } = submission;
    let idempotency = match idempotency_key {
        Some(key) => {
            let asked = serde_json::to_vec(&job).map_err(|e| ApiError::internal(e.to_string()))?;
            let bytes = image.as_ref().map_or(&[][..], |(file, _)| &file.bytes[..]);
            let url = webhook.as_ref().map_or("", |webhook| &webhook.url);
            let hash = sha256_hex(&[&asked, bytes, url.as_bytes()]);
            let (app, owner, same) = (app.clone(), owner.clone(), (key.clone(), hash.clone()));
            let known =
                blocking(move || app.jobs.known(&owner, &same.0, &same.1).map_err(|refusal| refused(&app, refusal)));
            if let Some(id) = known.await? {
                return Ok(id);
            }
            Some((key, hash))
        }
        None => None,
    };
    let request = job.resolve(app.options.max_images).map_err(ApiError::invalid)?;
    let source = match image {
        Some((file, field)) => Some(input::decode(app, file, field).await?),
        None => None,
    };
    let app = app.clone();
    blocking(move || {
        let (picture, input) = source.map(|Source { picture, input }| (picture, input)).unzip();
        let edit = request.edit(picture, &request.seeds).map_err(ApiError::invalid)?;
        let settings = app.rules.settle(&edit).map_err(|e| ApiError::invalid(e.to_string()))?;
        let max_steps = app.options.max_steps;
        if settings.steps > max_steps {
            return Err(ApiError::invalid(format!("steps is {}; give 1 to {max_steps}", settings.steps)).about("steps"));
        }
        let (width, height) = settings.output;
        if (width * height) as u64 > app.options.max_pixels {
            let limit = app.options.max_pixels as f64 / 1e6;
            return Err(ApiError::invalid(format!(
                "the result would be {width}x{height}; the limit is {limit} megapixels"
            )));
        }
        drop(edit);
        let job = Accepted {
            id: Uuid::new_v4().to_string(),
            owner,
            request,
            model: app.rules.name.clone(),
            input,
            idempotency,
            webhook,
        };
        app.jobs.accept(job).map_err(|refusal| refused(&app, refusal))
    })
    .await
}
