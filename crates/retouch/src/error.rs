use retouch_weights::WeightsError;

/// Why an edit failed. Each message says what is wrong and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request itself cannot be served (the caller's mistake).
    #[error("{0}")]
    BadRequest(String),

    /// An image cannot be read or written.
    #[error("{file}: {reason}")]
    Image { file: String, reason: String },

    /// The edit was cancelled by its observer.
    #[error("cancelled")]
    Cancelled,

    /// The device cannot be used.
    #[error("device {device}: {reason}")]
    Device { device: String, reason: String },

    #[error(transparent)]
    Weights(WeightsError),

    #[error("{0}")]
    Tokenizer(#[from] retouch_text_encoder::TokenizerError),

    #[error("computation failed: {0}")]
    Tensor(#[from] candle_core::Error),

    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },
}

impl From<WeightsError> for Error {
    fn from(error: WeightsError) -> Self {
        match error {
            WeightsError::Cancelled => Self::Cancelled,
            other => Self::Weights(other),
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
