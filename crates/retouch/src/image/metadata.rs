//! The parameters of an edit inside the image that it made.
//!
//! PNG keeps them as JSON in an `iTXt` chunk named `retouch`, beside `parameters` and `Software` for other programs to
//! show. JPEG and WebP keep the same JSON in EXIF's `UserComment`, beside `ImageDescription` (the prompt) and
//! `Software`. JSON that is too long for a JPEG's one EXIF segment goes into comment segments instead.
//!
//! The `png` crate writes and reads the text chunks, which the `image` crate does not give access to, and
//! `kamadak-exif` the fields inside an EXIF block; the `image` crate places that block in a file and finds it again.

use std::{fmt::Write, io::Cursor};

use exif::{Exif, Field, In, Tag, Value, experimental::Writer};
use image::{ImageDecoder, ImageFormat, ImageReader, Limits};
use retouch_weights::readable;

use super::{jpeg, webp};
use crate::{Error, Parameters, Result};

/// The keyword of the PNG chunk that holds the JSON.
pub const PNG_KEYWORD: &str = "retouch";
/// The first word of `Software`, by which our EXIF is known.
const PROGRAM: &str = "retouch";
/// The encoding of a `UserComment`, as EXIF 2.32 section 4.6.6 names it.
const ASCII_COMMENT: &[u8] = b"ASCII\0\0\0";
/// The longest caption in `ImageDescription`, in characters: photo programs show it beside the picture.
const MAX_CAPTION: usize = 1000;
/// Most bytes of stored parameters: two prompts of the longest kind, escaped.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// The longest JSON for a JPEG's EXIF, which is one segment that the other fields share.
pub const MAX_JPEG_EXIF_JSON: usize = jpeg::MAX_SEGMENT - 6 - 4 * MAX_CAPTION - 512;

/// The parameters that retouch stored in a PNG, JPEG or WebP file, or `None` if the image carries none of ours.
///
/// `name` stands for the file in messages. Errors: not an image file, and parameters that cannot be understood.
pub fn read_parameters(bytes: &[u8], name: &str) -> Result<Option<Parameters>> {
    let refuse = |reason: String| Error::Image { file: name.to_string(), reason };
    let json = match image::guess_format(bytes) {
        Ok(ImageFormat::Png) => png_text(bytes).map_err(|e| refuse(format!("cannot be read as PNG ({e})")))?,
        Ok(format @ (ImageFormat::Jpeg | ImageFormat::WebP)) => match jpeg_text(bytes, format) {
            Some(text) => Some(text),
            None => exif_text(bytes, format),
        },
        Ok(_) => None,
        Err(_) => return Err(refuse("is not an image".to_string())),
    };
    let parse = |json: String| {
        serde_json::from_str(&json).map_err(|e| {
            refuse(format!(
                "its stored parameters cannot be understood ({}); was it written by another version of retouch?",
                readable(&e.to_string())
            ))
        })
    };
    json.map(parse).transpose()
}

fn png_text(bytes: &[u8]) -> std::result::Result<Option<String>, png::DecodingError> {
    let reader = png::Decoder::new(Cursor::new(bytes)).read_info()?;
    let chunk = reader.info().utf8_text.iter().find(|chunk| chunk.keyword == PNG_KEYWORD);
    let Some(chunk) = chunk else { return Ok(None) };
    // Compressed text can unfold to a thousand times its size: a limit bounds what a file can make us allocate.
    let mut chunk = chunk.clone();
    chunk.decompress_text_with_limit(MAX_TEXT_BYTES)?;
    chunk.get_text().map(Some)
}

fn jpeg_text(bytes: &[u8], format: ImageFormat) -> Option<String> {
    let text = (format == ImageFormat::Jpeg).then(|| jpeg::text(bytes))??;
    String::from_utf8(text).ok()
}

/// The JSON in the EXIF of a file, if retouch wrote it. EXIF that is damaged or of others is not ours.
fn exif_text(bytes: &[u8], format: ImageFormat) -> Option<String> {
    if format == ImageFormat::WebP && !webp::is_whole(bytes) {
        return None;
    }
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
    reader.limits(Limits::default());
    let block = reader.into_decoder().ok()?.exif_metadata().ok()??;
    let exif = exif::Reader::new().read_raw(block).ok()?;
    if !ascii(&exif, Tag::Software)?.starts_with(PROGRAM) {
        return None;
    }
    match &exif.get_field(Tag::UserComment, In::PRIMARY)?.value {
        Value::Undefined(comment, _) => {
            Some(String::from_utf8_lossy(comment.strip_prefix(ASCII_COMMENT)?).into_owned())
        }
        _ => None,
    }
}

fn ascii(exif: &Exif, tag: Tag) -> Option<String> {
    match &exif.get_field(tag, In::PRIMARY)?.value {
        Value::Ascii(lines) => Some(String::from_utf8_lossy(lines.first()?).into_owned()),
        _ => None,
    }
}

/// The parameters as JSON.
pub fn json(parameters: &Parameters) -> Result<String> {
    serde_json::to_string(parameters).map_err(|e| Error::BadRequest(format!("the parameters cannot be stored: {e}")))
}

/// The name and version that `Software` states.
pub fn software(parameters: &Parameters) -> String {
    format!("{PROGRAM} {}", parameters.version)
}

