//! What is asked of the engine, and what it answers.

use std::{
    collections::BTreeMap,
    str::FromStr,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use image::RgbImage;
use serde::{Deserialize, Serialize};

use crate::{Error, Lora, MemoryPlan, Result, StoredLora};

/// One edit (or, without an image, one generation). Everything left `None` or at its default is the model's own choice.
#[derive(Debug, Clone, Default)]
pub struct EditRequest {
    /// What to do, in words.
    pub prompt: String,
    /// The picture to edit; without one the prompt alone makes a picture.
    pub image: Option<RgbImage>,
    /// What the result should not look like; acts only together with `true_cfg` above 1.
    pub negative_prompt: Option<String>,
    /// Scale of classifier-free guidance over the negative prompt; `None` is 1, off.
    pub true_cfg: Option<f64>,
    /// Denoise steps.
    pub steps: Option<usize>,
    /// The distilled guidance scale, for models that take it as an input.
    pub guidance: Option<f64>,
    /// Do not compute steps that would do nearly what the last did (see [`retouch_flow::StepCache`]): the difference below
    /// which that is so, 0.05 for a careful and 0.2 for a bold one. Faster, and another image; `None` computes all.
    pub cache: Option<f64>,
    pub size: OutputSize,
    pub reference_size: ReferenceSize,
    /// Tokens of the prompt that the T5 encoder sees; longer prompts are cut there.
    pub max_sequence_length: Option<usize>,
    pub seeds: Seeds,
    /// LoRAs that act together. Parts of the model that are kept in memory are read again for other ones.
    pub loras: Vec<Lora>,
    /// Use of a LoRA what fits the model, and leave out tensors that have no place in it; else such a LoRA is refused.
    pub lora_partial: bool,
}

/// The size of the result.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputSize {
    /// The size of the reference image as the model sees it; without an image the model's largest square.
    #[default]
    Auto,
    /// Exactly this; both must be multiples of 16.
    Exact { width: usize, height: usize },
    /// The model's size of this width over height.
    Aspect(f64),
    /// The rule of the reference implementation (diffusers): the given size (1024x1024 where `None`) gives the aspect,
    /// and its area is always about 1024x1024.
    Diffusers { width: Option<usize>, height: Option<usize> },
}

/// Width over height, as a text `W:H`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(try_from = "String")]
pub struct AspectRatio(pub f64);

impl FromStr for AspectRatio {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let side = |text: &str| text.parse().ok().filter(|side: &f64| side.is_finite() && *side > 0.0);
        match text.split_once(':').map(|(width, height)| (side(width), side(height))) {
            Some((Some(width), Some(height))) => Ok(Self(width / height)),
            _ => Err(format!("`{text}` is no aspect ratio; give it as W:H, e.g. 16:9")),
        }
    }
}

impl TryFrom<String> for AspectRatio {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// The size at which the model sees the source image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReferenceSize {
    /// The model's preferred size nearest in aspect; where it has none, the image's own, with no more pixels than an exact result.
    #[default]
    Auto,
    /// The image's own size, floored to multiples of 16.
    Keep,
    /// Exactly this; both must be multiples of 16.
    Exact { width: usize, height: usize },
}

/// Where the initial noise of each image comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Seeds {
    /// One image for each seed, each repeatable on its own.
    Each(Vec<u64>),
    /// One generator draws the noise of all `images` in a row, as the reference implementation does for a batch.
    Shared { seed: u64, images: usize },
}

impl Default for Seeds {
    fn default() -> Self {
        Self::Each(vec![0])
    }
}

impl Seeds {
    /// `images` seeds in a row, from `first`.
    pub fn counting_from(first: u64, images: usize) -> Self {
        Self::Each((0..images as u64).map(|i| first.wrapping_add(i)).collect())
    }

    pub fn images(&self) -> usize {
        match self {
            Self::Each(seeds) => seeds.len(),
            Self::Shared { images, .. } => *images,
        }
    }
}

/// A finished image with all that is needed to make it again.
#[derive(Debug, Clone)]
pub struct EditedImage {
    pub pixels: RgbImage,
    pub parameters: Parameters,
    /// Passes through the transformer that the step cache saved, of one a step, or two with true CFG.
    pub reused_passes: usize,
}

/// The parameters of one image, as stored inside the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parameters {
    pub prompt: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub negative_prompt: Option<String>,
    pub true_cfg: f64,
    pub seed: u64,
    /// For an image of a batch drawn from one generator: its place, and the size of the batch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<(usize, usize)>,
    /// The model: its hub id, or its path, which is absolute or in the home folder `~`; [`crate::ModelSource::of`] finds
    /// it again.
    pub model: String,
    /// Single files that stood in for parts of the model: such paths by the option that gave them (`--vae`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub single_files: BTreeMap<String, String>,
    pub steps: usize,
    /// Absent where the model takes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guidance: Option<f64>,
    /// The threshold of the step cache, where one was used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<f64>,
    pub max_sequence_length: usize,
    pub width: usize,
    pub height: usize,
    /// What was asked for, which for another source image gives another size.
    pub size: OutputSize,
    /// The size at which the model saw the source image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<(usize, usize)>,
    /// What was asked for, as with `size`.
    pub reference_size: ReferenceSize,
    /// SHA-256 over the source image's decoded RGB pixels, to find out whether a repeated edit starts from the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_sha256: Option<String>,
    /// The source image's file name (never its folder); the library leaves it to the caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source_name: Option<String>,
    pub dtype: String,
    /// The type that the large matrices were held in, where it was not their files'.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantize: Option<String>,
    pub device: String,
    /// `cpu` where the text encoders were put there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoders: Option<String>,
    /// The version of retouch.
    pub version: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<StoredLora>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lora_partial: bool,
}

