//! What can be told of a model file or folder without reading its weights.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{
    Component, Folder, Kind, LoraDescription, LoraFile, ModelFile, Pipeline, Result, Store, detect, format::is_gguf,
};

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
    /// What it is: kinds joined by "and"; for none that is known, the architecture that a GGUF file names.
    pub kind: String,
    pub tensors: usize,
    pub parameters: u64,
    /// Bytes of the tensors; those of an encoding that is not read are not known.
    pub bytes: u64,
    /// Tensors by encoding.
    pub dtypes: BTreeMap<String, usize>,
    /// What the writer noted in the header; long lists are left out.
    pub metadata: BTreeMap<String, String>,
    /// More about a LoRA.
    pub lora: Option<LoraDescription>,
}

/// Describes a model folder, a safetensors file or a GGUF file.
///
/// # Errors
/// As when the file or folder is opened to be used.
pub fn describe(path: &Path) -> Result<Description> {
    if path.is_dir() {
        return describe_model(&Folder::on_disk(path)).map(Description::Model);
    }
    let file = ModelFile::open(path)?;
    let format = if is_gguf(&file) { Description::Gguf } else { Description::Safetensors };
    let store = Store::open(vec![file])?;
    let mut description = describe_store(&store);
    if detect(&store) == [Kind::Lora] {
        description.lora = Some(LoraFile::of(store, path)?.describe());
    }
    Ok(format(description))
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
        if let Some(encoding) = store.encoding(name) {
            *dtypes.entry(encoding.to_string()).or_default() += 1;
        }
        parameters += count(store.shape(name).unwrap_or_default());
    }
    FileDescription {
        file: store.describe(),
        kind: match (detect(store).as_slice(), store.metadata().get("general.architecture")) {
            ([Kind::Unknown { model: None }], Some(architecture)) => architecture.clone(),
            (kinds, _) => kinds.iter().map(Kind::to_string).collect::<Vec<_>>().join(" and "),
        },
        tensors: store.names().count(),
        parameters,
        bytes: store.total_bytes() as u64,
        dtypes,
        metadata: store.metadata().clone(),
        lora: None,
    }
}

/// A shape is what a header claims: of a product too large the largest number is good enough.
fn count(shape: &[usize]) -> u64 {
    shape.iter().fold(1_u64, |n, &dim| n.saturating_mul(dim as u64))
}
