//! What can be told of a model file or folder without reading its weights.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{Component, Folder, Kind, ModelFile, Pipeline, Result, Store, WeightsError, detect, gguf::GgufHeader};

/// What a path holds.
#[derive(Debug, Clone)]
pub enum Description {
    Model(ModelDescription),
    Safetensors(FileDescription),
    Gguf(FileDescription),
}

/// A model folder.
#[derive(Debug, Clone)]
pub struct ModelDescription {
    pub folder: PathBuf,
    pub pipeline: Pipeline,
    /// What each component's weights are, in the order of [`Component::ALL`].
    pub components: Vec<(Component, FileDescription)>,
}

/// One file of weights, or the shards of a component together.
#[derive(Debug, Clone)]
pub struct FileDescription {
    /// The name of the file, or of the first one.
    pub file: String,
    /// What it is: kinds joined by "and", or the architecture that a GGUF file names.
    pub kind: String,
    pub tensors: usize,
    pub parameters: u64,
    /// Bytes of the tensors, with the gaps between them where a format has such.
    pub bytes: u64,
    /// Tensors by dtype.
    pub dtypes: BTreeMap<String, usize>,
    /// What the writer noted in the header; long lists are left out.
    pub metadata: BTreeMap<String, String>,
}

/// Describes a model folder, a safetensors file or a GGUF file.
///
/// # Errors
/// As when the file or folder is opened to be used, with the exception that GGUF files are described.
pub fn describe(path: &Path) -> Result<Description> {
    if path.is_dir() {
        return describe_model(&Folder::on_disk(path)).map(Description::Model);
    }
    let file = ModelFile::open(path)?;
    if file.bytes.starts_with(b"GGUF") {
        return describe_gguf(&file).map(Description::Gguf);
    }
    Ok(Description::Safetensors(describe_store(&Store::open(vec![file])?)))
}

/// Describes a model folder, on disk or embedded.
///
/// # Errors
/// As when it is opened to be used.
pub fn describe_model(model: &Folder) -> Result<ModelDescription> {
    let pipeline = Pipeline::of(model)?;
    let component = |component: Component| {
        let store = Store::open_component(&model.sub(component.folder()), component.stem())?;
        Ok((component, describe_store(&store)))
    };
    let components = Component::ALL.into_iter().map(component).collect::<Result<_>>()?;
    Ok(ModelDescription { folder: PathBuf::from(model.to_string()), pipeline, components })
}

fn describe_store(store: &Store) -> FileDescription {
    let mut dtypes = BTreeMap::new();
    let mut parameters = 0;
    for name in store.names() {
        if let Some(dtype) = store.dtype(name) {
            *dtypes.entry(dtype.to_string()).or_default() += 1;
        }
        parameters += count(store.shape(name).unwrap_or_default());
    }
    FileDescription {
        file: store.describe(),
        kind: detect(store).iter().map(Kind::to_string).collect::<Vec<_>>().join(" and "),
        tensors: store.names().count(),
        parameters,
        bytes: store.total_bytes() as u64,
        dtypes,
        metadata: store.metadata().clone(),
    }
}

fn describe_gguf(file: &ModelFile) -> Result<FileDescription> {
    let header = GgufHeader::parse(&file.bytes).ok_or_else(|| WeightsError::Unsupported {
        what: file.name.clone(),
        reason: "this GGUF file is damaged or of an unknown version; download it again".to_string(),
    })?;
    let mut dtypes = BTreeMap::new();
    for (dtype, _) in &header.tensors {
        *dtypes.entry(dtype.clone()).or_default() += 1;
    }
    let architecture = header.metadata.get("general.architecture");
    Ok(FileDescription {
        file: file.name.clone(),
        kind: architecture.cloned().unwrap_or_else(|| "model of an unknown kind".to_string()),
        tensors: header.tensors.len(),
        parameters: header.tensors.iter().fold(0, |sum, (_, elements)| sum.saturating_add(*elements)),
        bytes: (file.bytes.len() - header.bytes) as u64,
        dtypes,
        metadata: header.metadata,
    })
}

/// A shape is what a header claims: of a product too large the largest number is good enough.
fn count(shape: &[usize]) -> u64 {
    shape.iter().fold(1_u64, |n, &dim| n.saturating_mul(dim as u64))
}
