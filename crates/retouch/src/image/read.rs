//! From the bytes of an image file to upright 8-bit RGB pixels.

use std::io::Cursor;

use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits, Rgb, RgbImage};

use super::{jpeg, webp};
use crate::{Error, Result};

/// The largest image that is read, in pixels. A file's header can promise any size: this bounds the memory it takes.
pub const MAX_PIXELS: u64 = 100_000_000;

/// The formats that [`read_image`] takes, for messages.
pub const READABLE_FORMATS: &str = "PNG, JPEG, WebP, GIF, BMP or TIFF";

/// What a decoder may allocate while it reads the header and the metadata, in bytes.
const MAX_HEADER_BYTES: u64 = 64 << 20;

/// Reads an image file: PNG, JPEG, WebP, GIF (first frame), BMP or TIFF, told by its content.
///
/// The EXIF orientation is applied, transparency is composited over white, and grayscale, palette, 16-bit and CMYK
/// pixels become 8-bit RGB (16-bit ones rounded to the nearest of `value / 257`). Colour profiles are not applied: the
/// numbers are taken as sRGB, as the reference implementation takes them.
///
/// `name` stands for the file in messages. Errors: anything else than a whole image of one of these formats, and more
/// than [`MAX_PIXELS`] pixels, which is found out before memory is taken for them.
pub fn read_image(bytes: &[u8], name: &str) -> Result<RgbImage> {
    read_image_up_to(MAX_PIXELS, bytes, name)
}

