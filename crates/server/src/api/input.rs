//! Source images as requests bring them: files, base64, data URLs and addresses.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Bytes,
    extract::{FromRequest, Multipart, Request, multipart::Field},
    http::{StatusCode, header},
    response::IntoResponse,
};
use base64::{
    Engine as _,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use image::RgbImage;
use retouch::image::read_image_up_to;
use serde::de::DeserializeOwned;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    admission::Held,
    error::{ApiError, ApiResult},
};
use crate::{
    app::App,
    fetch::{self, Reach},
    jobs::{files, store::Input},
};

/// How long the body of a request may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// A file as it was sent.
pub struct File {
    pub bytes: Bytes,
    pub name: Option<String>,
}

/// An image as it was sent, before anything is fetched or decoded.
pub enum Image {
    File(File),
    /// See [`from_text`].
    Text(String),
}

/// A source image, decoded, and in the form that it is kept in.
pub struct Source {
    pub picture: RgbImage,
    pub input: Input,
    /// Also where the caller goes away meanwhile: as many are decoded and held as there are cores.
    pub permit: OwnedSemaphorePermit,
}

/// The body of a request, which must arrive in time and be of a size that is taken.
pub async fn body(app: &Arc<App>, request: Request) -> ApiResult<Bytes> {
    let read = tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, app)).await;
    read.map_err(|_| ApiError::too_slow())?.map_err(|rejection| refused(app, rejection.into_response().status()))
}

fn refused(app: &App, status: StatusCode) -> ApiError {
    match status {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large_for(app.options.max_upload),
        _ => ApiError::malformed("the body of the request could not be read"),
    }
}

/// The body of a request as JSON, and as it was sent.
pub async fn json<T: DeserializeOwned + Send + 'static>(app: &Arc<App>, request: Request) -> ApiResult<(T, Bytes)> {
    if media_type(&request) != "application/json" {
        return Err(ApiError::unsupported_media("send the request as application/json"));
    }
    let body = body(app, request).await?;
    blocking(move || match serde_json::from_slice(&body) {
        Ok(read) => Ok((read, body)),
        Err(e) if e.is_data() => Err(ApiError::invalid(e.to_string())),
        Err(e) => Err(ApiError::malformed(format!("the body of the request is not JSON: {e}"))),
    })
    .await
}

/// What a request says its body is, without parameters.
pub fn media_type(request: &Request) -> String {
    let value = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase()
}

/// The fields of a form, each with its name.
pub async fn form(app: &Arc<App>, request: Request) -> ApiResult<Vec<(String, File)>> {
    if media_type(&request) != "multipart/form-data" {
        return Err(ApiError::unsupported_media("send the request as multipart/form-data"));
    }
    let malformed = |status| match status {
        StatusCode::PAYLOAD_TOO_LARGE => refused(app, status),
        _ => ApiError::malformed("the form of the request could not be read; is it complete?"),
    };
    let read = async {
        let multipart = Multipart::from_request(request, app).await;
        let mut multipart = multipart.map_err(|e| malformed(e.into_response().status()))?;
        let mut fields = Vec::new();
        while let Some(field) = multipart.next_field().await.map_err(|e| malformed(e.status()))? {
            if fields.len() == MAX_FIELDS {
                return Err(ApiError::malformed(format!("a form has at most {MAX_FIELDS} fields")));
            }
            let name = field.name().unwrap_or_default().to_string();
            let file_name = file_name(&field);
            let bytes = field.bytes().await.map_err(|e| malformed(e.status()))?;
            fields.push((name, File { bytes, name: file_name }));
        }
        Ok(fields)
    };
    tokio::time::timeout(BODY_TIMEOUT, read).await.map_err(|_| ApiError::too_slow())?
}

const MAX_FIELDS: usize = 64;

/// The last part of the name that a file came with: nothing of it is used as a path.
fn file_name(field: &Field<'_>) -> Option<String> {
    let name = field.file_name()?.rsplit(['/', '\\']).next()?;
    let name: String = name.chars().filter(|c| !c.is_control()).take(200).collect();
    (!name.is_empty()).then_some(name)
}

impl File {
    /// The text of a field.
    pub fn text(&self, field: &str) -> ApiResult<String> {
        String::from_utf8(self.bytes.to_vec())
            .map_err(|_| ApiError::malformed(format!("{field} is not UTF-8")).about(field))
    }
}

/// The image that a text stands for: base64, a data URL, or (where that is allowed) the address of one.
async fn from_text(app: &App, held: &Held, text: String, field: &'static str) -> ApiResult<File> {
    let bytes = if text.starts_with("http://") || text.starts_with("https://") {
        if !app.options.allow_url_inputs {
            let message =
                format!("{field} is a URL; this service fetches none (--allow-url-inputs): send the image as base64");
            return Err(ApiError::invalid(message).about(field));
        }
        let fetched = match fetch::parse(&text) {
            Ok(url) => fetch::fetch(url, app.options.max_upload, Reach::Public).await,
            Err(reason) => Err(reason),
        };
        let fetched = fetched.map_err(|reason| ApiError::invalid(format!("{field}: {reason}")).about(field))?;
        held.take(fetched.len()).map_err(|_| ApiError::busy())?;
        fetched
    } else {
        blocking(move || decode_text(&text, field)).await?
    };
    Ok(File { bytes: bytes.into(), name: None })
}

/// What base64 or a data URL holds.
fn decode_text(text: &str, field: &'static str) -> ApiResult<Vec<u8>> {
    let encoded = match text.strip_prefix("data:") {
        Some(data) => match data.split_once(',') {
            Some((kind, encoded)) if kind.ends_with(";base64") => encoded,
            _ => return Err(ApiError::invalid(format!("{field} is a data URL without base64")).about(field)),
        },
        None => text,
    };
    let compact: Vec<u8> = encoded.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let wrong = || ApiError::invalid(format!("{field} is neither base64, nor a data URL, nor a URL")).about(field);
    BASE64.decode(compact).map_err(|_| wrong())
}

/// Decodes a source image and makes its small form, as many at a time as there are cores. What is fetched for it counts to what
/// the request holds.
pub async fn decode(app: &App, held: &Held, image: Image, field: &'static str) -> ApiResult<Source> {
    let file = match image {
        Image::File(file) => file,
        Image::Text(text) => from_text(app, held, text, field).await?,
    };
    let max_pixels = app.options.max_pixels;
    let permit = app.decoding.clone().acquire_owned().await;
    let permit = permit.map_err(|_| ApiError::internal("the service is stopping"))?;
    blocking(move || {
        let name = file.name.as_deref().unwrap_or("the image");
        let refuse = |reason: String| ApiError::invalid(reason).about(field);
        let picture = read_image_up_to(max_pixels, &file.bytes, name).map_err(|e| refuse(e.to_string()))?;
        let thumbnail = files::thumbnail(&picture).map_err(refuse)?;
        let (width, height) = picture.dimensions();
        Ok(Source {
            input: Input { bytes: file.bytes.to_vec(), thumbnail, width, height, name: file.name },
            picture,
            permit,
        })
    })
    .await
}

/// Runs what waits for a disk or computes beside the tasks that answer requests.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> ApiResult<T> + Send + 'static) -> ApiResult<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(ApiError::internal("this is a bug in retouch; please report it with the request")))
}
