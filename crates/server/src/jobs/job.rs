//! What a job is: what was asked for, and what came of it.

use image::RgbImage;
use rand::Rng;
use retouch::{AspectRatio, EditRequest, OutputSize, Seeds, image::OutputFormat};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    Queued,
    Running,
    Done,
    Failed,
    Cancelled,
}

impl Status {
    pub fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        [Self::Queued, Self::Running, Self::Done, Self::Failed, Self::Cancelled].into_iter().find(|s| s.name() == name)
    }

    /// Nothing changes any more.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// What can be asked of a job; all but the prompt can be left out, and is then the model's choice.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default, deny_unknown_fields)]
pub struct NewJob {
    /// What to do, in words.
    #[schema(required, min_length = 1)]
    pub prompt: String,
    /// The image to edit, as base64 or a data URL; without one the prompt alone makes a picture. A form has it as a field of
    /// its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_image: Option<String>,
    /// Seed of the first image; those of further ones count up from it. A random one if left out.
    pub seed: Option<u64>,
    /// How many images to make.
    #[schema(minimum = 1)]
    pub num_images: Option<usize>,
    /// Denoise steps.
    #[schema(minimum = 1, maximum = 1000)]
    pub steps: Option<usize>,
    /// How closely to follow the prompt, for models that take it.
    #[schema(minimum = 0, maximum = 100)]
    pub guidance: Option<f64>,
    /// Width of the result in pixels, a multiple of 16; goes together with the height.
    #[schema(minimum = 16)]
    pub width: Option<usize>,
    #[schema(minimum = 16)]
    pub height: Option<usize>,
    /// Shape of the result, e.g. `16:9`; the model chooses the size.
    #[schema(example = "16:9")]
    pub aspect_ratio: Option<String>,
    /// What the result should not look like; needs `true_cfg`.
    pub negative_prompt: Option<String>,
    /// Strength of the negative prompt, above 1.
    #[schema(minimum = 1, maximum = 100)]
    pub true_cfg: Option<f64>,
    /// Threshold of the step cache: faster, and another image.
    #[schema(exclusive_minimum = 0, maximum = 1)]
    pub cache: Option<f64>,
    #[schema(value_type = Option<ImageFormat>)]
    pub output_format: Option<OutputFormat>,
    /// Of a JPEG, 1 to 100.
    #[schema(minimum = 1, maximum = 100)]
    pub quality: Option<u8>,
}

/// The formats of results, for the description of the API.
#[derive(ToSchema)]
#[schema(rename_all = "lowercase")]
#[expect(dead_code, reason = "stands for retouch::image::OutputFormat, which knows nothing of schemas")]
pub enum ImageFormat {
    Png,
    Jpeg,
    Webp,
}

/// What was asked for, with the choices made that must stay the same if the job runs again: its seeds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobRequest {
    pub prompt: String,
    /// One image each.
    pub seeds: Vec<u64>,
    pub steps: Option<usize>,
    pub guidance: Option<f64>,
    pub width: Option<usize>,
    pub height: Option<usize>,
    pub aspect_ratio: Option<String>,
    pub negative_prompt: Option<String>,
    pub true_cfg: Option<f64>,
    pub cache: Option<f64>,
    #[schema(value_type = ImageFormat)]
    pub output_format: OutputFormat,
    pub quality: Option<u8>,
}

impl NewJob {
    /// Draws the seeds, `max_images` at most.
    ///
    /// # Errors
    /// A sentence about what cannot be.
    pub fn resolve(self, max_images: usize) -> Result<JobRequest, String> {
        let images = self.num_images.unwrap_or(1);
        if !(1..=max_images).contains(&images) {
            return Err(format!("num_images is {images}; give 1 to {max_images}"));
        }
        if self.prompt.trim().is_empty() {
            return Err("the prompt is empty; say what to do, e.g. \"make the circle blue\"".into());
        }
        // A short number, to be typed again.
        let first = self.seed.unwrap_or_else(|| u64::from(rand::rng().random::<u32>()));
        let output_format = self.output_format.unwrap_or_default();
        output_format.check_quality(self.quality).map_err(|e| e.to_string())?;
        Ok(JobRequest {
            prompt: self.prompt,
            seeds: (0..images as u64).map(|i| first.wrapping_add(i)).collect(),
            steps: self.steps,
            guidance: self.guidance,
            width: self.width,
            height: self.height,
            aspect_ratio: self.aspect_ratio,
            negative_prompt: self.negative_prompt,
            true_cfg: self.true_cfg,
            cache: self.cache,
            output_format,
            quality: self.quality,
        })
    }
}

