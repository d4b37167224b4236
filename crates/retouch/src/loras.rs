//! The LoRAs that a model is used with.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::SystemTime,
};

use candle_core::{DType, Device};
use retouch_weights::{Adapters, Component, LoraFile};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tracing::debug;

use crate::{
    Error, Result,
    paths::{from_stored, to_stored},
    source::ModelFiles,
};

/// A LoRA, and how strongly it acts.
#[derive(Debug, Clone, PartialEq)]
pub struct Lora {
    /// A safetensors file.
    pub file: PathBuf,
    /// What its changes are multiplied by: 1 as it was trained, 0 not at all, negative the other way.
    pub scale: f64,
}

/// A [`Lora`] as images store it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredLora {
    /// As [`crate::Parameters::model`] names files.
    pub file: String,
    pub scale: f64,
    /// SHA-256 over the file's bytes, to find out whether a repeated edit is made with the same; older images have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl StoredLora {
    /// Whether the file holds now what it held then, as far as that is stored.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn is_unchanged(&self) -> Result<bool> {
        match &self.sha256 {
            Some(sha256) => Ok(*sha256 == sha256_of(&from_stored(&self.file))?),
            None => Ok(true),
        }
    }
}

/// In lower-case hex. Some of the file at a time: nothing of it stays in memory.
fn sha256_of(file: &Path) -> Result<String> {
    let digest = || -> io::Result<_> {
        let (mut file, mut sha256, mut part) = (File::open(file)?, Sha256::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut part)? {
                0 => return Ok(sha256.finalize()),
                read => sha256.update(&part[..read]),
            }
        }
    };
    let digest = digest().map_err(|source| Error::Io { file: file.display().to_string(), source })?;
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

impl From<&StoredLora> for Lora {
    fn from(stored: &StoredLora) -> Self {
        Self { file: from_stored(&stored.file), scale: stored.scale }
    }
}

/// The components that LoRAs can change.
const COMPONENTS: [Component; 3] = [Component::Transformer, Component::Clip, Component::T5];

/// Open LoRAs, matched to a model's components.
#[derive(Default)]
pub(crate) struct Loras {
    /// What they were opened from.
    identity: Vec<Identity>,
    stored: Vec<StoredLora>,
    partial: bool,
    adapters: HashMap<Component, Arc<Adapters>>,
}

/// A file as it was when it was opened.
#[derive(Debug, PartialEq)]
struct Identity {
    lora: Lora,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl Loras {
    /// Opens the files and checks that they fit the model; of the matrices nothing is read.
    pub fn open(wanted: &[Lora], partial: bool, model: &ModelFiles) -> Result<Self> {
        let identity = identities(wanted)?;
        let weights = |component| match model.weights(component, DType::F32, &Device::Cpu) {
            Ok(weights) => Ok(weights),
            Err(Error::Weights(error)) => Err(*error),
            Err(other) => Err(retouch_weights::WeightsError::Unsupported {
                what: component.to_string(),
                reason: other.to_string(),
            }),
        };
        let (mut files, mut stored) = (Vec::with_capacity(wanted.len()), Vec::with_capacity(wanted.len()));
        for lora in wanted {
            let file = LoraFile::open(&lora.file)?;
            file.check_places(partial, weights)?;
            debug!(file = file.name(), scale = lora.scale, description = ?file.describe(), "LoRA opened");
            let sha256 = Some(sha256_of(&lora.file)?);
            stored.push(StoredLora { file: to_stored(&lora.file), scale: lora.scale, sha256 });
            // Even one that does nothing was opened, so that a wrong name is noticed.
            if lora.scale != 0.0 {
                files.push((Arc::new(file), lora.scale));
            }
        }
        let mut adapters = HashMap::new();
        for component in COMPONENTS {
            if files.iter().any(|(file, _)| file.changes(component)) {
                adapters.insert(component, Arc::new(Adapters::new(&files, component, &weights(component)?)?));
            }
        }
        Ok(Self { identity, stored, partial, adapters })
    }

    /// Whether these are the files as they are now.
    pub fn are(&self, wanted: &[Lora], partial: bool) -> Result<bool> {
        Ok(self.partial == partial && self.identity == identities(wanted)?)
    }

    /// As an image made with them stores them.
    pub fn stored(&self) -> &[StoredLora] {
        &self.stored
    }

    pub fn of(&self, component: Component) -> Option<Arc<Adapters>> {
        self.adapters.get(&component).cloned()
    }

    pub fn change(&self, component: Component) -> bool {
        self.adapters.contains_key(&component)
    }
}

fn identities(wanted: &[Lora]) -> Result<Vec<Identity>> {
    let identity = |lora: &Lora| {
        let failed = |source| Error::Io { file: lora.file.display().to_string(), source };
        let metadata = fs::metadata(&lora.file).map_err(failed)?;
        Ok(Identity { lora: lora.clone(), bytes: metadata.len(), modified: metadata.modified().ok() })
    };
    wanted.iter().map(identity).collect()
}
