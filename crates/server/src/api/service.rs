//! The service itself: what it can do, and how it is.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use serde::Serialize;
use utoipa::ToSchema;

use super::{caller::Caller, error::ErrorBody};
use crate::app::App;

/// What this service runs, and what it takes.
#[derive(Serialize, ToSchema)]
pub struct Service {
    version: &'static str,
    model: String,
    /// Whether it edits images.
    edits: bool,
    /// Whether it makes images from words alone.
    generates: bool,
    devices: Vec<String>,
    defaults: Defaults,
    limits: Limits,
    requires_key: bool,
}

#[derive(Serialize, ToSchema)]
struct Defaults {
    steps: usize,
    /// None where the model takes no guidance.
    guidance: Option<f64>,
}

#[derive(Serialize, ToSchema)]
struct Limits {
    max_pixels: u64,
    max_images: usize,
    max_steps: usize,
    max_upload_bytes: usize,
    max_prompt_bytes: usize,
}

/// Describes the service; needs no key
#[utoipa::path(get, path = "/api/service", tag = "service", responses((status = 200, body = Service)))]
pub async fn service(State(app): State<Arc<App>>) -> Json<Service> {
    let rules = &app.rules;
    Json(Service {
        version: env!("CARGO_PKG_VERSION"),
        model: rules.name.clone(),
        edits: rules.edits(),
        generates: true,
        devices: app.devices.clone(),
        defaults: Defaults {
            steps: rules.defaults.steps,
            guidance: rules.takes_guidance.then_some(rules.defaults.guidance),
        },
        limits: Limits {
            max_pixels: app.options.max_pixels,
            max_images: app.options.max_images,
            max_steps: app.options.max_steps,
            max_upload_bytes: app.options.max_upload,
            max_prompt_bytes: retouch::MAX_PROMPT_BYTES,
        },
        requires_key: app.requires_key(),
    })
}

/// How the service is.
#[derive(Serialize, ToSchema)]
pub struct Health {
    /// `ok`, or `stopping`.
    status: &'static str,
    waiting: usize,
    running: usize,
}

fn state(app: &App) -> Health {
    let (waiting, running) = app.jobs.counts();
    Health { status: if app.jobs.is_stopping() { "stopping" } else { "ok" }, waiting, running }
}

/// Tells that the process is alive; needs no key
#[utoipa::path(get, path = "/health", tag = "service", responses((status = 200, body = Health)))]
pub async fn health(State(app): State<Arc<App>>) -> Json<Health> {
    Json(state(&app))
}

/// Tells whether new jobs are taken; needs no key
#[utoipa::path(
    get, path = "/ready", tag = "service",
    responses((status = 200, body = Health), (status = 503, description = "It is stopping", body = Health)),
)]
pub async fn ready(State(app): State<Arc<App>>) -> (StatusCode, Json<Health>) {
    let health = state(&app);
    (if health.status == "ok" { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, Json(health))
}

/// Counts for Prometheus
#[utoipa::path(
    get, path = "/metrics", tag = "service",
    responses((status = 200, body = String, content_type = "application/openmetrics-text"), (status = "4XX", body = ErrorBody)),
)]
pub async fn metrics(State(app): State<Arc<App>>, _: Caller) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.jobs.metrics.text())
}
