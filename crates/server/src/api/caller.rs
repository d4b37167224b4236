//! Who asks, and from where.

use std::{net::IpAddr, sync::Arc};

use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, HeaderValue, header, request::Parts, uri::Authority},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::error::{ApiError, Kind};
use crate::app::App;

/// Whose jobs a request may see: those of its API key.
pub struct Caller(pub String);

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let text = |name| parts.headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        let bearer = || text("authorization")?.split_once(' ').filter(|(s, _)| s.eq_ignore_ascii_case("bearer"));
        let key = text("x-key").or_else(|| Some(bearer()?.1.trim()));
        app.owner(key).map(Self).ok_or_else(ApiError::no_key)
    }
}

/// The address by which the caller knows this service, without a slash at its end.
pub struct Base(pub String);

impl FromRequestParts<Arc<App>> for Base {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        if let Some(url) = &app.options.public_url {
            return Ok(Self(url.as_str().trim_end_matches('/').to_string()));
        }
        let host = authority(&parts.headers, &parts.uri.authority().cloned());
        let host = host.map_or_else(|| app.options.address.to_string(), |host| host.to_string());
        Ok(Self(format!("http://{host}")))
    }
}

/// The host that a request is for: of its header, or of its URI.
fn authority(headers: &HeaderMap, of_uri: &Option<Authority>) -> Option<Authority> {
    let header = headers.get(header::HOST).and_then(|host| host.to_str().ok()?.parse().ok());
    header.or_else(|| of_uri.clone())
}

/// The door: keeps pages of other sites out, and sets the headers that each answer has.
///
/// A browser on this machine reaches the port for any page that it shows. What such a page sends has its `Origin`; one that
/// has pointed its own name at this machine has that name as the `Host`.
pub async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_string());
    let mut response = match check(&app, &request) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    if let Some(Kind(kind)) = response.extensions().get() {
        app.jobs.metrics.error(kind);
    }
    // The path holds ids at most; queries and bodies are nobody's business.
    tracing::debug!("{method} {path}: {}", response.status());
    let headers = response.headers_mut();
    for (name, value) in [
        ("x-content-type-options", "nosniff"),
        ("referrer-policy", "no-referrer"),
        ("cross-origin-opener-policy", "same-origin"),
        ("content-security-policy", POLICY),
        ("x-frame-options", "DENY"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    if app.options.cors.is_empty() {
        headers.insert("cross-origin-resource-policy", HeaderValue::from_static("same-origin"));
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    response
}

/// What a page from here may do: nothing that does not come from here.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; \
                      connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

fn check(app: &App, request: &Request) -> Result<(), ApiError> {
    let headers = request.headers();
    let host = authority(headers, &request.uri().authority().cloned());
    if let Some(origin) = headers.get(header::ORIGIN)
        && !app.options.cors.contains(origin)
        && !is_own(app, origin, host.as_ref())
    {
        return Err(ApiError::forbidden("pages of other origins may not call this service; --cors ORIGIN allows one"));
    }
    // With a key, who only points a name here has not got it.
    if app.requires_key() {
        return Ok(());
    }
    match host {
        Some(host) if is_local_name(app, host.host()) => Ok(()),
        Some(host) => Err(ApiError::forbidden(format!(
            "this service is not called {}; use its address, or say --public-url, or require an --api-key",
            host.host()
        ))),
        None => Err(ApiError::forbidden("the request does not say for which host it is")),
    }
}

/// Whether an origin is that of the page that this service shows.
fn is_own(app: &App, origin: &HeaderValue, host: Option<&Authority>) -> bool {
    let Ok(origin) = origin.to_str() else { return false };
    if let Some(url) = &app.options.public_url
        && url.origin().ascii_serialization() == origin
    {
        return true;
    }
    let of_origin = origin.split_once("://").map(|(_, host)| host);
    of_origin.is_some() && of_origin == host.map(Authority::as_str)
}

/// Whether a name is one that nobody else can point here.
fn is_local_name(app: &App, name: &str) -> bool {
    let bare = name.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<IpAddr>().is_ok()
        || bare.eq_ignore_ascii_case("localhost")
        || app.options.public_url.as_ref().and_then(|url| url.host_str()) == Some(bare)
}
