//! The embedded default model and what is known of the others.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

/// The files of the embedded model: `(relative path, bytes)`, in the layout of a model folder, without the model card
/// and its picture. A static: of a constant, every crate that names it would get a copy.
pub static NANO_KONTEXT: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/nano_kontext.rs"));

/// The id of the embedded model.
pub const NANO_KONTEXT_ID: &str = "nano-kontext";

/// What is known of a model before it is downloaded; `registry.json` holds all of them.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownModel {
    /// The name to give to `--model`: a hub id, or that of the embedded model.
    pub id: String,
    /// What it is for, in a few words.
    pub about: String,
    pub license: String,
    pub license_url: String,
    pub commercial_use: bool,
    /// Whether its licence must be accepted on the hub before the download.
    pub gated: bool,
    /// Bytes to download, rounded to what its authors document; 0 for the embedded model.
    pub download_bytes: u64,
    /// The class that its `model_index.json` names.
    pub pipeline: String,
    pub defaults: ModelDefaults,
}

/// What a model does where a request leaves the choice to it; `retouch.json` in a model folder holds its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelDefaults {
    pub name: String,
    pub license: String,
    /// Denoise steps.
    pub steps: usize,
    /// The distilled guidance scale.
    pub guidance: f64,
    /// Tokens of the prompt that the T5 encoder sees.
    pub max_sequence_length: usize,
    pub sizes: Sizes,
}

impl ModelDefaults {
    /// Refuses what no edit can work with, in one sentence; sizes must be multiples of `multiple`.
    pub fn check(&self, multiple: usize) -> Result<(), String> {
        let fits = |&(width, height): &(usize, usize)| {
            [width, height].iter().all(|side| (1..=8192).contains(side) && side.is_multiple_of(multiple))
        };
        if !(1..=1000).contains(&self.steps) {
            return Err(format!("steps is {}; a model takes 1 to 1000", self.steps));
        }
        if !(self.guidance.is_finite() && self.guidance >= 0.0) {
            return Err(format!("guidance is {}; it is a number from 0", self.guidance));
        }
        match &self.sizes {
            Sizes::Preferred(sizes) if sizes.is_empty() || !sizes.iter().all(fits) => {
                Err(format!("its preferred sizes must be multiples of {multiple} up to 8192, and at least one"))
            }
            Sizes::KeepUpToArea(area) if *area < multiple * multiple => {
                Err(format!("keep_up_to_area is {area}; the smallest image has {} pixels", multiple * multiple))
            }
            _ => Ok(()),
        }
    }
}

/// The sizes that a model works at, `(width, height)` in pixels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sizes {
    /// An image is resized to the one of these nearest in aspect.
    Preferred(Vec<(usize, usize)>),
    /// An image keeps its size, and is scaled down to about this many pixels if it has more.
    KeepUpToArea(usize),
}

/// All known models, the embedded one first.
pub fn registry() -> &'static [KnownModel] {
    static REGISTRY: LazyLock<Vec<KnownModel>> = LazyLock::new(|| {
        // A part of the program, and read in its tests: it cannot be what a user or a file supplies.
        let mut models: Vec<KnownModel> =
            serde_json::from_str(include_str!("../registry.json")).expect("registry.json is valid");
        let own = NANO_KONTEXT.iter().find(|(name, _)| *name == "retouch.json");
        if let (Some((_, own)), Some(nano)) = (own, models.first_mut()) {
            nano.defaults = serde_json::from_slice(own).expect("the embedded retouch.json is valid");
        }
        models
    });
    &REGISTRY
}

/// The known model of that id; hub ids are matched without regard to case, as the hub does.
pub fn known(id: &str) -> Option<&'static KnownModel> {
    registry().iter().find(|model| model.id.eq_ignore_ascii_case(id))
}

/// The defaults of a model that brings none of its own: those of its id where it is known, else those of the known
/// model of the same pipeline that is not the embedded one, else FLUX.1 Kontext \[dev\]'s.
///
/// `id_or_class` is a hub id, or the class that `model_index.json` names.
pub fn defaults_for(id_or_class: &str) -> ModelDefaults {
    let of_pipeline = |class: &str| registry().iter().find(|m| m.pipeline == class && m.id != NANO_KONTEXT_ID);
    let model = known(id_or_class).or_else(|| of_pipeline(id_or_class)).or_else(|| of_pipeline("FluxKontextPipeline"));
    model.unwrap_or(&registry()[0]).defaults.clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registry_is_valid() {
        assert_eq!(registry()[0].id, NANO_KONTEXT_ID);
        for model in registry() {
            assert!(model.license_url.starts_with("https://"), "{}", model.id);
            assert_eq!(model.defaults.check(16), Ok(()), "{}", model.id);
        }
    }

    #[test]
    fn kontext_dev_has_the_references_seventeen_sizes() {
        let Sizes::Preferred(sizes) = defaults_for("FluxKontextPipeline").sizes else {
            panic!("kontext has preferred sizes");
        };
        assert_eq!(sizes.len(), 17);
        assert!(sizes.iter().all(|&(w, h)| w % 16 == 0 && h % 16 == 0 && sizes.contains(&(h, w))));
        assert!(sizes.is_sorted());
    }

    #[test]
    fn defaults_come_by_id_and_by_class() {
        assert_eq!(defaults_for("black-forest-labs/flux.1-kontext-DEV").name, "FLUX.1-Kontext-dev");
        assert_eq!(defaults_for("FluxPipeline").guidance, 3.5);
        assert_eq!(defaults_for("someone/else").name, "FLUX.1-Kontext-dev");
    }

    #[test]
    fn the_embedded_model_is_whole_and_says_its_own_defaults() {
        let file = |name: &str| NANO_KONTEXT.iter().find(|(path, _)| *path == name).map(|(_, bytes)| *bytes);
        for name in [
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/model.safetensors",
            "text_encoder_2/model.safetensors",
            "tokenizer/vocab.json",
            "tokenizer_2/tokenizer.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        ] {
            assert!(file(name).is_some_and(|bytes| !bytes.is_empty()), "{name}");
        }
        assert!(file("README.md").is_none());
        let own: ModelDefaults = serde_json::from_slice(file("retouch.json").unwrap()).unwrap();
        assert_eq!(own, known(NANO_KONTEXT_ID).unwrap().defaults);
        assert_eq!(own.name, NANO_KONTEXT_ID);
    }
}
