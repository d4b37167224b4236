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

    /// There is less memory than the edit needs at least.
    #[error("{0}")]
    Memory(String),

    #[error(transparent)]
    Weights(Box<WeightsError>),

    #[error("{0}")]
    Tokenizer(#[from] retouch_text_encoder::TokenizerError),

    #[error("computation failed: {0}")]
    Tensor(candle_core::Error),

    /// What was needed and what there is.
    #[error(
        "out of device memory: {0}; choose a lower --vram-limit or a smaller --width and --height, leave out --keep-loaded, \
         or end other programs that use the device"
    )]
    OutOfMemory(String),

    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },
}

impl From<WeightsError> for Error {
    fn from(error: WeightsError) -> Self {
        match error {
            WeightsError::Cancelled => Self::Cancelled,
            WeightsError::Tensor(error) => error.into(),
            other => Self::Weights(other.into()),
        }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        #[cfg(feature = "cuda")]
        if let Some(reason) = retouch_kernels::cuda::out_of_memory(&error) {
            return Self::OutOfMemory(reason);
        }
        Self::Tensor(error)
    }
}

pub type Result<T> = std::result::Result<T, Error>;
