//! The header of a safetensors file, checked against the file's length before anything else is done with it.
//!
//! The format: 8 bytes of header length (little endian), a JSON object from tensor name to dtype, shape and offsets,
//! the data. <https://github.com/huggingface/safetensors#format>. The checks are our own because a header is what a
//! damaged or wrong file shows first, and the message should say which tensor is at fault.

use std::collections::{BTreeMap, HashMap};

use safetensors::tensor::TensorInfo;
use serde::Deserialize;

use crate::{ModelFile, Result, WeightsError};

/// The reference implementation's limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

pub struct Header {
    /// Offset of the data in the file.
    pub data_start: usize,
    pub metadata: BTreeMap<String, String>,
    pub tensors: HashMap<String, TensorInfo>,
}

#[derive(Deserialize)]
struct Json {
    #[serde(rename = "__metadata__", default)]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorInfo>,
}

impl Header {
    /// Reads and checks the header: every tensor's bytes are inside of the file, fit its shape and overlap no other's.
    pub fn read(file: &ModelFile) -> Result<Self> {
        parse(&file.bytes).map_err(|reason| match recognise_other(&file.bytes) {
            Some(what) => WeightsError::Unsupported { what: file.name.clone(), reason: what.to_string() },
            None => WeightsError::BadSafetensors { file: file.name.clone(), reason },
        })
    }
}

fn parse(bytes: &[u8]) -> std::result::Result<Header, String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("it has only {} bytes", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > rest.len() as u64 || length > MAX_HEADER_BYTES {
        return Err(format!("its header should have {length} bytes, the file has {}", bytes.len()));
    }
    let (json, data) = rest.split_at(length as usize);
    let json: Json = serde_json::from_slice(json).map_err(|e| format!("its header is damaged: {e}"))?;
    check_places(&json.tensors, data.len())?;
    Ok(Header {
        data_start: bytes.len() - data.len(),
        metadata: json.metadata.unwrap_or_default(),
        tensors: json.tensors,
    })
}

fn check_places(tensors: &HashMap<String, TensorInfo>, data_len: usize) -> std::result::Result<(), String> {
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, info)| info.data_offsets);
    let mut end_before = 0;
    for (name, info) in in_order {
        let (start, end) = info.data_offsets;
        if end > data_len {
            return Err(format!("it is truncated (tensor `{name}` should end at data byte {end} of {data_len})"));
        }
        if start < end_before || start > end {
            return Err(format!("tensor `{name}` overlaps another"));
        }
        let bits = info.shape.iter().try_fold(info.dtype.bitsize(), |size, &dim| size.checked_mul(dim));
        if bits.is_none_or(|bits| bits.div_ceil(8) != end - start) {
            return Err(format!(
                "tensor `{name}` of shape {:?} and dtype {} has {} bytes",
                info.shape,
                info.dtype,
                end - start
            ));
        }
        end_before = end;
    }
    Ok(())
}

/// What a file is that is no safetensors file, from its first bytes, with what to do instead.
fn recognise_other(bytes: &[u8]) -> Option<&'static str> {
    if bytes.starts_with(b"GGUF") {
        Some(
            "this is a GGUF file, and only safetensors files (bf16, f16 or f32) are taken; get the model in that format",
        )
    } else if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"\x80\x02") {
        Some(
            "this is a PyTorch file (.pt, .ckpt, .bin), which can run code when loaded; only safetensors files are \
             taken; get the model in that format",
        )
    } else if bytes.starts_with(b"version https://git-lfs") {
        Some("this is a git-lfs pointer and not the file itself; fetch it with `git lfs pull`")
    } else if bytes.trim_ascii_start().starts_with(b"<") {
        Some("this is a web page and not a model, probably an answer to a download without login; download it again")
    } else {
        None
    }
}
