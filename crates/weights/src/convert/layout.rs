//! The two formats as they are written: what comes before the tensors, and the space between them.

use std::collections::BTreeMap;

use crate::{
    Encoding, Result, WeightsError,
    format::{ALIGNMENT, MAGIC, type_number},
};

/// The format of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileFormat {
    Gguf,
    Safetensors,
}

/// A tensor to be written.
pub struct Written {
    pub name: String,
    pub shape: Vec<usize>,
    pub encoding: Encoding,
}

/// What is noted in GGUF's metadata.
pub enum Note {
    Text(&'static str),
    Number(u32),
}

impl Written {
    /// Its bytes, without padding.
    pub fn bytes(&self) -> Result<usize> {
        self.encoding.bytes(&self.shape).ok_or_else(|| WeightsError::Unsupported {
            what: self.name.clone(),
            reason: format!("a tensor of shape {:?} cannot be written in {}", self.shape, self.encoding),
        })
    }
}

impl FileFormat {
    /// Bytes after a tensor of that many.
    pub fn padding(self, bytes: usize) -> usize {
        match self {
            Self::Gguf => bytes.next_multiple_of(ALIGNMENT) - bytes,
            Self::Safetensors => 0,
        }
    }

    /// All that comes before the first tensor.
    pub fn header(self, tensors: &[&Written], notes: &[(&str, Note)]) -> Result<Vec<u8>> {
        match self {
            Self::Gguf => gguf(tensors, notes),
            Self::Safetensors => safetensors(tensors),
        }
    }
}

/// <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>
fn gguf(tensors: &[&Written], notes: &[(&str, Note)]) -> Result<Vec<u8>> {
    let mut header = MAGIC.to_vec();
    let text = |header: &mut Vec<u8>, text: &str| {
        header.extend((text.len() as u64).to_le_bytes());
        header.extend(text.as_bytes());
    };
    header.extend(3_u32.to_le_bytes());
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((notes.len() as u64).to_le_bytes());
    for (key, note) in notes {
        text(&mut header, key);
        match note {
            Note::Number(number) => {
                header.extend(4_u32.to_le_bytes());
                header.extend(number.to_le_bytes());
            }
            Note::Text(value) => {
                header.extend(8_u32.to_le_bytes());
                text(&mut header, value);
            }
        }
    }
    let mut offset = 0_u64;
    for tensor in tensors {
        let kind = type_number(&tensor.encoding).ok_or_else(|| WeightsError::Unsupported {
            what: tensor.name.clone(),
            reason: format!("GGUF has no {}; write a .safetensors file", tensor.encoding),
        })?;
        text(&mut header, &tensor.name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor.shape.iter().rev().for_each(|&size| header.extend((size as u64).to_le_bytes()));
        header.extend(kind.to_le_bytes());
        header.extend(offset.to_le_bytes());
        offset += tensor.bytes()?.next_multiple_of(ALIGNMENT) as u64;
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    Ok(header)
}

/// <https://github.com/huggingface/safetensors#format>
fn safetensors(tensors: &[&Written]) -> Result<Vec<u8>> {
    let mut offset = 0;
    let mut entries = BTreeMap::new();
    for tensor in tensors {
        let end = offset + tensor.bytes()?;
        let dtype = tensor.encoding.to_string();
        let entry = serde_json::json!({ "dtype": dtype, "shape": tensor.shape, "data_offsets": [offset, end] });
        entries.insert(tensor.name.as_str(), entry);
        offset = end;
    }
    // Written by many tools, and by some of the older ones asked for.
    entries.insert("__metadata__", serde_json::json!({ "format": "pt" }));
    let mut json = serde_json::to_vec(&entries)
        .map_err(|e| WeightsError::BadJson { file: "the header".to_string(), reason: e.to_string() })?;
    json.resize(json.len().next_multiple_of(8), b' ');
    Ok([(json.len() as u64).to_le_bytes().as_slice(), &json].concat())
}
