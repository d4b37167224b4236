//! From a request of any of the APIs to a durable job.

use std::sync::Arc;

use axum::{body::Bytes, extract::Request, http::HeaderMap};
use uuid::Uuid;

use super::{
    admission::{Held, admit},
    error::{ApiError, ApiResult},
    input::{self, Image, Source, blocking},
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
const IDEMPOTENCY_KEY: &str = "idempotency-key";

const MAX_KEY_BYTES: usize = 255;
const MAX_URL_BYTES: usize = 2083;

/// A request that was let in.
pub struct Entry {
    /// What its body holds in memory.
    pub held: Held,
    /// The caller's own name of it, by which it can be repeated.
    pub idempotency_key: Option<String>,
}

/// A request that was read.
pub struct Submission {
    pub owner: String,
    pub entry: Entry,
    pub job: NewJob,
    /// As it was sent, but for an image that is a file: what makes it the same as another.
    pub asked: Bytes,
    /// The image, and the field that it came in.
    pub image: Option<(Image, &'static str)>,
    pub webhook: Option<Webhook>,
}

/// Lets a request in, or refuses what has no place in the queue before its body is read. One with an idempotency key may be one
/// that has a place.
pub fn enter(app: &App, request: Request) -> ApiResult<(Request, Entry)> {
    let idempotency_key = idempotency_key(request.headers())?;
    if idempotency_key.is_none() {
        app.jobs.has_room().map_err(|refusal| refused(app, refusal))?;
    }
    let (request, held) = admit(app, request)?;
    Ok((request, Entry { held, idempotency_key }))
}

fn refused(app: &App, refusal: Refusal) -> ApiError {
    ApiError::from_refusal(refusal, app.jobs.retry_after())
}

/// The caller's own name of a request.
fn idempotency_key(headers: &HeaderMap) -> ApiResult<Option<String>> {
    let Some(key) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    match key.to_str() {
        Ok(key) if !key.is_empty() && key.len() <= MAX_KEY_BYTES => Ok(Some(key.to_string())),
        _ => Err(ApiError::invalid(format!("an Idempotency-Key is 1 to {MAX_KEY_BYTES} visible characters"))
            .about("Idempotency-Key")),
    }
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
    let Submission { owner, entry: Entry { held, idempotency_key }, job, asked, image, webhook } = submission;
    let idempotency = match idempotency_key {
        Some(key) => {
            // Before anything that the request names is fetched.
            let file = match &image {
                Some((Image::File(file), _)) => Some(file.bytes.clone()),
                _ => None,
            };
            let (app, owner) = (app.clone(), owner.clone());
            let (known, idempotency) = blocking(move || {
                let hash = match &file {
                    Some(file) => sha256_hex(&[&asked, file]),
                    None => sha256_hex(&[&asked]),
                };
                let known = app.jobs.known(&owner, &key, &hash).map_err(|refusal| refused(&app, refusal))?;
                Ok((known, (key, hash)))
            })
            .await?;
            if let Some(id) = known {
                return Ok(id);
            }
            Some(idempotency)
        }
        None => {
            drop(asked); // a large image may be in it
            None
        }
    };
    let request = job.resolve(app.options.max_images).map_err(ApiError::invalid)?;
    let source = match image {
        Some((image, field)) => Some(input::decode(app, &held, image, field).await?),
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
