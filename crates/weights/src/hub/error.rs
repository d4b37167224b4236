use std::path::PathBuf;

/// Why a model did not come from the hub. Each message says what to do.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("{0}: no such folder, and not a hub id of the form `owner/name` or `owner/name@revision`")]
    BadId(String),

    #[error(
        "{id} may be downloaded only by those who accepted its licence: accept it at {url} and log in \
         (`hf auth login`, or set HF_TOKEN to a token from {endpoint}/settings/tokens)"
    )]
    LicenceNotAccepted { id: String, url: String, endpoint: String },

    #[error(
        "your token has no access to {id}: accept its licence at {url} with the account that the token belongs to, \
         and check that the token may read gated models{detail}"
    )]
    NoAccess { id: String, url: String, detail: String },

    #[error("{endpoint} refuses your token; renew it with `hf auth login` or correct HF_TOKEN")]
    BadToken { endpoint: String },

    #[error("{endpoint} has no model {id} (or it is private and your token cannot see it); check the name")]
    NotFound { id: String, endpoint: String },

    #[error("{id} has no file {file}; it is not a complete model in diffusers' layout")]
    NoSuchFile { id: String, file: String },

    #[error(
        "{id} is not completely in {cache} ({missing} is missing) and HF_HUB_OFFLINE is set; \
         run once without HF_HUB_OFFLINE to download it"
    )]
    Offline { id: String, cache: PathBuf, missing: String },

    #[error("{endpoint} cannot be reached ({reason}), and {id} is not completely in {cache}; check the connection")]
    Unreachable { id: String, endpoint: String, cache: PathBuf, reason: String },

    #[error("{id}: the download of {file} stopped at {done} of {total} bytes ({reason}); run again to continue there")]
    Interrupted { id: String, file: String, done: u64, total: u64, reason: String },

    #[error("{id}: the download was cancelled; run again to continue")]
    Cancelled { id: String },

    #[error("{file}: {source}")]
    Io { file: String, source: std::io::Error },

    #[error("{id}: {endpoint} answered unexpectedly: {reason}")]
    Other { id: String, endpoint: String, reason: String },
}
