//! The options of a request, from the three places that give them: flags, the lines of a batch, stored parameters.

use std::{fmt::Display, str::FromStr};

use clap::{Args, ValueHint};
use retouch::{AspectRatio, EditRequest, OutputSize, Parameters, ReferenceSize, Seeds};
use serde::{Deserialize, Deserializer};

use crate::{
    failure::{Failure, Result},
    lora::LoraArg,
};

/// What can be asked beside image and prompt; everything left out is the model's choice.
#[derive(Debug, Clone, Default, Args, Deserialize)]
#[command(next_help_heading = "Request")]
#[serde(default, deny_unknown_fields)]
pub struct SettingsArgs {
    /// Seed of the initial noise; several (repeated or after commas) make one image each [default: random]
    #[arg(long, value_name = "N", value_delimiter = ',', allow_negative_numbers = true)]
    #[serde(deserialize_with = "one_or_several")]
    pub seed: Vec<u64>,
    /// Make this many images, with seeds counting up from the first
    #[arg(short, long, value_name = "N", allow_negative_numbers = true)]
    pub num_images: Option<usize>,
    /// Denoise steps: more take longer and show finer detail [default: the model's, 28 for FLUX.1 Kontext]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub steps: Option<usize>,
    /// How closely to follow the prompt [default: the model's, 2.5 for FLUX.1 Kontext]
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub guidance: Option<f64>,
    /// Do not compute steps that differ from the last by less than this share, e.g. 0.1: faster, and another image
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub cache: Option<f64>,
    /// What the result should not look like; needs --true-cfg
    #[arg(long, value_name = "TEXT")]
    pub negative_prompt: Option<String>,
    /// Strength of the negative prompt, above 1; doubles the time
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    pub true_cfg: Option<f64>,
    /// Width of the result in pixels, a multiple of 16 [default: the reference's, see --reference-size]
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub width: Option<usize>,
    /// Height of the result
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    pub height: Option<usize>,
    /// Shape of the result, e.g. 16:9; the model chooses the size
    #[arg(long, value_name = "W:H")]
    pub aspect_ratio: Option<AspectRatio>,
    /// `diffusers`: the size that the reference implementation would make, always about one megapixel
    #[arg(long, value_name = "RULE")]
    pub size: Option<SizeRule>,
    /// Size at which the model sees the image: auto (its preferred size of that shape), keep (the image's own, floored to
    /// multiples of 16) or WxH [default: auto]
    #[arg(long, value_name = "SIZE")]
    pub reference_size: Option<ReferenceRule>,
    /// A LoRA for this edit, e.g. `style.safetensors:0.8`, with the scale 1 where none is given; repeatable
    #[arg(long, value_name = "FILE[:SCALE]", value_hint = ValueHint::FilePath)]
    #[serde(deserialize_with = "crate::lora::deserialize")]
    pub lora: Option<Vec<LoraArg>>,
    /// Use what fits of a LoRA whose tensors do not all have a place in the model, instead of refusing it
    #[arg(long)]
    pub lora_partial: bool,
    /// Only stored parameters set it.
    #[arg(skip)]
    #[serde(skip)]
    pub max_sequence_length: Option<usize>,
}

impl SettingsArgs {
    /// These, and `fallback`'s for what is left out. Options that belong together come from one place together.
    pub fn or(self, fallback: &Self) -> Self {
        let fallback = fallback.clone();
        let sized = self.width.is_some() || self.height.is_some() || self.aspect_ratio.is_some() || self.size.is_some();
        let size_from = if sized { &self } else { &fallback };
        let (width, height) = (size_from.width, size_from.height);
        let (aspect_ratio, size) = (size_from.aspect_ratio, size_from.size);
        Self {
            // A list of seeds says how many images there are.
            num_images: self.num_images.or(fallback.num_images.filter(|_| self.seed.len() < 2)),
            seed: if self.seed.is_empty() { fallback.seed } else { self.seed },
            steps: self.steps.or(fallback.steps),
            guidance: self.guidance.or(fallback.guidance),
            cache: self.cache.or(fallback.cache),
            // Switching true CFG off takes its negative prompt along.
            negative_prompt: match self.true_cfg {
                Some(scale) if scale <= 1.0 => self.negative_prompt,
                _ => self.negative_prompt.or(fallback.negative_prompt),
            },
            true_cfg: self.true_cfg.or(fallback.true_cfg),
            width,
            height,
            aspect_ratio,
            size,
            reference_size: self.reference_size.or(fallback.reference_size),
            lora: self.lora.or(fallback.lora),
            lora_partial: self.lora_partial || fallback.lora_partial,
            max_sequence_length: self.max_sequence_length.or(fallback.max_sequence_length),
        }
    }

