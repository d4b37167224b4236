//! Tensors by name over one or several safetensors or GGUF files, checked when opened and read when asked for.

use std::{
    collections::{BTreeMap, HashMap},
    ops::Range,
    sync::atomic::{AtomicU64, Ordering},
};

use candle_core::{DType, Device, Tensor};
use retouch_kernels::Part;
use serde::Deserialize;

use crate::{
    Folder, ModelFile, Result, WeightsError,
    format::{self, Encoding, Entry, Header},
};

/// Of whole tensors.
static READ: AtomicU64 = AtomicU64::new(0);

/// Bytes of tensors that this process has read so far, from all files.
pub fn bytes_read() -> u64 {
    READ.load(Ordering::Relaxed)
}

/// All tensors of a component, over all of its shards.
pub struct Store {
    files: Vec<ModelFile>,
    tensors: HashMap<String, Located>,
    metadata: BTreeMap<String, String>,
}

struct Located {
    /// Index into the files.
    file: usize,
    entry: Entry,
}

/// `*.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: HashMap<String, String>,
}

impl Store {
    /// Reads and checks the headers of `files`; of a tensor that several files hold, the last one counts.
    pub fn open(files: Vec<ModelFile>) -> Result<Self> {
        let mut tensors = HashMap::new();
        let mut metadata = BTreeMap::new();
        for (file, content) in files.iter().enumerate() {
            let header = Header::read(content)?;
            metadata.extend(header.metadata);
            tensors.extend(header.tensors.into_iter().map(|(name, entry)| (name, Located { file, entry })));
        }
        Ok(Self { files, tensors, metadata })
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
        self.tensors.contains_key(name)
    }

    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
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
        self.tensors.get(name).map(|t| t.entry.shape.as_slice())
    }

    pub fn encoding(&self, name: &str) -> Option<&Encoding> {
        self.tensors.get(name).map(|t| &t.entry.encoding)
    }

    /// Bytes of the tensor `name` in its file.
    pub fn bytes(&self, name: &str) -> Option<usize> {
        self.tensors.get(name).map(|tensor| tensor.entry.len)
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> usize {
        self.tensors.values().map(|t| t.entry.len).sum()
    }

    /// The tensor `name`, converted to `dtype` on `device`.
    pub fn tensor(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let (entry, bytes) = self.located(name)?;
        let tensor = format::decode(&entry.encoding, bytes, &entry.shape, self.scale(name)?, dtype, device)?;
        self.release(name);
        Ok(tensor)
    }

    /// Gives back the memory into which a tensor was read from its file.
    pub(crate) fn release(&self, name: &str) {
        if let Some(Located { file, entry }) = self.tensors.get(name) {
            READ.fetch_add(entry.len as u64, Ordering::Relaxed);
            self.files[*file].bytes.release(entry.start..entry.start + entry.len);
        }
    }

    /// The matrix `name` as it is in the file, where that is in fewer bits than `dtype`.
    pub fn packed(&self, name: &str, dtype: DType, device: &Device) -> Result<Option<Part>> {
        if !self.stays_packed(name, dtype)? {
            return Ok(None);
        }
        let (entry, bytes) = self.located(name)?;
        let &[rows, columns] = entry.shape.as_slice() else { return Ok(None) };
        let part = format::part(&entry.encoding, bytes, (rows, columns), self.scale(name)?, device)?;
        self.release(name);
        Ok(Some(part))
    }

    /// Whether `name` is a matrix in fewer bits than `dtype`.
    pub fn stays_packed(&self, name: &str, dtype: DType) -> Result<bool> {
        let (entry, _) = self.located(name)?;
        let narrower = match entry.encoding {
            Encoding::Blocks(_) | Encoding::Fp8(_) => true,
            Encoding::F16 | Encoding::Bf16 => dtype.size_in_bytes() > 2 && self.scale(name)? == 1.0,
            _ => false,
        };
        Ok(narrower && entry.shape.len() == 2)
    }

    /// The rows `range` of the tensor `name` along its first axis, in f32 on the CPU: `[rows, elements of a row]`.
    pub fn rows(&self, name: &str, range: Range<usize>) -> Result<Tensor> {
        let (entry, bytes) = self.located(name)?;
        let (all, row) = match entry.shape.split_first() {
            Some((&rows, row)) => (rows, row.iter().product()),
            None => (1, 1),
        };
        let row_bytes = bytes.len() / all.max(1);
        let rows = bytes.get(range.start.saturating_mul(row_bytes)..range.end.saturating_mul(row_bytes));
        let Some(bytes) = rows.filter(|_| range.end <= all) else {
            return Err(candle_core::Error::Msg(format!("rows {range:?} of `{name}`, which has {all}")).into());
        };
        let shape = [range.len(), row];
        let rows = format::decode(&entry.encoding, bytes, &shape, self.scale(name)?, DType::F32, &Device::Cpu)?;
        if let Some(Located { file, .. }) = self.tensors.get(name) {
            let read = entry.start + range.start * row_bytes..entry.start + range.end * row_bytes;
            self.files[*file].bytes.release(read);
        }
        Ok(rows)
    }

    /// The bytes of the tensor `name` as they are in the file; none where a scale beside it makes other values of them.
    pub fn raw(&self, name: &str) -> Result<Option<&[u8]>> {
        let (_, bytes) = self.located(name)?;
        Ok((self.scale(name)? == 1.0).then_some(bytes))
    }

    /// The bytes of the tensor `name` as they are in the file, whatever makes values of them.
    pub(crate) fn bytes_of(&self, name: &str) -> Result<&[u8]> {
        Ok(self.located(name)?.1)
    }

    /// The header's entry of a tensor whose encoding is read, and its bytes.
    fn located(&self, name: &str) -> Result<(&Entry, &[u8])> {
        let Some(Located { file, entry }) = self.tensors.get(name) else {
            return Err(WeightsError::MissingTensor { files: self.describe(), tensor: name.to_string() });
        };
        if let Encoding::Other(encoding) = &entry.encoding {
            return Err(WeightsError::WrongEncoding {
                file: self.file_of(name),
                tensor: name.to_string(),
                encoding: encoding.clone(),
            });
        }
        // Inside of the file, as was checked at the opening.
        Ok((entry, &self.files[*file].bytes[entry.start..entry.start + entry.len]))
    }

    /// What the values of a layer's weight are to be multiplied by: files of scaled 8-bit floats have a scale beside it.
    ///
    /// ComfyUI's first name for it is `scale_weight`, its later one `weight_scale`. What such files say of the layers'
    /// inputs (`scale_input`, `input_scale`) is for products of 8-bit numbers, and not looked at: ours are of 16 bits or 32.
    /// <https://github.com/comfyanonymous/ComfyUI/blob/master/QUANTIZATION.md>
    pub(crate) fn scale(&self, name: &str) -> Result<f32> {
        let Some(layer) = name.strip_suffix("weight") else { return Ok(1.0) };
        let scale = ["scale_weight", "weight_scale"].map(|scale| format!("{layer}{scale}"));
        let Some(scale) = scale.iter().find(|scale| self.has(scale)) else { return Ok(1.0) };
        let (entry, bytes) = self.located(scale)?;
        if entry.shape.iter().any(|&size| size != 1) {
            return Err(WeightsError::Unsupported {
                what: self.file_of(scale),
                reason: format!(
                    "tensor `{scale}` of shape {:?} has a scale for each part of a matrix; files with one scale for a \
                     matrix are read",
                    entry.shape
                ),
            });
        }
        let scale = format::decode(&entry.encoding, bytes, &[1], 1.0, DType::F32, &Device::Cpu)?;
        Ok(scale.reshape(())?.to_scalar()?)
    }

    /// The name of the file that holds the tensor `name`, or of all files.
    pub fn file_of(&self, name: &str) -> String {
        self.tensors.get(name).map_or_else(|| self.describe(), |t| self.files[t.file].name.clone())
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
