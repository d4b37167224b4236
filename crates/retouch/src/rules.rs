//! What a model takes, and what it makes of what a request leaves open: known without its weights.

use retouch_models::ModelDefaults;
use retouch_weights::Pipeline;

use crate::{
    EditRequest, Error, Result,
    sizes::{Size, SizeRules},
};

/// What the T5 encoder of FLUX.1 was trained with.
const MAX_T5_TOKENS: usize = 512;

/// The rules of an opened model, to check requests by while the engine is busy with others.
#[derive(Debug, Clone)]
pub struct ModelRules {
    /// As [`crate::Parameters::model`] names it.
    pub name: String,
    pub defaults: ModelDefaults,
    /// Whether a request can have a guidance scale.
    pub takes_guidance: bool,
    /// Widths and heights are multiples of this.
    pub size_multiple: usize,
    pub(crate) pipeline: Pipeline,
}

/// A request's settings with all choices made.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Width and height at which the model sees the source image, if there is one.
    pub reference: Option<Size>,
    /// Width and height of the result.
    pub output: Size,
    pub steps: usize,
    /// `None` where the model takes none.
    pub guidance: Option<f64>,
    pub true_cfg: f64,
    /// Tokens of the prompt that the T5 encoder sees.
    pub max_sequence_length: usize,
}

impl ModelRules {
    /// Whether the model edits images; else it makes them from words alone.
    pub fn edits(&self) -> bool {
        self.pipeline != Pipeline::Flux
    }

    /// Fills in the model's defaults and settles the sizes.
    ///
    /// # Errors
    /// [`Error::BadRequest`] with what this model cannot do.
    pub fn settle(&self, request: &EditRequest) -> Result<Settings> {
        request.check()?;
        if !self.edits() && request.image.is_some() {
            return Err(Error::BadRequest(format!(
                "{} makes images from words alone and cannot edit one; leave the image out, or use a Kontext model",
                self.name
            )));
        }
        let guidance = match request.guidance {
            Some(_) if !self.takes_guidance => {
                return Err(Error::BadRequest(format!(
                    "{} takes no guidance scale; leave the guidance out",
                    self.name
                )));
            }
            given => self.takes_guidance.then(|| given.unwrap_or(self.defaults.guidance)),
        };
        let rules = SizeRules { sizes: &self.defaults.sizes, multiple: self.size_multiple };
        let reference = match &request.image {
            Some(picture) => {
                let size = (picture.width() as usize, picture.height() as usize);
                Some(rules.reference(request.reference_size, size, request.size)?)
            }
            None => None,
        };
        let max_sequence_length = request.max_sequence_length.unwrap_or(self.defaults.max_sequence_length);
        if !(1..=MAX_T5_TOKENS).contains(&max_sequence_length) {
            return Err(Error::BadRequest(format!(
                "the longest prompt is {max_sequence_length} tokens; give 1 to {MAX_T5_TOKENS}"
            )));
        }
        Ok(Settings {
            reference,
            output: rules.output(request.size, reference)?,
            steps: request.steps.unwrap_or(self.defaults.steps),
            guidance,
            true_cfg: request.true_cfg.unwrap_or(1.0),
            max_sequence_length,
        })
    }
}
