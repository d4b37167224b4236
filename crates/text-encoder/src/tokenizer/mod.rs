//! From a prompt to token ids, equal to those of Hugging Face's tokenizers.

mod clip;
mod spiece;
mod t5;

use std::panic::{AssertUnwindSafe, catch_unwind};

use retouch_weights::{Folder, WeightsError, readable};
use tokenizers::Tokenizer;

pub use clip::ClipTokenizer;
pub use t5::T5Tokenizer;

/// Why a prompt cannot be turned into tokens.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("{folder}: no tokenizer found; expected {expected}")]
    Missing { folder: String, expected: &'static str },

    #[error("{file}: not a usable tokenizer: {}; download it again", readable(.reason))]
    Unusable { file: String, reason: String },

    #[error("{file}: the prompt cannot be tokenized: {}", readable(.reason))]
    Prompt { file: String, reason: String },

    /// A file of the tokenizer cannot be read.
    #[error(transparent)]
    File(#[from] WeightsError),
}

pub type Result<T> = std::result::Result<T, TokenizerError>;

/// A prompt as the text encoder takes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenIds {
    /// Exactly as many as were asked for.
    pub ids: Vec<u32>,
    /// Where the prompt was too long and its end is missing: how many tokens all of it has, end-of-text included.
    pub cut: Option<usize>,
}

/// A tokenizer with the ids that it needs to bring a text to a length.
struct FixedLength {
    tokenizer: Tokenizer,
    /// For messages.
    file: String,
    end: u32,
    pad: u32,
}

impl FixedLength {
    /// `file` names the tokenizer in messages; `end` and `pad` are tokens that it must know.
    fn new(mut tokenizer: Tokenizer, file: String, end: &str, pad: &str) -> Result<Self> {
        // A tokenizer.json may ask for a length of its own.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| unusable(&file, e))?;
        let id = |token: &str| {
            tokenizer.token_to_id(token).ok_or_else(|| unusable(&file, format!("it has no token `{token}`")))
        };
        Ok(Self { end: id(end)?, pad: id(pad)?, tokenizer, file })
    }

    fn from_json(folder: &Folder, end: &str, pad: &str) -> Result<Self> {
        let file = folder.open("tokenizer.json")?;
        let tokenizer = guarded(&file.name, "it is damaged", || Tokenizer::from_bytes(&*file.bytes))?;
        Self::new(tokenizer.map_err(|e| unusable(&file.name, e))?, file.name, end, pad)
    }

    /// Padded at the end, or cut so that the end-of-text token stays the last one.
    ///
    /// Source: `padding="max_length", truncation=True` of transformers' `PreTrainedTokenizerFast`.
    fn encode(&self, prompt: &str, max_length: usize) -> Result<TokenIds> {
        let encoding = guarded(&self.file, CONTRADICTION, || self.tokenizer.encode_fast(prompt, true))?
            .map_err(|e| TokenizerError::Prompt { file: self.file.clone(), reason: e.to_string() })?;
        let mut ids = encoding.get_ids().to_vec();
        let cut = (ids.len() > max_length).then_some(ids.len());
        ids.resize(max_length, self.pad);
        if let (Some(_), Some(last)) = (cut, ids.last_mut()) {
            *last = self.end;
        }
        Ok(TokenIds { ids, cut })
    }
}

/// What `f` makes by the tokenizers' crate. That panics for some errors in a file's JSON, and where tables point outside of
/// each other, which it checks neither when it reads them nor when it uses them: `reason` then says why.
fn guarded<T>(file: &str, reason: &str, f: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|_| unusable(file, reason))
}

const CONTRADICTION: &str = "its tables contradict each other";

fn unusable(file: &str, reason: impl std::fmt::Display) -> TokenizerError {
    TokenizerError::Unusable { file: file.to_string(), reason: reason.to_string() }
}
