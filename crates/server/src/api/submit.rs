//! From a request of any of the APIs to a durable job.

use std::sync::Arc;

use axum::http::HeaderMap;
use serde::Serialize;
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
    /// The caller's name of the request, and a hash of it.
    pub idempotency: Option<(String, String)>,
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

/// The job that an earlier request of the same key became, and what to keep for a new one; `hash` is of the request as it was
/// sent, before anything that it names is fetched.
pub async fn known(
    app: &Arc<App>,
    owner: &str,
    key: Option<String>,
    hash: impl FnOnce() -> String,
) -> ApiResult<(Option<String>, Option<(String, String)>)> {
    let Some(key) = key else { return Ok((None, None)) };
    let (app, owner, idempotency) = (app.clone(), owner.to_string(), (key, hash()));
    blocking(move || {
        let known = app.jobs.known(&owner, &idempotency.0, &idempotency.1);
        Ok((known.map_err(|refusal| refused(&app, refusal))?, Some(idempotency)))
    })
    .await
}

/// A hash of a request that came as a form.
pub fn hash(request: &impl Serialize, image: Option<&File>) -> String {
    let asked = serde_json::to_vec(request).unwrap_or_default(); // of texts and numbers: it cannot fail
    sha256_hex(&[&asked, image.map_or(&[][..], |file| &file.bytes[..])])
}

/// Checks a webhook as far as that goes without calling it.
pub fn webhook(app: &App, url: Option<String>, secret: Option<String>) -> ApiResult<Option<Webhook>> {
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
    if app.options.public_url.is_none() && app.options.address.ip().is_unspecified() {
        return Err(refused(
            "the service does not know by which address it is reached; start it with --public-url".into(),
        ));
    }
    Ok(Some(Webhook { url, secret }))
}

/// Checks a request whole and makes it a job; the job's id. What the model cannot do is refused here, not later.
pub async fn submit(app: &Arc<App>, submission: Submission) -> ApiResult<String> {
    let Submission { owner, job, image, idempotency, webhook } = submission;
    let request = job.resolve(app.options.max_images).map_err(ApiError::invalid)?;
    let source = match image {
        Some((file, field)) => Some(input::decode(app, file, field).await?),
        None => None,
    };
    let app = app.clone();
    blocking(move || {
        let (picture, kept) = source.map(|Source { picture, input, permit }| (picture, (input, permit))).unzip();
        let (input, _permit) = Option::<(_, _)>::unzip(kept);
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