impl JobRequest {
    /// As the engine takes it, for the images of these seeds.
    ///
    /// # Errors
    /// A sentence about what cannot be.
    pub fn edit(&self, image: Option<RgbImage>, seeds: &[u64]) -> Result<EditRequest, String> {
        let size = match (self.width, self.height, &self.aspect_ratio) {
            (None, None, None) => OutputSize::Auto,
            (None, None, Some(ratio)) => OutputSize::Aspect(ratio.parse::<AspectRatio>()?.0),
            (Some(width), Some(height), None) => OutputSize::Exact { width, height },
            (_, _, Some(_)) => return Err("an aspect_ratio excludes width and height; give one of them".into()),
            _ => return Err("width and height go together; give both or neither".into()),
        };
        let request = EditRequest {
            prompt: self.prompt.clone(),
            image,
            negative_prompt: self.negative_prompt.clone(),
            true_cfg: self.true_cfg,
            steps: self.steps,
            guidance: self.guidance,
            cache: self.cache,
            size,
            seeds: Seeds::Each(seeds.to_vec()),
            ..Default::default()
        };
        request.check().map_err(|e| e.to_string())?;
        Ok(request)
    }

    /// The command line that makes the same images; `input` is the name of the source image's file.
    pub fn command(&self, model: &str, input: Option<&str>) -> String {
        let file = input.map(|name| if name.starts_with('-') { format!("./{name}") } else { name.to_string() });
        let command = if file.is_some() { "edit" } else { "generate" };
        let values: Vec<_> = file.iter().chain([&self.prompt]).map(|value| quoted(value)).collect();
        let mut options = Vec::new();
        let mut option = |name: &str, value: Option<String>| match value {
            // A value that looks like an option is one only with its name.
            Some(value) if value.starts_with('-') => options.push(format!("{name}={}", quoted(&value))),
            Some(value) => options.extend([name.to_string(), quoted(&value)]),
            None => {}
        };
        option("--model", (model != retouch::models::NANO_KONTEXT_ID).then(|| model.to_string()));
        let seeds: Vec<_> = self.seeds.iter().map(u64::to_string).collect();
        option("--seed", Some(seeds.join(",")));
        option("--steps", self.steps.map(|v| v.to_string()));
        option("--guidance", self.guidance.map(|v| v.to_string()));
        option("--width", self.width.map(|v| v.to_string()));
        option("--height", self.height.map(|v| v.to_string()));
        option("--aspect-ratio", self.aspect_ratio.clone());
        option("--negative-prompt", self.negative_prompt.clone());
        option("--true-cfg", self.true_cfg.map(|v| v.to_string()));
        option("--cache", self.cache.map(|v| v.to_string()));
        option("--quality", self.quality.map(|v| v.to_string()));
        let format = Some(self.output_format).filter(|format| *format != OutputFormat::default());
        option("--format", format.map(|format| format.name().to_string()));
        let words = if self.prompt.starts_with('-') {
            [options, vec!["--".into()], values].concat()
        } else {
            [values, options].concat()
        };
        format!("retouch {command} {}", words.join(" "))
    }
}

/// A word as a POSIX shell takes it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@".contains(c);
    if !word.is_empty() && !word.starts_with('-') && word.chars().all(plain) {
        return word.to_string();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new() -> NewJob {
        NewJob { prompt: "bluer".into(), ..Default::default() }
    }

    #[test]
    fn seeds_are_settled_once_and_count_up() {
        let asked = NewJob { seed: Some(u64::MAX), num_images: Some(2), ..new() };
        assert_eq!(asked.resolve(4).unwrap().seeds, [u64::MAX, 0]);
        assert!(new().resolve(4).unwrap().seeds[0] <= u64::from(u32::MAX));
    }

    #[test]
    fn what_cannot_be_is_said_in_a_sentence() {
        let refused = |new: NewJob| match new.resolve(4) {
            Ok(request) => request.edit(None, &[1]).err().unwrap_or_default(),
            Err(sentence) => sentence,
        };
        assert!(refused(NewJob { num_images: Some(5), ..new() }).contains("1 to 4"));
        assert!(refused(NewJob { num_images: Some(0), ..new() }).contains("1 to 4"));
        assert!(refused(NewJob { prompt: " ".into(), ..new() }).contains("empty"));
        assert!(refused(NewJob { width: Some(64), ..new() }).contains("go together"));
        assert!(refused(NewJob { aspect_ratio: Some("wide".into()), ..new() }).contains("16:9"));
        assert!(refused(NewJob { quality: Some(50), ..new() }).contains("quality"));
        assert!(refused(NewJob { steps: Some(0), ..new() }).contains("steps"));
    }

    #[test]
    fn commands_survive_a_shell() {
        let asked = NewJob { prompt: "it's $HOME `x`".into(), seed: Some(7), num_images: Some(2), ..new() };
        let command = asked.resolve(4).unwrap().command("nano-kontext", Some("a photo.png"));
        assert_eq!(command, r"retouch edit 'a photo.png' 'it'\''s $HOME `x`' --seed 7,8");
        let command = new().resolve(1).unwrap().command("owner/name", None);
        assert!(command.starts_with("retouch generate bluer --model owner/name --seed "), "{command}");
        let dashes = NewJob {
            prompt: "--help".into(),
            negative_prompt: Some("-x".into()),
            true_cfg: Some(2.0),
            seed: Some(7),
            ..new()
        };
        let command = dashes.resolve(1).unwrap().command("nano-kontext", Some("-o"));
        assert_eq!(command, "retouch edit --seed 7 --negative-prompt='-x' --true-cfg 2 -- ./-o '--help'");
    }
}