/// The parameters in the plain lines that image browsers for generated pictures know: the prompt, then settings.
pub fn plain_text(parameters: &Parameters) -> String {
    let mut text = parameters.prompt.clone();
    if let Some(negative) = &parameters.negative_prompt {
        let _ = write!(text, "\nNegative prompt: {negative}");
    }
    let Parameters { steps, true_cfg, seed, width, height, model, .. } = parameters;
    let _ = write!(text, "\nSteps: {steps}, CFG scale: {true_cfg}, ");
    if let Some(guidance) = parameters.guidance {
        let _ = write!(text, "Distilled CFG Scale: {guidance}, ");
    }
    let _ = write!(text, "Seed: {seed}, Size: {width}x{height}, Model: {model}");
    text
}

/// An EXIF block (a TIFF structure without the `Exif\0\0` that JPEG puts before it), with the JSON if one is given.
pub fn exif_block(parameters: &Parameters, json: Option<&str>) -> Result<Vec<u8>> {
    let field = |tag, value| Field { tag, ifd_num: In::PRIMARY, value };
    let caption: String = parameters.prompt.chars().filter(|&c| c != '\0').take(MAX_CAPTION).collect();
    let mut fields = vec![
        // EXIF says ASCII; readers take UTF-8, which is what prompts are in.
        field(Tag::ImageDescription, Value::Ascii(vec![caption.into_bytes()])),
        field(Tag::Software, Value::Ascii(vec![software(parameters).into_bytes()])),
    ];
    if let Some(json) = json {
        let comment = [ASCII_COMMENT, escape(json).as_bytes()].concat();
        fields.push(field(Tag::UserComment, Value::Undefined(comment, 0)));
    }
    let mut writer = Writer::new();
    fields.iter().for_each(|field| writer.push_field(field));
    let mut block = Cursor::new(Vec::new());
    let written = writer.write(&mut block, false);
    written.map_err(|e| Error::BadRequest(format!("the parameters cannot be stored as EXIF: {e}")))?;
    Ok(block.into_inner())
}

/// JSON of the same meaning in ASCII alone.
pub fn escape(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use image::RgbImage;

    use super::*;
    use crate::{
        OutputSize, ReferenceSize, StoredLora,
        image::{OutputFormat, encode, read_image},
    };

    const FORMATS: [OutputFormat; 3] = [OutputFormat::Png, OutputFormat::Jpeg, OutputFormat::Webp];

    fn parameters(prompt: &str) -> Parameters {
        Parameters {
            prompt: prompt.to_string(),
            negative_prompt: Some("unscharf, \"verrauscht\"".to_string()),
            true_cfg: 1.5,
            seed: u64::MAX,
            batch: Some((1, 4)),
            model: "nano-kontext".to_string(),
            single_files: Default::default(),
            steps: 8,
            guidance: Some(2.5),
            cache: None,
            max_sequence_length: 512,
            width: 32,
            height: 16,
            size: OutputSize::Exact { width: 32, height: 16 },
            reference: Some((48, 32)),
            reference_size: ReferenceSize::Keep,
            source_sha256: Some("00ff".to_string()),
            source_name: Some("Urlaub 🏖.jpg".to_string()),
            dtype: "f32".to_string(),
            quantize: None,
            device: "cpu".to_string(),
            encoders: None,
            version: "0.1.0".to_string(),
            loras: vec![StoredLora {
                file: "~/loras/stil:ø.safetensors".to_string(),
                scale: -0.75,
                sha256: Some("ff00".to_string()),
            }],
            lora_partial: true,
        }
    }

    #[test]
    fn parameters_round_trip_in_every_format() -> Result<()> {
        let image = RgbImage::from_pixel(32, 16, image::Rgb([10, 200, 30]));
        let long = "make the 圆 blue 🔵, ".repeat(64 * 1024 / 24);
        let prompts =
            ["", "make the circle blue", "rends le cercle bleu ☕ 👩‍🚀", "two\nlines\t\"quoted\" \\ \0 end", &long];
        for (prompt, format) in prompts.iter().flat_map(|prompt| FORMATS.map(|format| (prompt, format))) {
            let parameters = parameters(prompt);
            let bytes = encode(&image, format, None, Some(&parameters))?;
            assert_eq!(
                read_parameters(&bytes, "test")?.as_ref(),
                Some(&parameters),
                "{format:?} {} bytes",
                prompt.len()
            );
            // The pixels do not suffer.
            assert_eq!(read_image(&bytes, "test")?, read_image(&encode(&image, format, None, None)?, "test")?);
        }
        Ok(())
    }

    #[test]
    fn images_of_others_have_no_parameters() -> Result<()> {
        let image = RgbImage::new(16, 16);
        for format in FORMATS {
            assert_eq!(read_parameters(&encode(&image, format, None, None)?, "test")?, None);
        }
        assert!(read_parameters(b"hello", "test").is_err());
        Ok(())
    }

    #[test]
    fn parameters_that_cannot_be_understood_are_refused() {
        let mut bytes = Vec::new();
        let mut encoder = png::Encoder::new(&mut bytes, 1, 1);
        encoder.set_color(png::ColorType::Rgb);
        encoder.add_itxt_chunk(PNG_KEYWORD.to_string(), "{\"prompt\": 7}".to_string()).unwrap();
        encoder.write_header().unwrap().write_image_data(&[0; 3]).unwrap();
        let refused = read_parameters(&bytes, "odd.png").unwrap_err().to_string();
        assert!(refused.starts_with("odd.png: "), "{refused}");
    }

    #[test]
    fn escaped_json_is_ascii_and_means_the_same() {
        let json = serde_json::to_string("å 圆 👩‍🚀").unwrap_or_default();
        assert!(escape(&json).is_ascii());
        assert_eq!(serde_json::from_str::<String>(&escape(&json)).ok().as_deref(), Some("å 圆 👩‍🚀"));
    }
}
