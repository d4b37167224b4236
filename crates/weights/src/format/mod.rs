//! The file formats: what a header says of each tensor, checked against the file before anything is read.

mod decode;
mod encode;
mod gguf;
mod safetensors;

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
};

use candle_core::quantized::GgmlDType;
use retouch_kernels::Fp8;

use crate::{ModelFile, Result, WeightsError};

pub use decode::{decode, part};
pub use encode::encode;
pub use gguf::{ALIGNMENT, MAGIC, block_name, type_number};

/// How a tensor's values are written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Encoding {
    F64,
    F32,
    F16,
    Bf16,
    Fp8(Fp8),
    /// Blocks of GGUF along the last axis.
    Blocks(GgmlDType),
    /// One that is not read, by its name in the format.
    Other(String),
}

impl Encoding {
    /// Bytes of a tensor of this shape.
    ///
    /// `None` where that is not known, leaves the range of numbers, or rows are no whole blocks.
    pub fn bytes(&self, shape: &[usize]) -> Option<usize> {
        let (per_block, block_bytes) = match self {
            Self::F64 => (1, 8),
            Self::F32 => (1, 4),
            Self::F16 | Self::Bf16 => (1, 2),
            Self::Fp8(_) => (1, 1),
            Self::Blocks(kind) => (kind.block_size(), kind.type_size()),
            Self::Other(_) => return None,
        };
        let elements = shape.iter().try_fold(1_usize, |n, &dim| n.checked_mul(dim))?;
        let whole = shape.last().copied().unwrap_or(1).is_multiple_of(per_block);
        if whole { (elements / per_block).checked_mul(block_bytes) } else { None }
    }
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Fp8(Fp8::E4m3) => "F8_E4M3",
            Self::Fp8(Fp8::E5m2) => "F8_E5M2",
            Self::Blocks(kind) => block_name(*kind),
            Self::Other(name) => name,
        })
    }
}

/// A tensor as the header has it.
#[derive(Debug, Clone)]
pub struct Entry {
    pub shape: Vec<usize>,
    pub encoding: Encoding,
    /// Offset of its first byte in the file.
    pub start: usize,
    /// Its bytes; none are counted where the encoding's size is not known.
    pub len: usize,
}

/// What a file's header says.
#[derive(Debug, Default)]
pub struct Header {
    /// Single values that its writer noted; lists are left out.
    pub metadata: BTreeMap<String, String>,
    pub tensors: HashMap<String, Entry>,
}

impl Header {
    /// Reads and checks the header: every tensor's bytes are inside of the file, fit its shape and overlap no other's.
    pub fn read(file: &ModelFile) -> Result<Self> {
        let (format, parsed) = if is_gguf(file) {
            ("GGUF", gguf::parse(&file.bytes))
        } else {
            ("safetensors", safetensors::parse(&file.bytes))
        };
        parsed.map_err(|reason| match recognise_other(&file.bytes) {
            Some(what) => WeightsError::Unsupported { what: file.name.clone(), reason: what.to_string() },
            None => WeightsError::BadFile { file: file.name.clone(), format, reason },
        })
    }
}

pub fn is_gguf(file: &ModelFile) -> bool {
    file.bytes.starts_with(MAGIC)
}

/// The longest name of a tensor, in bytes, and the most axes: several times what any model has.
const MAX_NAME: usize = 1024;
const MAX_AXES: usize = 8;

/// The most values of a tensor: their bytes and strides can be counted, whatever they are converted to.
const MAX_VALUES: usize = 1 << 48;

/// Refuses names and shapes that no tensor has, and tensors that reach beyond the file's end or into each other.
fn check(tensors: &HashMap<String, Entry>, file_len: usize) -> std::result::Result<(), String> {
    for (name, Entry { shape, .. }) in tensors {
        if name.len() > MAX_NAME || name.contains(char::is_control) {
            return Err(format!("no tensor has the name `{name}`"));
        }
        // One of no values, or in an encoding of unknown size, is not bounded by its bytes.
        let values = shape.iter().try_fold(1_usize, |n, &size| n.checked_mul(size.max(1)));
        if shape.len() > MAX_AXES || values.is_none_or(|values| values > MAX_VALUES) {
            return Err(format!("tensor `{name}` has the shape {shape:?}, which no tensor has"));
        }
    }
    check_places(tensors, file_len)
}

fn check_places(tensors: &HashMap<String, Entry>, file_len: usize) -> std::result::Result<(), String> {
    let mut in_order: Vec<_> = tensors.iter().collect();
    in_order.sort_by_key(|(_, entry)| (entry.start, entry.len));
    let mut end_before = 0;
    for (name, Entry { start, len, .. }) in in_order {
        match start.checked_add(*len) {
            Some(end) if end <= file_len => {
                if *start < end_before {
                    return Err(format!("tensor `{name}` overlaps another"));
                }
                end_before = end;
            }
            _ => return Err(format!("it is truncated (tensor `{name}` reaches beyond its {file_len} bytes)")),
        }
    }
    Ok(())
}

/// What a file is that is in neither format, from its first bytes, with what to do instead.
fn recognise_other(bytes: &[u8]) -> Option<&'static str> {
    if bytes.starts_with(b"PK\x03\x04") || bytes.starts_with(b"\x80\x02") {
        Some(
            "this is a PyTorch file (.pt, .ckpt, .bin), which can run code when loaded; only safetensors and GGUF files \
             are taken; get the model in such a format",
        )
    } else if bytes.starts_with(b"version https://git-lfs") {
        Some("this is a git-lfs pointer and not the file itself; fetch it with `git lfs pull`")
    } else if bytes.trim_ascii_start().starts_with(b"<") {
        Some("this is a web page and not a model, probably an answer to a download without login; download it again")
    } else {
        None
    }
}
