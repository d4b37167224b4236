//! The cache folder that the hub's tools share.
//!
//! `models--OWNER--NAME/` holds `blobs/ETAG` (contents), `snapshots/COMMIT/PATH` (links to blobs) and `refs/REVISION`
//! (commits). <https://huggingface.co/docs/huggingface_hub/guides/manage-cache>

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{HubError, HubId, HubOptions, needed};
use crate::{Component, Folder, Pipeline};

/// One model's part of the cache.
pub struct Cache {
    root: PathBuf,
    locks: PathBuf,
    revision: String,
}

impl Cache {
    pub fn new(options: &HubOptions, id: &HubId) -> Self {
        let name = format!("models--{}--{}", id.owner, id.name);
        Self {
            root: options.cache.join(&name),
            locks: options.cache.join(".locks").join(name),
            revision: id.revision.clone(),
        }
    }

    /// The snapshot of a commit, which need not be there.
    pub fn folder(&self, commit: &str) -> Folder {
        Folder::on_disk(self.root.join("snapshots").join(commit))
    }

    /// The snapshot that the revision stood for when it was last downloaded.
    pub fn current(&self) -> Option<Folder> {
        let commit = match fs::read_to_string(self.root.join("refs").join(&self.revision)) {
            Ok(commit) => commit.trim().to_string(),
            Err(_) => self.revision.clone(),
        };
        // What stands in the file becomes a part of a path.
        let is_commit = !commit.is_empty() && commit.bytes().all(|b| b.is_ascii_alphanumeric());
        (is_commit && self.root.join("snapshots").join(&commit).is_dir()).then(|| self.folder(&commit))
    }

    pub fn has(&self, commit: &str, file: &str) -> bool {
        self.link(commit, file).is_file()
    }

    pub fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// Where a blob grows until it is whole.
    pub fn incomplete(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Held while a blob is written, by this and the other tools.
    pub fn lock(&self, etag: &str) -> PathBuf {
        self.locks.join(format!("{etag}.lock"))
    }

    fn link(&self, commit: &str, file: &str) -> PathBuf {
        self.root.join("snapshots").join(commit).join(file)
    }

    /// Puts a blob into a snapshot under the file's name.
    pub fn add_to_snapshot(&self, commit: &str, file: &str, etag: &str) -> Result<(), HubError> {
        let link = self.link(commit, file);
        let io = |source| HubError::Io { file: link.display().to_string(), source };
        if let Some(parent) = link.parent() {
            fs::create_dir_all(parent).map_err(io)?;
        }
        match fs::remove_file(&link) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(e)),
            _ => link_blob(&self.blob(etag), &link, file, etag).map_err(io),
        }
    }

    /// Notes that the revision stands for `commit`.
    pub fn set_revision(&self, commit: &str) -> Result<(), HubError> {
        if self.revision == commit {
            return Ok(());
        }
        let path = self.root.join("refs").join(&self.revision);
        let io = |source| HubError::Io { file: path.display().to_string(), source };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(io)?;
        }
        fs::write(&path, commit).map_err(io)
    }
}

/// A relative link, so that the cache can be moved as a whole.
#[cfg(unix)]
fn link_blob(_: &Path, link: &Path, file: &str, etag: &str) -> std::io::Result<()> {
    // From `snapshots/COMMIT/FILE`, and one more up for each folder in FILE.
    let up = "../".repeat(2 + file.matches('/').count());
    std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), link)
}

/// Symbolic links need privileges elsewhere.
#[cfg(not(unix))]
fn link_blob(blob: &Path, link: &Path, _: &str, _: &str) -> std::io::Result<()> {
    fs::hard_link(blob, link).or_else(|_| fs::copy(blob, link).map(|_| ()))
}

/// A model in the cache that this program can use.
#[derive(Debug, Clone)]
pub struct CachedModel {
    /// `owner/name`.
    pub id: String,
    pub folder: PathBuf,
    pub pipeline: Pipeline,
    /// Bytes of the files in its folder.
    pub bytes: u64,
    /// A file that is missing, if the download is not complete.
    pub missing: Option<String>,
}

/// The downloaded models of supported pipelines, by name.
pub fn cached_models(options: &HubOptions) -> Vec<CachedModel> {
    let Ok(entries) = fs::read_dir(&options.cache) else {
        return Vec::new();
    };
    let model = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let (owner, name) = name.strip_prefix("models--")?.split_once("--")?;
        let id = HubId::parse(&format!("{owner}/{name}"))?;
        let folder = Cache::new(options, &id).current()?;
        let pipeline = Pipeline::of(&folder).ok()?;
        let path = folder.path()?.to_path_buf();
        let bytes = bytes_below(&path);
        let missing = needed::missing_from(&folder, &Component::ALL);
        Some(CachedModel { id: id.to_string(), folder: path, pipeline, bytes, missing })
    };
    let mut models: Vec<_> = entries.flatten().filter_map(model).collect();
    models.sort_by(|a, b| a.id.cmp(&b.id));
    models
}

/// Links are counted as what they point to.
fn bytes_below(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    let bytes = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => bytes_below(&entry.path()),
        _ => fs::metadata(entry.path()).map_or(0, |data| data.len()),
    };
    entries.flatten().map(bytes).sum()
}
