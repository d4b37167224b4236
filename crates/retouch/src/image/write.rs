//! From pixels to the bytes of an image file, and from bytes to a file that is whole or absent.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    str::FromStr,
};

use image::{ExtendedColorType, ImageEncoder, RgbImage, codecs::jpeg::JpegEncoder, codecs::webp::WebPEncoder};
use serde::{Deserialize, Serialize};
use tempfile::NamedTempFile;

use super::{jpeg, metadata};
use crate::{Error, Parameters, Result};

/// A format that results are written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputFormat {
    #[default]
    Png,
    Jpeg,
    /// Lossless, the only kind that the `image` crate writes.
    Webp,
}

impl OutputFormat {
    pub const DEFAULT_JPEG_QUALITY: u8 = 95;

    /// The format that a file name asks for; `None` for a name without an extension that is known.
    pub fn from_path(path: &Path) -> Option<Self> {
        path.extension()?.to_str()?.parse().ok()
    }

    /// As requests name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpeg",
            Self::Webp => "webp",
        }
    }

    /// The extension of new files, without a dot.
    pub fn extension(self) -> &'static str {
        match self {
            Self::Png => "png",
            Self::Jpeg => "jpg",
            Self::Webp => "webp",
        }
    }

    /// Refuses a quality that this format has no use for.
    pub fn check_quality(self, quality: Option<u8>) -> Result<()> {
        let reason = match (self, quality) {
            (_, None) | (Self::Jpeg, Some(1..=100)) => return Ok(()),
            (Self::Jpeg, Some(quality)) => format!("quality is {quality}; give 1 to 100"),
            (Self::Png, Some(_)) => "PNG is lossless and has no quality; use JPEG or leave the quality out".into(),
            (Self::Webp, Some(_)) => {
                "WebP is written without loss and has no quality; use JPEG or leave the quality out".into()
            }
        };
        Err(Error::BadRequest(reason))
    }
}

impl FromStr for OutputFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name.to_ascii_lowercase().as_str() {
            "png" => Ok(Self::Png),
            "jpg" | "jpeg" => Ok(Self::Jpeg),
            "webp" => Ok(Self::Webp),
            _ => Err(Error::BadRequest(format!("cannot write the image format `{name}`; use png, jpeg or webp"))),
        }
    }
}

/// The bytes of an image file.
///
/// JPEG is written without chroma subsampling, at `quality` 1 to 100, [`OutputFormat::DEFAULT_JPEG_QUALITY`] where not
/// given; the other formats are lossless. `parameters` are stored inside for [`super::read_parameters`] to find.
///
/// Errors: a quality for a format without one, and a size that the format cannot hold.
pub fn encode(
    image: &RgbImage,
    format: OutputFormat,
    quality: Option<u8>,
    parameters: Option<&Parameters>,
) -> Result<Vec<u8>> {
    format.check_quality(quality)?;
    let json = parameters.map(metadata::json).transpose()?;
    let stored = parameters.zip(json.as_deref());
    match format {
        OutputFormat::Png => png(image, stored).map_err(|e| cannot_encode("PNG", e)),
        OutputFormat::Jpeg => jpeg(image, quality.unwrap_or(OutputFormat::DEFAULT_JPEG_QUALITY), stored),
        OutputFormat::Webp => webp(image, stored),
    }
}

fn png(image: &RgbImage, stored: Option<(&Parameters, &str)>) -> std::result::Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, image.width(), image.height());
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    if let Some((parameters, json)) = stored {
        // Zero bytes would end a text early.
        let plain = metadata::plain_text(parameters).replace('\0', "");
        encoder.add_itxt_chunk(metadata::PNG_KEYWORD.to_string(), json.to_string())?;
        encoder.add_itxt_chunk("parameters".to_string(), plain)?;
        encoder.add_text_chunk("Software".to_string(), metadata::software(parameters))?;
    }
    let mut writer = encoder.write_header()?;
    writer.write_image_data(image.as_raw())?;
    writer.finish()?;
    Ok(bytes)
}