/// The same with a lower limit than [`MAX_PIXELS`].
pub fn read_image_up_to(max_pixels: u64, bytes: &[u8], name: &str) -> Result<RgbImage> {
    let refuse = |reason: String| Error::Image { file: name.to_string(), reason };
    let format = readable_format(bytes).map_err(refuse)?;
    let label = format.extensions_str().first().unwrap_or(&"image").to_uppercase();
    let broken = |e: image::ImageError| {
        refuse(format!("cannot be read as {label} ({e}); the file may be damaged or incomplete"))
    };

    // Before the decoder sees it, see there.
    if format == ImageFormat::WebP && !webp::is_whole(bytes) {
        return Err(refuse("is a truncated WebP (it claims more than it has); get a complete copy".into()));
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(limits(MAX_HEADER_BYTES));
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    if u64::from(width) * u64::from(height) > max_pixels {
        return Err(refuse(format!(
            "is {width}x{height} pixels; the limit is {} megapixels, so scale it down first",
            max_pixels as f64 / 1e6
        )));
    }
    if width == 0 || height == 0 {
        return Err(refuse(format!("is {width}x{height} pixels, which is no picture")));
    }
    if format == ImageFormat::Jpeg && !jpeg::is_whole(bytes) {
        return Err(refuse("is a truncated JPEG (it ends before its end marker); get a complete copy".into()));
    }
    // Twice the pixels: decoders hold an intermediate form (e.g. the coefficients of a progressive JPEG) beside them.
    decoder.set_limits(limits(2 * decoder.total_bytes() + MAX_HEADER_BYTES)).map_err(broken)?;
    // An unreadable orientation is no reason to refuse the picture.
    let orientation = decoder.orientation().ok();
    let mut image = DynamicImage::from_decoder(decoder).map_err(broken)?;
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(into_rgb(image))
}

/// Whether a file that begins with these bytes (16 are enough) is an image that [`read_image`] takes.
pub fn is_image(beginning: &[u8]) -> bool {
    readable_format(beginning).is_ok()
}

/// The format of the content, or why it cannot be read.
fn readable_format(bytes: &[u8]) -> std::result::Result<ImageFormat, String> {
    use ImageFormat::*;
    if bytes.is_empty() {
        return Err("the file is empty".to_string());
    }
    let other = match image::guess_format(bytes) {
        Ok(format @ (Png | Jpeg | WebP | Gif | Bmp | Tiff)) => return Ok(format),
        Ok(other) => format!("is in a format that cannot be read ({other:?})"),
        // ISO base media files: the brand follows.
        Err(_) if bytes.get(4..8) == Some(b"ftyp") => {
            let brand = String::from_utf8_lossy(bytes.get(8..12).unwrap_or_default());
            format!("is in a format that cannot be read (HEIC, AVIF or video, brand `{}`)", brand.trim().escape_debug())
        }
        Err(_) => "is not an image".to_string(),
    };
    Err(format!("{other}; give {READABLE_FORMATS}"))
}

fn limits(bytes: u64) -> Limits {
    let mut limits = Limits::no_limits();
    limits.max_alloc = Some(bytes);
    limits
}

fn into_rgb(image: DynamicImage) -> RgbImage {
    if !image.color().has_alpha() {
        return image.into_rgb8();
    }
    let (width, height) = (image.width(), image.height());
    let mut rgb = RgbImage::new(width, height);
    if image.color().bytes_per_pixel() / image.color().channel_count() == 1 {
        for (out, pixel) in rgb.pixels_mut().zip(image.into_rgba8().pixels()) {
            let [r, g, b, a] = pixel.0.map(u64::from);
            *out = Rgb([r, g, b].map(|c| over_white(c, a, 255) as u8));
        }
    } else {
        for (out, pixel) in rgb.pixels_mut().zip(image.into_rgba16().pixels()) {
            let [r, g, b, a] = pixel.0.map(u64::from);
            *out = Rgb([r, g, b].map(|c| ((over_white(c, a, 65535) + 128) / 257) as u8));
        }
    }
    rgb
}

/// A channel over white, rounded to the nearest; all values are of `0..=max`.
fn over_white(channel: u64, alpha: u64, max: u64) -> u64 {
    (channel * alpha + max * (max - alpha) + max / 2) / max
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use serde::Deserialize;

    use super::*;

    /// `expected.json`, see `scripts/reference/images.py`.
    #[derive(Deserialize)]
    struct Expected {
        valid: Vec<Valid>,
        invalid: Vec<Invalid>,
    }

    #[derive(Deserialize)]
    struct Valid {
        file: String,
        width: u32,
        height: u32,
        tolerance: u8,
        points: Vec<(u32, u32, u8, u8, u8)>,
    }

    #[derive(Deserialize)]
    struct Invalid {
        file: String,
    }

    fn folder() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/images")
    }

    fn expected() -> Expected {
        serde_json::from_slice(&fs::read(folder().join("expected.json")).unwrap()).unwrap()
    }

    fn reason(bytes: &[u8]) -> String {
        read_image(bytes, "photo").unwrap_err().to_string()
    }

    #[test]
    fn every_encoding_gives_upright_rgb_over_white() {
        for Valid { file, width, height, tolerance, points } in expected().valid {
            let image = read_image(&fs::read(folder().join(&file)).unwrap(), &file).unwrap();
            assert_eq!(image.dimensions(), (width, height), "{file}");
            for (x, y, r, g, b) in points {
                let found = image.get_pixel(x, y).0;
                let close = found.iter().zip([r, g, b]).all(|(a, b)| a.abs_diff(b) <= tolerance);
                assert!(close, "{file} at {x},{y}: {found:?}, expected {:?}", [r, g, b]);
            }
        }
    }

    #[test]
    fn broken_files_are_refused_by_name() {
        for Invalid { file } in expected().invalid {
            let refused = read_image(&fs::read(folder().join(&file)).unwrap(), &file).unwrap_err().to_string();
            assert!(refused.starts_with(&format!("{file}: ")), "{refused}");
        }
    }

    #[test]
    fn a_huge_header_is_refused_with_its_size_and_the_limit() {
        let refused = reason(&fs::read(folder().join("huge_header.png")).unwrap());
        assert!(refused.contains("50000x50000") && refused.contains("100 megapixels"), "{refused}");
    }

    #[test]
    fn a_file_cut_short_is_refused_in_every_format() {
        // Not GIF's and PNG's last bytes: what is cut there is the end marker, after the last pixel.
        for file in
            ["rgb.png", "rgb.jpg", "progressive.jpg", "rgb.gif", "rgb.bmp", "rgb.tiff", "lossless.webp", "lossy.webp"]
        {
            let bytes = fs::read(folder().join(file)).unwrap();
            for len in [bytes.len() / 2, bytes.len() * 3 / 4] {
                assert!(read_image(&bytes[..len], file).is_err(), "{file}: {len} of {} bytes", bytes.len());
            }
        }
    }

    #[test]
    fn sixteen_bits_round_to_the_nearest_level() {
        let deep = image::ImageBuffer::from_fn(256, 1, |x, _| image::Luma([(x as u16 * 257).saturating_add(128)]));
        let rgb = into_rgb(DynamicImage::ImageLuma16(deep));
        assert!(rgb.pixels().enumerate().all(|(x, pixel)| pixel.0 == [x as u8; 3]));
    }

    #[test]
    fn formats_that_cannot_be_read_are_named() {
        assert!(reason(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic").contains("HEIC"));
        assert!(reason(b"\0\0\0\x20ftypavif\0\0\0\0").contains("Avif"));
        assert!(reason(b"qoif\0\0\0\0").contains(READABLE_FORMATS));
        assert!(reason(b"%PDF-1.7").contains("not an image"));
    }
}
