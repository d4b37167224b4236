//! From a prompt to embeddings: the tokenizers and the two text encoders of FLUX.1, CLIP-L and T5 v1.1.

mod clip;
mod config;
mod layers;
mod t5;
pub mod tokenizer;

pub use clip::{ClipConfig, ClipEncoder};
pub use t5::{T5Config, T5Encoder};
pub use tokenizer::{ClipTokenizer, T5Tokenizer, TokenIds, TokenizerError};
