//! The header of a safetensors file.
//!
//! The format: 8 bytes of header length (little endian), a JSON object from tensor name to dtype, shape and offsets,
//! the data. <https://github.com/huggingface/safetensors#format>. The checks are our own because a header is what a
//! damaged or wrong file shows first, and the message should say which tensor is at fault.

use std::collections::{BTreeMap, HashMap};

use retouch_kernels::Fp8;
use safetensors::{Dtype, tensor::TensorInfo};
use serde::Deserialize;

use super::{Encoding, Entry, Header, check_places};

/// The reference implementation's limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

#[derive(Deserialize)]
struct Json {
    #[serde(rename = "__metadata__", default)]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(flatten)]
    tensors: HashMap<String, TensorInfo>,
}

pub fn parse(bytes: &[u8]) -> Result<Header, String> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(format!("it has only {} bytes", bytes.len()));
    };
    let length = u64::from_le_bytes(*length);
    if length > rest.len() as u64 || length > MAX_HEADER_BYTES {
        return Err(format!("its header should have {length} bytes, the file has {}", bytes.len()));
    }
    let (json, data) = rest.split_at(length as usize);
    let json: Json = serde_json::from_slice(json).map_err(|e| format!("its header is damaged: {e}"))?;
    let data_start = bytes.len() - data.len();
    let tensors = json.tensors.into_iter().map(|(name, info)| {
        let entry = entry(&name, info, data_start, data.len())?;
        Ok((name, entry))
    });
    let tensors = tensors.collect::<Result<_, String>>()?;
    check_places(&tensors, bytes.len())?;
    Ok(Header { metadata: json.metadata.unwrap_or_default(), tensors })
}

fn entry(name: &str, info: TensorInfo, data_start: usize, data_len: usize) -> Result<Entry, String> {
    let TensorInfo { dtype, shape, data_offsets: (start, end) } = info;
    if end > data_len {
        return Err(format!("it is truncated (tensor `{name}` should end at data byte {end} of {data_len})"));
    }
    let bits = shape.iter().try_fold(dtype.bitsize(), |size, &dim| size.checked_mul(dim));
    let len = end.checked_sub(start);
    let (Some(len), true) = (len, len.is_some() && bits.map(|bits| bits.div_ceil(8)) == len) else {
        return Err(format!(
            "tensor `{name}` of shape {shape:?} and dtype {dtype} is at data bytes {start} to {end}, which do not fit it"
        ));
    };
    Ok(Entry { shape, encoding: encoding(dtype), start: data_start + start, len })
}

fn encoding(dtype: Dtype) -> Encoding {
    match dtype {
        Dtype::F64 => Encoding::F64,
        Dtype::F32 => Encoding::F32,
        Dtype::F16 => Encoding::F16,
        Dtype::BF16 => Encoding::Bf16,
        Dtype::F8_E4M3 => Encoding::Fp8(Fp8::E4m3),
        Dtype::F8_E5M2 => Encoding::Fp8(Fp8::E5m2),
        other => Encoding::Other(other.to_string()),
    }
}
