//! The files of a model, wherever they are: a folder on disk, or compiled into the program.

use std::{
    fs::File,
    ops::{Deref, Range},
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;
use serde::de::DeserializeOwned;

use crate::{Result, WeightsError};

/// A read-only view of a file's bytes: mapped from disk, so that only the pages that are read take memory, or static.
#[derive(Clone)]
pub enum Bytes {
    Mapped(Arc<Mmap>),
    Static(&'static [u8]),
}

impl Bytes {
    /// Says that `range` will not be read again soon: the process gives its pages back, and the system keeps them for as long
    /// as it has no better use. Without this, a file that has been read through counts as this process's memory.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Self::Mapped(map) = self
            && range.end <= map.len()
        {
            // SAFETY: within the map, which is read-only and has a file behind it, from which its pages come again when
            // they are read. Where the system refuses, nothing is lost but memory.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Static(bytes) => bytes,
        }
    }
}

/// One file of a model: its bytes and the name to use for it in messages.
#[derive(Clone)]
pub struct ModelFile {
    pub name: String,
    pub bytes: Bytes,
}

impl ModelFile {
    /// Maps the file at `path`.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let name = path.display().to_string();
        let io = |source| WeightsError::Io { file: name.clone(), source };
        // Looked at before it is opened: to open a pipe would wait for a writer.
        let kind = std::fs::metadata(&path).map_err(io)?;
        if !kind.is_file() {
            let what = if kind.is_dir() { "a folder" } else { "not a regular file" };
            return Err(WeightsError::Unsupported { what: name, reason: format!("this is {what}; give a file") });
        }
        let file = File::open(&path).map_err(io)?;
        // SAFETY: the map is read-only. A file that another program shortens while we read it can fault, as with any
        // program that maps its weights; all offsets are checked against the length at opening.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self { name, bytes: Bytes::Mapped(Arc::new(map)) })
    }

    pub fn json<T: DeserializeOwned>(&self) -> Result<T> {
        serde_json::from_slice(&self.bytes)
            .map_err(|e| WeightsError::BadJson { file: self.name.clone(), reason: e.to_string() })
    }
}

/// Files compiled into the program: `(relative path, bytes)`.
pub type EmbeddedFiles = &'static [(&'static str, &'static [u8])];

#[derive(Clone)]
enum Place {
    Disk(PathBuf),
    Embedded { name: &'static str, files: EmbeddedFiles, prefix: String },
}

/// A folder of model files, on disk or embedded.
#[derive(Clone)]
pub struct Folder(Place);

impl Folder {
    pub fn on_disk(path: impl Into<PathBuf>) -> Self {
        Self(Place::Disk(path.into()))
    }

    /// `name` stands for the folder in messages.
    pub fn embedded(name: &'static str, files: EmbeddedFiles) -> Self {
        Self(Place::Embedded { name, files, prefix: String::new() })
    }

    /// The folder `name` inside this one (which need not exist).
    pub fn sub(&self, name: &str) -> Self {
        Self(match &self.0 {
            Place::Disk(path) => Place::Disk(path.join(name)),
            Place::Embedded { name: model, files, prefix } => {
                Place::Embedded { name: model, files, prefix: format!("{prefix}{name}/") }
            }
        })
    }

    /// Where the folder is on disk, unless it is embedded.
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            Place::Disk(path) => Some(path),
            Place::Embedded { .. } => None,
        }
    }

    pub fn has(&self, file: &str) -> bool {
        match &self.0 {
            Place::Disk(path) => path.join(file).is_file(),
            Place::Embedded { files, prefix, .. } => find(files, prefix, file).is_some(),
        }
    }

    pub fn open(&self, file: &str) -> Result<ModelFile> {
        match &self.0 {
            Place::Disk(path) => ModelFile::open(path.join(file)),
            Place::Embedded { files, prefix, .. } => match find(files, prefix, file) {
                Some(bytes) => Ok(ModelFile { name: self.name_of(file), bytes: Bytes::Static(bytes) }),
                None => Err(WeightsError::Io {
                    file: self.name_of(file),
                    source: std::io::Error::from(std::io::ErrorKind::NotFound),
                }),
            },
        }
    }

    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<T> {
        self.open(file)?.json()
    }

    /// How messages name `file` of this folder.
    pub fn name_of(&self, file: &str) -> String {
        match &self.0 {
            Place::Disk(path) => path.join(file).display().to_string(),
            Place::Embedded { name, prefix, .. } => format!("{name}/{prefix}{file}"),
        }
    }
}

impl std::fmt::Display for Folder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Place::Disk(path) => write!(f, "{}", path.display()),
            Place::Embedded { name, prefix, .. } => f.write_str(format!("{name}/{prefix}").trim_end_matches('/')),
        }
    }
}

fn find(files: EmbeddedFiles, prefix: &str, file: &str) -> Option<&'static [u8]> {
    files.iter().find(|(path, _)| path.strip_prefix(prefix) == Some(file)).map(|&(_, bytes)| bytes)
}
