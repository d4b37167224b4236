use std::path::PathBuf;

/// What can be wrong with a model's files. Every message names the file, what is wrong and what to do.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },

    #[error("{file}: not a usable {format} file: {reason}; download it again")]
    BadFile { file: String, format: &'static str, reason: String },

    #[error("{file}: not valid JSON for this purpose: {reason}")]
    BadJson { file: String, reason: String },

    #[error("{file}: the index names the shard `{shard}`, which is absent; download it again")]
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

    #[error("{what}: {reason}")]
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
