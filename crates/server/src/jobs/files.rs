//! The pictures of a job: their names, their small forms, and how they are written.

use image::RgbImage;
use retouch::{
    Parameters,
    image::{OutputFormat, encode, resize},
};

use super::job::JobRequest;

/// The longer side of a small picture, in pixels.
const THUMBNAIL: u32 = 320;

/// The file of the image at `position`.
pub fn image_name(position: usize, format: OutputFormat) -> String {
    format!("{position}.{}", format.extension())
}

/// The file of its small form.
pub fn thumbnail_name(position: usize) -> String {
    format!("{position}-small.jpg")
}

/// How HTTP calls what a file of that name holds.
pub fn media_type(name: &str) -> &'static str {
    match name.rsplit('.').next() {
        Some("png") => "image/png",
        Some("webp") => "image/webp",
        _ => "image/jpeg",
    }
}

/// A small JPEG of a picture, or a sentence.
pub fn thumbnail(picture: &RgbImage) -> Result<Vec<u8>, String> {
    let (width, height) = picture.dimensions();
    let scale = f64::from(THUMBNAIL) / f64::from(width.max(height));
    let side = |side: u32| ((f64::from(side) * scale).round() as u32).clamp(1, THUMBNAIL);
    let small = if scale < 1.0 { &resize(picture, side(width), side(height)) } else { picture };
    encode(small, OutputFormat::Jpeg, Some(85), None).map_err(|e| e.to_string())
}

/// A result as a file, its parameters inside, or a sentence.
pub fn result(picture: &RgbImage, request: &JobRequest, parameters: &Parameters) -> Result<Vec<u8>, String> {
    encode(picture, request.output_format, request.quality, Some(parameters)).map_err(|e| e.to_string())
}
