//! The header of a safetensors file.
//!
//! The format: 8 bytes of header length (little endian), a JSON object from tensor name to dtype, shape and offsets,
//! the data. <https://github.com/huggingface/safetensors#format>. The checks are our own because a header is what a
//! damaged or wrong file shows first, and the message should say which tensor is at fault.

use std::{
    collections::{BTreeMap, HashMap, hash_map},
    fmt,
};

use retouch_kernels::Fp8;
use safetensors::{Dtype, tensor::TensorInfo};
use serde::{
    Deserialize, Deserializer,
    de::{Error, MapAccess, Visitor},
};

use super::{Encoding, Entry, Header, check};

/// The reference implementation's limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The entry of the header that is no tensor.
const METADATA: &str = "__metadata__";

#[derive(Default)]
struct Json {
    metadata: BTreeMap<String, String>,
    tensors: HashMap<String, TensorInfo>,
}

/// Entry by entry: serde's own flattening would first hold all of the header in a form many times as large, and of two tensors
/// of the same name keep the second.
impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries)
    }
}

struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Json;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("an object with an entry for each tensor")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Json, M::Error> {
        let mut json = Json::default();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                json.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                continue;
            }
            match json.tensors.entry(name) {
                hash_map::Entry::Vacant(free) => free.insert(map.next_value()?),
                hash_map::Entry::Occupied(taken) => {
                    return Err(M::Error::custom(format!("it has two tensors named `{}`", taken.key())));
                }
            };
        }
        Ok(json)
    }
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
    check(&tensors, bytes.len())?;
    Ok(Header { metadata: json.metadata, tensors })
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
