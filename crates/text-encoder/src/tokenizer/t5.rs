use retouch_weights::Folder;

use super::{FixedLength, Result, TokenIds, TokenizerError, spiece};

const END: &str = "</s>";
const PAD: &str = "<pad>";

/// The tokenizer of T5: a unigram model over the text with `▁` for spaces.
pub struct T5Tokenizer(FixedLength);

impl T5Tokenizer {
    /// The tokenizer in a model's `tokenizer_2` folder: `tokenizer.json`, or else `spiece.model`.
    pub fn open(folder: &Folder) -> Result<Self> {
        if folder.has("tokenizer.json") {
            Ok(Self(FixedLength::from_json(folder, END, PAD)?))
        } else if folder.has("spiece.model") {
            let file = folder.open("spiece.model")?;
            Ok(Self(FixedLength::new(spiece::read(&file)?, file.name, END, PAD)?))
        } else {
            Err(TokenizerError::Missing { folder: folder.to_string(), expected: "tokenizer.json or spiece.model" })
        }
    }

    /// The ids of `prompt` and `</s>`, padded or cut to `max_length` (at most 512 for FLUX.1).
    pub fn encode(&self, prompt: &str, max_length: usize) -> Result<TokenIds> {
        self.0.encode(prompt, max_length)
    }
}
