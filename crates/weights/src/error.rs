use std::path::PathBuf;

/// The longest piece of a sentence that a file has a say in, in characters.
const MOST: usize = 600;

/// A reason that may quote a file, as a part of a sentence: whatever it quotes, it is one line and not endless.
pub fn readable(reason: &str) -> String {
    reason.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).take(MOST).collect()
}

/// What can be wrong with a model's files. Every message names the file, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },

    #[error("{file}: not a usable {format} file: {}; download it again", readable(.reason))]
    BadFile { file: String, format: &'static str, reason: String },

    #[error("{file}: not valid JSON for this purpose: {}", readable(.reason))]
    BadJson { file: String, reason: String },

    #[error("{file}: the index names the shard `{}`, which is absent; download it again", readable(.shard))]
    MissingShard { file: String, shard: String },

    #[error("{files}: tensor `{tensor}` is missing; is this file complete, and of the right model?")]
    MissingTensor { files: String, tensor: String },

    #[error("{file}: tensor `{tensor}` has shape {found:?}, expected {expected:?}; is this file of the right model?")]
    WrongShape { file: String, tensor: String, expected: Vec<usize>, found: Vec<usize> },

    #[error(
        "{file}: tensor `{tensor}` has shape {found:?}, expected {expected} axes; is this file of the right model?"
    )]
    WrongRank { file: String, tensor: String, expected: usize, found: Vec<usize> },

    #[error("{file} holds {found}, not a {wanted}; {advice}")]
    WrongKind { file: String, found: String, wanted: String, advice: String },

    #[error(
        "{file}: tensor `{tensor}` is in {encoding}, which is not supported; take a file in bf16, f16, fp8, or one of \
         GGUF's Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0, Q3_K and Q2_K"
    )]
    WrongEncoding { file: String, tensor: String, encoding: String },

    #[error("{what}: no weights found; expected {expected}")]
    NoWeights { what: String, expected: String },

    #[error("{what}: {}", readable(.reason))]
    Unsupported { what: String, reason: String },

    #[error("{0}: no such file or folder, and not a hub id of the form `owner/name`")]
    NoSuchModel(PathBuf),

    #[error("cancelled")]
    Cancelled,

    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),

    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
}

pub type Result<T> = std::result::Result<T, WeightsError>;

/// For what only tells of candle's errors, such as the layers of a model: those come back as they were.
impl From<WeightsError> for candle_core::Error {
    fn from(error: WeightsError) -> Self {
        match error {
            WeightsError::Tensor(error) => error,
            other => Self::wrap(other),
        }
    }
}
