//! The CLIP text encoder's parameters. The code uses the names of the published repositories, with `text_model.`
//! before each.

use super::{Naming, Recipe};

const CODE_PREFIX: &str = "text_model.";

/// A file that has `prefix` in place of `text_model.`: nothing (transformers 5), or something longer (files that hold
/// several text encoders).
pub struct Clip {
    pub prefix: String,
}

impl Naming for Clip {
    fn recipe(&self, name: &str) -> Recipe {
        let rest = name.strip_prefix(CODE_PREFIX).unwrap_or(name);
        Recipe::Same(format!("{}{rest}", self.prefix))
    }
}