    /// The request without its image, checked as far as that goes without a model.
    pub fn request(&self, prompt: String) -> Result<EditRequest> {
        let request = EditRequest {
            prompt,
            image: None,
            negative_prompt: self.negative_prompt.clone(),
            true_cfg: self.true_cfg,
            steps: self.steps,
            guidance: self.guidance,
            cache: self.cache,
            size: self.output_size()?,
            reference_size: self.reference_size.map(|rule| rule.0).unwrap_or_default(),
            max_sequence_length: self.max_sequence_length,
            seeds: self.seeds()?,
            loras: self.lora.iter().flatten().map(|LoraArg(lora)| lora.clone()).collect(),
            lora_partial: self.lora_partial,
        };
        request.check()?;
        Ok(request)
    }

    fn output_size(&self) -> Result<OutputSize> {
        let Self { width, height, aspect_ratio, size, .. } = *self;
        match (width, height, aspect_ratio, size) {
            (None, None, None, None) => Ok(OutputSize::Auto),
            (None, None, Some(AspectRatio(ratio)), None) => Ok(OutputSize::Aspect(ratio)),
            (width, height, None, Some(SizeRule::Diffusers)) if width.is_some() == height.is_some() => {
                Ok(OutputSize::Diffusers { width, height })
            }
            (Some(width), Some(height), None, None) => Ok(OutputSize::Exact { width, height }),
            (_, _, Some(_), _) => Failure::usage("an aspect ratio excludes width, height and size; give one of them"),
            _ => Failure::usage("width and height go together; give both or neither"),
        }
    }

    fn seeds(&self) -> Result<Seeds> {
        match (self.seed.as_slice(), self.num_images) {
            (_, Some(0)) => Failure::usage("num-images is 0; give at least 1"),
            (_, Some(n)) if n > retouch::MAX_IMAGES => {
                Failure::usage(format!("num-images is {n}; give at most {}", retouch::MAX_IMAGES))
            }
            // A short number, to be typed again.
            ([], n) => Ok(Seeds::counting_from(u64::from(rand::random::<u32>()), n.unwrap_or(1))),
            (&[seed], Some(n)) => Ok(Seeds::counting_from(seed, n)),
            (several, Some(n)) if several.len() != n => Failure::usage(format!(
                "{} seeds for {n} images; give one seed to count from, or one for each",
                several.len()
            )),
            (several, _) => Ok(Seeds::Each(several.to_vec())),
        }
    }
}

/// What made an image, to make it again. Sizes are those that were asked for: one that came from the image edited comes
/// from the image now edited.
impl From<&Parameters> for SettingsArgs {
    fn from(stored: &Parameters) -> Self {
        let (width, height, aspect_ratio, size) = match stored.size {
            OutputSize::Auto => (None, None, None, None),
            OutputSize::Exact { width, height } => (Some(width), Some(height), None, None),
            OutputSize::Aspect(ratio) => (None, None, Some(AspectRatio(ratio)), None),
            OutputSize::Diffusers { width, height } => (width, height, None, Some(SizeRule::Diffusers)),
        };
        Self {
            seed: vec![stored.seed],
            num_images: None,
            steps: Some(stored.steps),
            guidance: stored.guidance,
            cache: stored.cache,
            negative_prompt: stored.negative_prompt.clone(),
            true_cfg: Some(stored.true_cfg),
            width,
            height,
            aspect_ratio,
            size,
            reference_size: Some(ReferenceRule(stored.reference_size)),
            max_sequence_length: Some(stored.max_sequence_length),
            lora: (!stored.loras.is_empty()).then(|| stored.loras.iter().map(|lora| LoraArg(lora.into())).collect()),
            lora_partial: stored.lora_partial,
        }
    }
}

/// A rule for the size of the result beside the usual one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SizeRule {
    Diffusers,
}

impl FromStr for SizeRule {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "diffusers" => Ok(Self::Diffusers),
            _ => Err("the only rule is `diffusers`; for a size of your own give --width and --height".to_string()),
        }
    }
}

/// [`ReferenceSize`] as text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReferenceRule(pub ReferenceSize);

impl FromStr for ReferenceRule {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "auto" => Ok(Self(ReferenceSize::Auto)),
            "keep" => Ok(Self(ReferenceSize::Keep)),
            _ => {
                let size = text.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
                let (width, height) = size.ok_or("give auto, keep or WxH, e.g. 1024x768")?;
                Ok(Self(ReferenceSize::Exact { width, height }))
            }
        }
    }
}

/// In JSON these are the texts that the flags take.
macro_rules! deserialize_from_text {
    ($($type:ty),*) => {$(
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
                from_text(&String::deserialize(deserializer)?)
            }
        }
    )*};
}
deserialize_from_text!(SizeRule, ReferenceRule);

pub fn from_text<T: FromStr<Err: Display>, E: serde::de::Error>(text: &str) -> std::result::Result<T, E> {
    text.parse().map_err(|reason| E::custom(format!("`{text}`: {reason}")))
}

