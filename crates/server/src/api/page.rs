//! The web page, embedded: `web/dist`, which `npm run build` makes in `web`.

use axum::{
    extract::Path,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
};
use rust_embed::RustEmbed;

#[derive(RustEmbed)]
#[folder = "web/dist"]
struct Page;

pub async fn index() -> Response {
    file("index.html")
}

pub async fn asset(Path(name): Path<String>) -> Response {
    file(&format!("assets/{name}"))
}

fn file(name: &str) -> Response {
    let Some(file) = Page::get(name) else { return StatusCode::NOT_FOUND.into_response() };
    let media_type = match name.rsplit('.').next() {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        Some("css") => "text/css; charset=utf-8",
        Some("svg") => "image/svg+xml",
        _ => "application/octet-stream",
    };
    // Asked for anew each time, as names stay the same from version to version.
    ([(header::CONTENT_TYPE, media_type), (header::CACHE_CONTROL, "no-cache")], file.data).into_response()
}
