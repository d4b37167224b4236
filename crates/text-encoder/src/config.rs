//! Checks shared by the encoders' configurations.

use retouch_weights::{Result, WeightsError};

/// The largest size that a configuration may ask for, far above any real model: products of a few of them do not
/// overflow.
const MAX_SIZE: usize = 1 << 20;

/// Refuses values that cannot be computed with; `file` names the configuration in the message.
pub fn check_sizes(file: &str, sizes: &[(&str, usize)]) -> Result<()> {
    match sizes.iter().find(|(_, size)| !(1..=MAX_SIZE).contains(size)) {
        None => Ok(()),
        Some((name, size)) => unsupported(file, format!("{name} is {size}; supported are 1 to {MAX_SIZE}")),
    }
}

pub fn unsupported<T>(file: &str, reason: String) -> Result<T> {
    Err(WeightsError::Unsupported { what: file.to_string(), reason })
}
