//! Tensors by name over one or several safetensors files, checked when opened and read when asked for.

use std::collections::{BTreeMap, HashMap};

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use safetensors::{Dtype, tensor::TensorInfo};
use serde::Deserialize;

use crate::{Folder, ModelFile, Result, WeightsError, header::Header};

/// All tensors of a component, over all of its shards.
pub struct Store {
    files: Vec<ModelFile>,
    entries: HashMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

struct Entry {
    file: usize,
    /// Offset of the tensor's first byte in the file.
    start: usize,
    info: TensorInfo,
}

/// `*.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Store {
    /// Reads and checks the headers of `files`; of a tensor that several files hold, the last one counts.
    pub fn open(files: Vec<ModelFile>) -> Result<Self> {
        let mut entries = HashMap::new();
        let mut metadata = BTreeMap::new();
        for (file, content) in files.iter().enumerate() {
            let header = Header::read(content)?;
            metadata.extend(header.metadata);
            for (name, info) in header.tensors {
                // The header is checked: the sum is inside of the file.
                let start = header.data_start + info.data_offsets.0;
                entries.insert(name, Entry { file, start, info });
            }
        }
        Ok(Self { files, entries, metadata })
    }

    /// The weights of a diffusers or transformers component folder, whole or sharded.
    ///
    /// `stem` is `diffusion_pytorch_model` (diffusers) or `model` (transformers).
    pub fn open_component(folder: &Folder, stem: &str) -> Result<Self> {
        let whole = format!("{stem}.safetensors");
        if folder.has(&whole) {
            return Self::open(vec![folder.open(&whole)?]);
        }
        let index_name = format!("{stem}.safetensors.index.json");
        if !folder.has(&index_name) {
            return Err(WeightsError::NoWeights {
                what: folder.to_string(),
                expected: format!("{whole} or {index_name}"),
            });
        }
        let files = Self::shards(folder, stem)?.into_iter().map(|shard| {
            if !folder.has(&shard) {
                return Err(WeightsError::MissingShard { file: folder.name_of(&index_name), shard });
            }
            folder.open(&shard)
        });
        Self::open(files.collect::<Result<_>>()?)
    }

    /// The shards that a component's index names, sorted; they need not be there.
    pub fn shards(folder: &Folder, stem: &str) -> Result<Vec<String>> {
        let index_name = format!("{stem}.safetensors.index.json");
        let index: Index = folder.json(&index_name)?;
        let mut shards: Vec<String> = index.weight_map.into_values().collect();
        shards.sort();
        shards.dedup();
        // A shard lies beside its index; a name with a path in it could reach outside the model's folder.
        match shards.iter().find(|shard| shard.contains(['/', '\\']) || shard.starts_with('.')) {
            Some(shard) => Err(WeightsError::MissingShard { file: folder.name_of(&index_name), shard: shard.clone() }),
            None if shards.is_empty() => Err(WeightsError::BadJson {
                file: folder.name_of(&index_name),
                reason: "its weight_map names no shards".to_string(),
            }),
            None => Ok(shards),
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The prefixes of all tensor names that end in `suffix`, sorted; each is empty or ends in a dot.
    pub fn prefixes_of(&self, suffix: &str) -> Vec<&str> {
        let mut prefixes: Vec<&str> = self.names().filter_map(|name| name.strip_suffix(suffix)).collect();
        prefixes.retain(|prefix| prefix.is_empty() || prefix.ends_with('.'));
        prefixes.sort_unstable();
        prefixes
    }

    /// What the files' writers noted in the headers.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| e.info.shape.as_slice())
    }

    /// The dtype as safetensors names it, e.g. `BF16`.
    pub fn dtype(&self, name: &str) -> Option<Dtype> {
        self.entries.get(name).map(|e| e.info.dtype)
    }

    /// The dtype of the tensor `name` where that has fewer bits than `dtype`: bf16 and f16 for f32.
    pub fn narrower_dtype(&self, name: &str, dtype: DType) -> Option<DType> {
        let stored = match self.dtype(name)? {
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            _ => return None,
        };
        (stored.size_in_bytes() < dtype.size_in_bytes()).then_some(stored)
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> usize {
        self.entries.values().map(|e| e.info.data_offsets.1 - e.info.data_offsets.0).sum()
    }

    /// The tensor `name`, converted to `dtype` on `device`.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let entry = self
            .entries
            .get(name)
            .ok_or_else(|| WeightsError::MissingTensor { files: self.describe(), tensor: name.to_string() })?;
        let stored = match entry.info.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            other => {
                return Err(WeightsError::WrongDtype {
                    file: self.file_of(name),
                    tensor: name.to_string(),
                    dtype: format!("{other:?}"),
                });
            }
        };
        let len = entry.info.data_offsets.1 - entry.info.data_offsets.0;
        let bytes = &self.files[entry.file].bytes[entry.start..entry.start + len];
        let shape = &entry.info.shape;
        if stored == dtype {
            // Straight from the mapped file to where it is used.
            return Ok(Tensor::from_raw_buffer(bytes, dtype, shape, device)?);
        }
        if (stored, dtype) == (DType::BF16, DType::F32) && device.is_cpu() {
            return Ok(Tensor::from_vec(bf16_to_f32(bytes), shape.as_slice(), device)?);
        }
        let tensor = Tensor::from_raw_buffer(bytes, stored, shape, &Device::Cpu)?;
        // Whichever order moves fewer bytes to the device.
        let tensor = if dtype.size_in_bytes() < stored.size_in_bytes() {
            tensor.to_dtype(dtype)?.to_device(device)?
        } else {
            tensor.to_device(device)?.to_dtype(dtype)?
        };
        Ok(tensor)
    }

    /// The name of the file that holds the tensor `name`, or of all files.
    pub fn file_of(&self, name: &str) -> String {
        self.entries.get(name).map_or_else(|| self.describe(), |e| self.files[e.file].name.clone())
    }

    /// The files, for messages.
    pub fn describe(&self) -> String {
        match self.files.as_slice() {
            [] => "no files".to_string(),
            [one] => one.name.clone(),
            [first, rest @ ..] => format!("{} and {} more", first.name, rest.len()),
        }
    }
}

/// Widens little-endian bf16 values: how a CPU mostly loads, hence on all cores and without candle's copy between.
fn bf16_to_f32(bytes: &[u8]) -> Vec<f32> {
    // A bf16 is the upper half of an f32.
    let widen = |half: &[u8]| f32::from_le_bytes([0, 0, half[0], half[1]]);
    bytes.par_chunks_exact(2).with_min_len(1 << 16).map(widen).collect()
}
