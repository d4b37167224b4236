//! HTTP: the routes, and what all of them have in common.

pub mod admission;
mod caller;
mod error;
pub mod hosted;
mod images;
mod input;
mod native;
mod openai;
mod page;
mod service;
mod submit;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::DefaultBodyLimit,
    http::{Method, header},
    middleware,
    response::IntoResponse,
    routing::get,
};
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowHeaders, CorsLayer},
};
use utoipa::{
    Modify, OpenApi,
    openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
};
use utoipa_axum::{router::OpenApiRouter, routes};

use crate::app::App;
use error::ApiError;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "retouch",
        description = "Edit images with words, on your own machine. One engine, three ways to call it: `hosted` as FLUX.1 Kontext's \
                       service, `openai` as OpenAI's image API, and `jobs`, the service's own.",
    ),
    modifiers(&Keys),
    tags(
        (name = "jobs", description = "The service's own API"),
        (name = "hosted", description = "As the hosted FLUX.1 Kontext service"),
        (name = "openai", description = "As OpenAI's image API"),
        (name = "images", description = "Pictures by signed addresses"),
        (name = "service", description = "The service itself"),
    ),
)]
struct Description;

/// A key can come in two ways, and is needed only where the service was given some.
struct Keys;

impl Modify for Keys {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("x-key", SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::new("x-key"))));
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
        components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
        let none: [&str; 0] = [];
        openapi.security = Some(vec![
            SecurityRequirement::default(),
            SecurityRequirement::new("x-key", none),
            SecurityRequirement::new("bearer", none),
        ]);
    }
}

fn described() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(native::create, native::list))
        .routes(routes!(native::show, native::remove))
        .routes(routes!(native::events))
        .routes(routes!(hosted::pro))
        .routes(routes!(hosted::max))
        .routes(routes!(hosted::dev))
        .routes(routes!(hosted::get_result))
        .routes(routes!(openai::edits))
        .routes(routes!(openai::generations))
        .routes(routes!(openai::models))
        .routes(routes!(images::image))
        .routes(routes!(service::service))
        .routes(routes!(service::health))
        .routes(routes!(service::ready))
        .routes(routes!(service::metrics))
}

/// The description of the API.
pub fn description() -> utoipa::openapi::OpenApi {
    described().into_openapi()
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let (routes, description) = described().split_for_parts();
    let mut routes = routes
        .route("/", get(page::index))
        .route("/assets/{name}", get(page::asset))
        .route("/openapi.json", get(async move || Json(description)))
        .fallback(async || ApiError::not_found("page"))
        .method_not_allowed_fallback(async || {
            (axum::http::StatusCode::METHOD_NOT_ALLOWED, "this address is not called in that way").into_response()
        })
        .layer(CatchPanicLayer::custom(|_| {
            ApiError::internal("this is a bug in retouch; please report it with the request").into_response()
        }))
        .layer(DefaultBodyLimit::max(app.options.max_upload));
    if !app.options.cors.is_empty() {
        routes = routes.layer(
            CorsLayer::new()
                .allow_origin(app.options.cors.clone())
                .allow_methods([Method::GET, Method::POST, Method::DELETE])
                // Clients bring headers of their own along.
                .allow_headers(AllowHeaders::mirror_request())
                .expose_headers([header::RETRY_AFTER]),
        );
    }
    routes
        .layer(middleware::from_fn_with_state(app.clone(), caller::guard))
        .layer(middleware::from_fn(admission::read_to_the_end))
        .with_state(app)
}
