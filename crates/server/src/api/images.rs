//! Pictures: results, source images and their small forms, by addresses that are signed.

use std::sync::Arc;

use axum::{
    extract::{Path, Query, State},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde::Deserialize;
use utoipa::IntoParams;
use uuid::Uuid;

use super::{
    error::{ApiError, ApiResult, ErrorBody},
    input::blocking,
    native::{INPUT, INPUT_THUMBNAIL},
};
use crate::{app::App, jobs::files};

#[derive(Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct Signature {
    signature: String,
}

/// Shows a picture of a job; its address comes with the job
#[utoipa::path(
    get, path = "/images/{id}/{name}", tag = "images",
    params(("id" = String, Path), ("name" = String, Path), Signature),
    responses(
        (status = 200, description = "A PNG, JPEG or WebP", body = [u8], content_type = "image/*"),
        (status = "4XX", body = ErrorBody),
    ),
)]
pub async fn image(
    State(app): State<Arc<App>>,
    path: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
    query: Result<Query<Signature>, axum::extract::rejection::QueryRejection>,
) -> ApiResult<Response> {
    let Path((id, name)) = path.map_err(|_| ApiError::not_found("picture"))?;
    let Query(Signature { signature }) = query.map_err(|e| ApiError::invalid(e.body_text()).about("signature"))?;
    // The signature is one that this service made: then id and name are of its making as well, and no path leads elsewhere.
    if Uuid::try_parse(&id).is_err() || !app.is_signed(&id, &name, &signature) {
        return Err(ApiError::not_found("picture"));
    }
    blocking(move || {
        let bytes = match name.as_str() {
            INPUT => app.jobs.store.input(&id)?,
            INPUT_THUMBNAIL => app.jobs.store.input_thumbnail(&id)?,
            _ => std::fs::read(app.jobs.store.image_file(&id, &name)).ok(),
        };
        let bytes = bytes.ok_or_else(|| ApiError::not_found("picture"))?;
        let media_type = if name == INPUT { input_type(&bytes) } else { files::media_type(&name) };
        // A picture never changes once it is there.
        let headers = [
            (header::CONTENT_TYPE, HeaderValue::from_static(media_type)),
            (header::CACHE_CONTROL, HeaderValue::from_static("private, max-age=86400, immutable")),
        ];
        Ok((headers, bytes).into_response())
    })
    .await
}

/// What a source image is, by its content.
fn input_type(bytes: &[u8]) -> &'static str {
    use image::ImageFormat::*;
    match image::guess_format(bytes) {
        Ok(Png) => "image/png",
        Ok(Jpeg) => "image/jpeg",
        Ok(WebP) => "image/webp",
        Ok(Gif) => "image/gif",
        Ok(Bmp) => "image/bmp",
        Ok(Tiff) => "image/tiff",
        _ => "application/octet-stream",
    }
}
