//! Models by name from the Hugging Face hub, through the cache that other tools share.
//!
//! Built on the `hf-hub` crate for the hub's API and its transfers. What that crate (1.0) lacks is done here: downloads
//! that continue where they stopped, HF_HUB_OFFLINE, and the choice of the files that are needed.

mod cache;
mod error;
mod needed;
mod options;
mod remote;

use std::ops::ControlFlow;

pub use cache::{CachedModel, cached_models};
pub use error::HubError;
pub use options::HubOptions;

use crate::{Folder, Pipeline, Result};
use cache::Cache;
use needed::TOKENIZER_FILES;
use remote::Remote;

/// Follows a download, and can stop it; what is there by then stays, and the next run continues from it.
pub trait Progress: Send {
    /// A batch of `files` with `bytes` in total begins; a download has one for small files and one for weights.
    fn begin(&mut self, files: usize, bytes: u64) {
        let _ = (files, bytes);
    }

    /// `done` of `total` bytes of `file` are there.
    fn on(&mut self, file: &str, done: u64, total: u64) -> ControlFlow<()>;
}

/// Watches nothing.
pub struct NoProgress;

impl Progress for NoProgress {
    fn on(&mut self, _: &str, _: u64, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

impl<F: FnMut(&str, u64, u64) -> ControlFlow<()> + Send> Progress for F {
    fn on(&mut self, file: &str, done: u64, total: u64) -> ControlFlow<()> {
        self(file, done, total)
    }
}

/// `owner/name`, with an optional `@revision` (branch, tag or commit).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    pub owner: String,
    pub name: String,
    pub revision: String,
}

impl HubId {
    /// `None` where `text` cannot be an id; what is one may still not exist.
    pub fn parse(text: &str) -> Option<Self> {
        let (id, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (owner, name) = id.split_once('/')?;
        let is_name = |part: &str| {
            !part.is_empty()
                && part.len() <= 96
                && !part.starts_with(['.', '-'])
                && !part.contains("..")
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        };
        let fits = is_name(owner) && is_name(name) && revision.split('/').all(is_name);
        fits.then(|| Self { owner: owner.into(), name: name.into(), revision: revision.into() })
    }
}

impl std::fmt::Display for HubId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

/// The model folder of `id`, downloaded as far as it is not in the cache.
///
/// Only what an edit needs is fetched: configs, tokenizers and the four components' safetensors.
///
/// # Errors
/// [`HubError`] for all that concerns the hub; models of another architecture are refused before their weights come.
pub fn fetch_model(id: &str, options: &HubOptions, progress: &mut dyn Progress) -> Result<Folder> {
    let hub_id = HubId::parse(id).ok_or_else(|| HubError::BadId(id.to_string()))?;
    let cache = Cache::new(options, &hub_id);
    let complete = |commit: &str| needed::missing_from(&cache.folder(commit)).is_none();
    if options.offline {
        return offline(&cache, options, &hub_id, &|folder| needed::missing_from(folder));
    }
    let fetched = Remote::run(options, &hub_id, &cache, progress, |remote| {
        if complete(&remote.commit) {
            return Ok(());
        }
        let there = remote.list()?;
        let small = needed::small_files(&there);
        remote.require(&there, crate::model_index::MODEL_INDEX)?;
        remote.download(&small)?;
        let folder = cache.folder(&remote.commit);
        Pipeline::of(&folder)?;
        let weights = needed::weight_files(&folder, &there)?;
        for file in &weights {
            remote.require(&there, file)?;
        }
        remote.download(&weights)
    });
    from_cache_if_unreachable(fetched, &cache, &|folder| needed::missing_from(folder))
}

/// The folder with the tokenizer files at the root of the repository `id`, for use with single-file models
/// (`openai/clip-vit-large-patch14`, `google/t5-v1_1-xxl`).
///
/// # Errors
/// As [`fetch_model`].
pub fn fetch_tokenizer(id: &str, options: &HubOptions, progress: &mut dyn Progress) -> Result<Folder> {
    let hub_id = HubId::parse(id).ok_or_else(|| HubError::BadId(id.to_string()))?;
    let cache = Cache::new(options, &hub_id);
    if options.offline {
        return offline(&cache, options, &hub_id, &|folder| needed::missing_tokenizer(folder));
    }
    let fetched = Remote::run(options, &hub_id, &cache, progress, |remote| {
        if needed::missing_tokenizer(&cache.folder(&remote.commit)).is_none() {
            return Ok(());
        }
        let there = remote.list()?;
        let files: Vec<String> =
            TOKENIZER_FILES.iter().filter(|file| there.contains(**file)).map(|file| file.to_string()).collect();
        remote.download(&files)?;
        match needed::missing_tokenizer(&cache.folder(&remote.commit)) {
            None => Ok(()),
            Some(file) => Err(HubError::NoSuchFile { id: hub_id.to_string(), file }.into()),
        }
    });
    from_cache_if_unreachable(fetched, &cache, &|folder| needed::missing_tokenizer(folder))
}

/// Names a file that `folder` lacks, if it lacks one.
type Missing<'a> = &'a dyn Fn(&Folder) -> Option<String>;

fn offline(cache: &Cache, options: &HubOptions, id: &HubId, missing: Missing) -> Result<Folder> {
    let current = cache.current();
    let lacking = match &current {
        Some(folder) => missing(folder),
        None => Some("all of it".to_string()),
    };
    match (current, lacking) {
        (Some(folder), None) => Ok(folder),
        (_, lacking) => Err(HubError::Offline {
            id: id.to_string(),
            cache: options.cache.clone(),
            missing: lacking.unwrap_or_default(),
        }
        .into()),
    }
}

/// Without a connection a complete model in the cache is as good as it was yesterday.
fn from_cache_if_unreachable(fetched: Result<Folder>, cache: &Cache, missing: Missing) -> Result<Folder> {
    if let Err(crate::WeightsError::Hub(error @ HubError::Unreachable { .. })) = &fetched
        && let Some(folder) = cache.current()
        && missing(&folder).is_none()
    {
        tracing::warn!("{error}; using the copy in {folder}");
        return Ok(folder);
    }
    fetched
}