fn jpeg(image: &RgbImage, quality: u8, stored: Option<(&Parameters, &str)>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = JpegEncoder::new_with_quality(&mut bytes, quality);
    let in_exif = |json: &&str| metadata::escape(json).len() <= metadata::MAX_JPEG_EXIF_JSON;
    if let Some((parameters, json)) = stored {
        let exif = metadata::exif_block(parameters, Some(json).filter(in_exif))?;
        encoder.set_exif_metadata(exif).map_err(|e| cannot_encode("JPEG", e))?;
    }
    write_pixels(encoder, image).map_err(|e| cannot_encode("JPEG", e))?;
    Ok(match stored {
        Some((_, json)) if !in_exif(&json) => jpeg::with_text(&bytes, json.as_bytes()),
        _ => bytes,
    })
}

fn webp(image: &RgbImage, stored: Option<(&Parameters, &str)>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = WebPEncoder::new_lossless(&mut bytes);
    if let Some((parameters, json)) = stored {
        let exif = metadata::exif_block(parameters, Some(json))?;
        encoder.set_exif_metadata(exif).map_err(|e| cannot_encode("WebP", e))?;
    }
    write_pixels(encoder, image).map_err(|e| cannot_encode("WebP", e))?;
    Ok(bytes)
}

fn write_pixels(encoder: impl ImageEncoder, image: &RgbImage) -> image::ImageResult<()> {
    encoder.write_image(image.as_raw(), image.width(), image.height(), ExtendedColorType::Rgb8)
}

fn cannot_encode(format: &str, reason: impl std::fmt::Display) -> Error {
    Error::Image { file: "result".to_string(), reason: format!("cannot be written as {format} ({reason})") }
}

/// Writes a file that is there whole or not at all: a temporary file beside it takes its name when complete.
///
/// Without `overwrite` an existing file is left alone and refused. A link to a file is followed. A device like
/// `/dev/null` or `/dev/stdout`, which cannot be replaced, is written straight to.
pub fn write_atomically(path: &Path, bytes: &[u8], overwrite: bool) -> Result<()> {
    let failed = |source: io::Error| Error::Io { file: path.display().to_string(), source };
    write_whole(path, overwrite, |out| out.write_all(bytes).map_err(failed))
}

/// The same for what `write` writes piece by piece; where it fails, nothing is left.
pub fn write_whole(path: &Path, overwrite: bool, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let failed = |source: io::Error| Error::Io { file: path.display().to_string(), source };
    match target(path, overwrite)? {
        Target::Stream => write(&mut OpenOptions::new().write(true).open(path).map_err(failed)?),
        Target::File(target) => {
            let mut file = temporary_beside(&target).map_err(failed)?;
            write(&mut file)?;
            file.as_file().sync_all().map_err(failed)?;
            let placed = if overwrite { file.persist(&target) } else { file.persist_noclobber(&target) };
            placed.map_err(|e| {
                if e.error.kind() == io::ErrorKind::AlreadyExists { exists(path) } else { failed(e.error) }
            })?;
            Ok(())
        }
    }
}

/// Finds out before the work whether [`write_atomically`] will find its place: leaves nothing behind.
pub fn check_writable(path: &Path, overwrite: bool) -> Result<()> {
    let failed = |source: io::Error| Error::Io { file: path.display().to_string(), source };
    match target(path, overwrite)? {
        Target::Stream => OpenOptions::new().write(true).open(path).map(drop).map_err(failed),
        Target::File(target) => temporary_beside(&target).map(drop).map_err(failed),
    }
}

enum Target {
    File(PathBuf),
    /// What is written to as it is.
    Stream,
}

fn target(path: &Path, overwrite: bool) -> Result<Target> {
    let refuse = |reason: &str| Error::Image { file: path.display().to_string(), reason: reason.to_string() };
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => Err(refuse("is a folder; give the name of a file in it")),
        Ok(found) if is_stream(path, found.file_type()) => Ok(Target::Stream),
        Ok(found) if !found.is_file() => Err(refuse("is neither a file nor an output device; give the name of a file")),
        Ok(_) if !overwrite => Err(exists(path)),
        Ok(_) => Ok(Target::File(fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf()))),
        Err(_) if path.is_symlink() => {
            Err(refuse("is a link to where no file is; give the name of that file, or another"))
        }
        Err(_) if path.file_name().is_none() => Err(refuse("is not the name of a file")),
        Err(_) if !folder_of(path).is_dir() => Err(refuse("its folder does not exist; make it first")),
        Err(_) => Ok(Target::File(path.to_path_buf())),
    }
}