fn one_or_several<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Seeds {
        One(u64),
        Several(Vec<u64>),
    }
    match Seeds::deserialize(deserializer) {
        Ok(Seeds::One(seed)) => Ok(vec![seed]),
        Ok(Seeds::Several(seeds)) => Ok(seeds),
        Err(_) => Err(serde::de::Error::custom("seed is a number of 0 or above, or a list of them")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(json: &str) -> SettingsArgs {
        serde_json::from_str(json).unwrap()
    }

    fn request(json: &str) -> EditRequest {
        settings(json).request("bluer".to_string()).unwrap()
    }

    #[test]
    fn seeds_are_counted_listed_or_random() {
        assert_eq!(request(r#"{"seed": 7}"#).seeds, Seeds::Each(vec![7]));
        assert_eq!(request(r#"{"seed": [7, 3]}"#).seeds, Seeds::Each(vec![7, 3]));
        assert_eq!(request(r#"{"seed": 7, "num_images": 3}"#).seeds, Seeds::Each(vec![7, 8, 9]));
        assert_eq!(request(r#"{"num_images": 3}"#).seeds.images(), 3);
        let random: Vec<_> = (0..8).map(|_| request("{}").seeds).collect();
        assert!(random.iter().any(|seeds| *seeds != random[0]));
    }

    #[test]
    fn sizes_have_four_forms() {
        assert_eq!(request("{}").size, OutputSize::Auto);
        assert_eq!(request(r#"{"width": 64, "height": 32}"#).size, OutputSize::Exact { width: 64, height: 32 });
        assert_eq!(request(r#"{"aspect_ratio": "4:2"}"#).size, OutputSize::Aspect(2.0));
        assert_eq!(request(r#"{"size": "diffusers"}"#).size, OutputSize::Diffusers { width: None, height: None });
        let reference = request(r#"{"reference_size": "64x48"}"#).reference_size;
        assert_eq!(reference, ReferenceSize::Exact { width: 64, height: 48 });
    }

    #[test]
    fn requests_that_make_no_sense_are_usage_errors() {
        let long = format!(r#"{{"negative_prompt": "{}", "true_cfg": 2}}"#, "x".repeat(1 << 20));
        for json in [
            r#"{"steps": 0}"#,
            r#"{"guidance": -1}"#,
            r#"{"num_images": 0}"#,
            r#"{"num_images": 18446744073709551615}"#,
            r#"{"seed": [1, 2], "num_images": 3}"#,
            r#"{"width": 64}"#,
            r#"{"width": 64, "height": 64, "aspect_ratio": "1:1"}"#,
            r#"{"aspect_ratio": "1:1", "size": "diffusers"}"#,
            r#"{"height": 64, "size": "diffusers"}"#,
            r#"{"true_cfg": 2.0}"#,
            r#"{"negative_prompt": "red"}"#,
            &long,
        ] {
            assert!(matches!(settings(json).request(String::new()), Err(Failure::Usage(_))), "{json}");
        }
        let not_a_number = SettingsArgs { guidance: Some(f64::NAN), ..Default::default() };
        assert!(matches!(not_a_number.request(String::new()), Err(Failure::Usage(_))));
        assert!(matches!(SettingsArgs::default().request("x".repeat(1 << 20)), Err(Failure::Usage(_))));
    }

    #[test]
    fn upper_layers_win_and_sizes_stay_together() {
        let lower = settings(r#"{"seed": [1, 2], "steps": 4, "width": 64, "height": 32, "reference_size": "keep"}"#);
        let merged = settings(r#"{"steps": 8, "aspect_ratio": "1:1"}"#).or(&lower);
        assert_eq!((merged.steps, merged.width, merged.height), (Some(8), None, None));
        assert_eq!(merged.aspect_ratio, Some(AspectRatio(1.0)));
        assert_eq!(merged.seed, [1, 2]);
        assert_eq!(merged.reference_size, Some(ReferenceRule(ReferenceSize::Keep)));
        let counted = settings(r#"{"seed": 5}"#).or(&settings(r#"{"num_images": 2}"#));
        assert_eq!(counted.seeds().unwrap(), Seeds::Each(vec![5, 6]));
        let listed = settings(r#"{"seed": [5, 9]}"#).or(&settings(r#"{"num_images": 3}"#));
        assert_eq!(listed.seeds().unwrap(), Seeds::Each(vec![5, 9]));
        let clash = settings(r#"{"num_images": 3}"#).or(&settings(r#"{"seed": [1, 2]}"#));
        assert!(matches!(clash.seeds(), Err(Failure::Usage(_))));
    }

    #[test]
    fn texts_that_are_no_sizes_are_refused() {
        for text in ["16", "0:1", "a:b", "1:-1", "inf:1", "NaN:1"] {
            assert!(text.parse::<AspectRatio>().is_err(), "{text}");
        }
        for text in ["", "64", "x64", "64x", "-1x5", "64x64x64", "Keep"] {
            assert!(text.parse::<ReferenceRule>().is_err(), "{text}");
        }
        assert!(serde_json::from_str::<SettingsArgs>(r#"{"stepps": 4}"#).is_err());
    }
}
