//! How a command ends when it does not succeed.

use retouch::Error;

/// Why a command ended, by the exit code that it ends with.
#[derive(Debug)]
pub enum Failure {
    /// The caller asked for something that cannot be.
    Usage(String),
    /// It could not be done.
    Failed(String),
    /// Ctrl-C or a request to terminate.
    Interrupted { signal: u8 },
    /// Failures that were reported when they happened.
    Reported,
}

pub type Result<T> = std::result::Result<T, Failure>;

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Failed(_) | Self::Reported => 1,
            Self::Usage(_) => 2,
            // As shells have it.
            Self::Interrupted { signal } => 128 + signal,
        }
    }

    /// What to tell the user, if it was not told yet.
    pub fn message(&self) -> Option<&str> {
        match self {
            Self::Usage(message) | Self::Failed(message) => Some(message),
            Self::Interrupted { .. } => Some("interrupted"),
            Self::Reported => None,
        }
    }

    /// Refuses with `message`.
    pub fn usage<T>(message: impl Into<String>) -> Result<T> {
        Err(Self::Usage(message.into()))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::BadRequest(reason) => Self::Usage(reason),
            other => Self::Failed(other.to_string()),
        }
    }
}
