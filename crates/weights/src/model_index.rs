//! Which pipeline a model folder is for.

use serde::Deserialize;

use crate::{Folder, Result, WeightsError};

/// The file that makes a folder a model folder.
pub const MODEL_INDEX: &str = "model_index.json";

/// The pipelines whose folders are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pipeline {
    /// FLUX.1 Kontext: edits images.
    FluxKontext,
    /// FLUX.1: makes images from words alone.
    Flux,
}

#[derive(Deserialize)]
struct ModelIndex {
    #[serde(rename = "_class_name")]
    class: String,
}

impl Pipeline {
    /// Its class in diffusers.
    pub fn class(self) -> &'static str {
        match self {
            Self::FluxKontext => "FluxKontextPipeline",
            Self::Flux => "FluxPipeline",
        }
    }

    /// Reads the class out of `model_index.json`.
    ///
    /// # Errors
    /// When there is no such file, or when it names a pipeline of another architecture.
    pub fn of(model: &Folder) -> Result<Self> {
        if !model.has(MODEL_INDEX) {
            return Err(WeightsError::Unsupported {
                what: model.to_string(),
                reason: format!(
                    "there is no {MODEL_INDEX} here; give a model folder as diffusers saves it, or single files with \
                     --transformer, --vae, --clip and --t5"
                ),
            });
        }
        let index: ModelIndex = model.json(MODEL_INDEX)?;
        let known = [Self::FluxKontext, Self::Flux].into_iter().find(|pipeline| pipeline.class() == index.class);
        known.ok_or_else(|| WeightsError::Unsupported {
            what: model.name_of(MODEL_INDEX),
            reason: format!(
                "this model is a {}, which is not supported; {} and {} are",
                index.class,
                Self::FluxKontext.class(),
                Self::Flux.class()
            ),
        })
    }
}