/// A character device, or whatever this process has open already. To open a pipe of another kind can wait for ever.
fn is_stream(path: &Path, kind: fs::FileType) -> bool {
    #[cfg(unix)]
    if std::os::unix::fs::FileTypeExt::is_char_device(&kind) {
        return true;
    }
    let is_own = ["/dev/stdout", "/dev/stderr"].map(Path::new).contains(&path) || path.starts_with("/dev/fd");
    is_own && !kind.is_file()
}

fn exists(path: &Path) -> Error {
    let reason = "exists; give another name, or --force to overwrite it".to_string();
    Error::Image { file: path.display().to_string(), reason }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".retouch-");
    #[cfg(unix)]
    {
        // Not the owner-only rights of temporary files: those that any new file gets, less the umask.
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o666));
    }
    builder.tempfile_in(folder_of(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::read_image;

    fn picture() -> RgbImage {
        RgbImage::from_fn(48, 32, |x, y| image::Rgb([x as u8 * 5, y as u8 * 7, 200]))
    }

    #[test]
    fn lossless_formats_keep_every_pixel() -> Result<()> {
        for format in [OutputFormat::Png, OutputFormat::Webp] {
            let bytes = encode(&picture(), format, None, None)?;
            assert_eq!(read_image(&bytes, "test")?, picture(), "{format:?}");
        }
        Ok(())
    }

    #[test]
    fn jpeg_is_close_and_its_quality_counts() -> Result<()> {
        let fine = encode(&picture(), OutputFormat::Jpeg, None, None)?;
        let coarse = encode(&picture(), OutputFormat::Jpeg, Some(20), None)?;
        assert!(coarse.len() < fine.len());
        let found = read_image(&fine, "test")?;
        assert!(found.iter().zip(picture().iter()).all(|(a, b)| a.abs_diff(*b) < 12));
        Ok(())
    }

    #[test]
    fn a_quality_without_use_is_refused() {
        let refused = |format, quality| encode(&picture(), format, Some(quality), None).is_err();
        assert!(refused(OutputFormat::Png, 90) && refused(OutputFormat::Webp, 90));
        assert!(refused(OutputFormat::Jpeg, 0) && refused(OutputFormat::Jpeg, 101));
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn files_are_whole_and_only_overwritten_when_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out.png");
        check_writable(&path, false).unwrap();
        assert!(names(folder.path()).is_empty());
        write_atomically(&path, b"one", false).unwrap();
        let refused = write_atomically(&path, b"two", false).unwrap_err().to_string();
        assert!(refused.contains("out.png") && refused.contains("--force"), "{refused}");
        assert!(check_writable(&path, false).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write_atomically(&path, b"two", true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(folder.path()), ["out.png"]);
    }

    #[test]
    fn impossible_places_are_found_out_beforehand() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("no/such/out.png");
        for path in [folder.path(), missing.as_path(), Path::new("..")] {
            assert!(check_writable(path, true).is_err(), "{}", path.display());
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_devices_stay_and_rights_are_those_of_new_files() {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt};
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("file.png"), folder.path().join("link.png"));
        fs::write(&file, b"old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        write_atomically(&link, b"new", true).unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"new");
        assert!(link.is_symlink());
        let dangling = folder.path().join("dangling.png");
        std::os::unix::fs::symlink(folder.path().join("nowhere"), &dangling).unwrap();
        for overwrite in [false, true] {
            let refused = check_writable(&dangling, overwrite).unwrap_err().to_string();
            assert!(refused.contains("dangling.png") && refused.contains("link"), "{refused}");
            assert!(write_atomically(&dangling, b"new", overwrite).is_err());
        }
        assert!(dangling.is_symlink() && !dangling.exists());
        let null = Path::new("/dev/null");
        write_atomically(null, b"gone", true).unwrap();
        assert!(fs::metadata(null).unwrap().file_type().is_char_device());
        let plain = folder.path().join("plain");
        fs::write(&plain, b"").unwrap();
        let rights = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(rights(&file), rights(&plain));
    }
}