/// Wall time per stage; loading of weights counts to the stage that needs them.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Timings {
    pub text_seconds: f64,
    pub reference_seconds: f64,
    pub load_seconds: f64,
    /// From the edit's beginning to the end of the first step: the stages before, and that step.
    pub first_step_seconds: f64,
    pub steps_seconds: f64,
    pub decode_seconds: f64,
}

/// All images of a request.
#[derive(Debug, Clone)]
pub struct EditResult {
    pub images: Vec<EditedImage>,
    pub timings: Timings,
}

/// What the engine is doing; see [`crate::Observer`].
pub enum Event<'a> {
    /// What will be in memory when; nothing is read yet.
    Planned { memory: &'a MemoryPlan },
    /// Weights of this size are about to be read for a stage.
    Loading { stage: Stage, bytes: usize },
    /// The weights of a stage are there and its computation begins: for each prompt, for each image.
    Computing { stage: Stage },
    /// The prompt had more tokens than the encoder takes; the rest was cut off.
    PromptCut { tokens: usize, kept: usize },
    /// A denoise step is done.
    Step {
        /// Which image of the request, from 0.
        image: usize,
        /// The step just done, from 0, of `steps`.
        step: usize,
        steps: usize,
        /// The noise level that the latents are now at.
        sigma: f32,
        took: Duration,
        /// The latents after the step, `[1, channels, height / 8, width / 8]`, computed when called.
        latents: &'a dyn Fn() -> Result<candle_core::Tensor>,
        /// What the result is about to look like, a pixel for each of the latents, computed when called; none unless
        /// [`crate::EngineOptions::previews`] is set, and before anything has passed through the VAE.
        preview: &'a dyn Fn() -> Result<Option<RgbImage>>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    TextEncoders,
    VaeEncoder,
    Transformer,
    VaeDecoder,
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Control {
    Continue,
    /// Stop at once; the call returns [`Error::Cancelled`].
    Cancel,
}

/// Follows an edit, and can stop it: `Cancel` from any event ends the edit before the next step.
pub trait Observer {
    fn on(&mut self, event: Event<'_>) -> Control;

    /// A flag that ends the edit once it is set; it is looked at while weights are read, when there are no events.
    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        None
    }
}

/// Watches nothing and never cancels.
pub struct Silent;

impl Observer for Silent {
    fn on(&mut self, _: Event<'_>) -> Control {
        Control::Continue
    }
}

impl<F: FnMut(Event<'_>) -> Control> Observer for F {
    fn on(&mut self, event: Event<'_>) -> Control {
        self(event)
    }
}

impl EditRequest {
    /// Checks what can be checked without a model.
    pub fn check(&self) -> Result<()> {
        let refuse = |reason: String| Err(Error::BadRequest(reason));
        if self.prompt.len() > MAX_PROMPT_BYTES {
            return refuse(format!(
                "the prompt has {} bytes; the longest that is taken is {MAX_PROMPT_BYTES}",
                self.prompt.len()
            ));
        }
        if let Some(negative) = &self.negative_prompt
            && negative.len() > MAX_PROMPT_BYTES
        {
            return refuse(format!(
                "the negative prompt has {} bytes; the longest that is taken is {MAX_PROMPT_BYTES}",
                negative.len()
            ));
        }
        if self.image.as_ref().is_some_and(|image| image.width() == 0 || image.height() == 0) {
            return refuse("the image has no pixels".into());
        }
        if let Some(steps) = self.steps
            && !(1..=MAX_STEPS).contains(&steps)
        {
            return refuse(format!("steps is {steps}; give 1 to {MAX_STEPS}"));
        }
        if let Some(guidance) = self.guidance
            && !(guidance.is_finite() && (0.0..=100.0).contains(&guidance))
        {
            return refuse(format!("guidance is {guidance}; give a number from 0 to 100"));
        }
        if let Some(threshold) = self.cache
            && !(threshold.is_finite() && threshold > 0.0 && threshold <= 1.0)
        {
            return refuse(format!("cache is {threshold}; give a number above 0 and at most 1, e.g. 0.1"));
        }
        if let Some(scale) = self.true_cfg
            && !(scale.is_finite() && (1.0..=100.0).contains(&scale))
        {
            return refuse(format!("true-cfg is {scale}; give a number from 1 (off) to 100"));
        }
        if self.true_cfg.is_some_and(|scale| scale > 1.0) && self.negative_prompt.is_none() {
            return refuse("true-cfg needs a negative prompt; give one (it may be empty) or leave true-cfg out".into());
        }
        if self.negative_prompt.is_some() && self.true_cfg.is_none_or(|scale| scale <= 1.0) {
            return refuse(
                "a negative prompt acts only with a true-cfg above 1, e.g. 2.0; give both or neither".into(),
            );
        }
        let usable = |lora: &&Lora| (-MAX_LORA_SCALE..=MAX_LORA_SCALE).contains(&lora.scale);
        if let Some(Lora { file, scale }) = self.loras.iter().find(|lora| !usable(lora)) {
            let file = file.display();
            return refuse(format!("the scale of {file} is {scale}; give a number from -100 to 100, mostly 0 to 1"));
        }
        match self.seeds.images() {
            0 => return refuse("no image was asked for; give at least one seed".into()),
            n if n > MAX_IMAGES => return refuse(format!("{n} images in one request; give at most {MAX_IMAGES}")),
            _ => {}
        }
        Ok(())
    }
}

/// A prompt is tokenised before it is cut to the encoder's length: this bounds the work.
pub const MAX_PROMPT_BYTES: usize = 64 * 1024;
pub const MAX_STEPS: usize = 1000;
const MAX_LORA_SCALE: f64 = 100.0;
pub const MAX_IMAGES: usize = 1000;
