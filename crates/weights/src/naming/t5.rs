//! The T5 encoder's parameters. The code uses transformers' names.

use super::{Naming, Recipe};

/// A file that holds the encoder behind `prefix`, and the token embedding under one or both of T5's two names for it.
pub struct T5 {
    pub prefix: String,
    /// The embedding's name in the file, after the prefix.
    pub embedding: &'static str,
}

/// The names of the token embedding: the encoder's own one is tied to the shared one, and files keep either or both.
pub const EMBEDDINGS: [&str; 2] = ["shared.weight", "encoder.embed_tokens.weight"];

impl Naming for T5 {
    fn recipe(&self, name: &str) -> Recipe {
        let name = if EMBEDDINGS.contains(&name) { self.embedding } else { name };
        Recipe::Same(format!("{}{name}", self.prefix))
    }
}
