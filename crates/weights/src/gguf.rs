//! The header of a GGUF file, as far as it is worth telling.
//!
//! <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. candle's own reader panics on an alignment of zero.

use std::collections::BTreeMap;

/// What the header says.
pub struct GgufHeader {
    /// Single values; lists are left out.
    pub metadata: BTreeMap<String, String>,
    /// Type and number of elements of each tensor.
    pub tensors: Vec<(String, u64)>,
    /// Bytes of the header.
    pub bytes: usize,
}

/// Lists of lists do not occur; a file that nests them deeply is no model.
const MAX_DEPTH: usize = 4;

impl GgufHeader {
    /// `None` where the file is damaged, or of another version than 2 and 3.
    pub fn parse(file: &[u8]) -> Option<Self> {
        let mut rest = Rest(file);
        if rest.take(4)? != b"GGUF" || !(2..=3).contains(&rest.u32()?) {
            return None;
        }
        let (tensor_count, entry_count) = (rest.u64()?, rest.u64()?);
        let mut metadata = BTreeMap::new();
        // Counts are only claims: each round reads something, so the file's end is the limit.
        for _ in 0..entry_count {
            let (key, kind) = (rest.string()?, rest.u32()?);
            if let Some(value) = rest.value(kind, 0)? {
                metadata.insert(key, value);
            }
        }
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            let _name = rest.string()?;
            let mut elements = 1_u64;
            for _ in 0..rest.u32()? {
                elements = elements.saturating_mul(rest.u64()?);
            }
            tensors.push((type_name(rest.u32()?), elements));
            let _offset = rest.u64()?;
        }
        Some(Self { metadata, tensors, bytes: file.len() - rest.0.len() })
    }
}

/// What is not read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Option<String> {
        let length = usize::try_from(self.u64()?).ok()?;
        self.take(length).map(|text| String::from_utf8_lossy(text).into_owned())
    }

    /// The text of a value; `Some(None)` for a list, which is passed over.
    fn value(&mut self, kind: u32, depth: usize) -> Option<Option<String>> {
        let text = match kind {
            0 => u8::from_le_bytes(self.array()?).to_string(),
            1 => i8::from_le_bytes(self.array()?).to_string(),
            2 => u16::from_le_bytes(self.array()?).to_string(),
            3 => i16::from_le_bytes(self.array()?).to_string(),
            4 => self.u32()?.to_string(),
            5 => i32::from_le_bytes(self.array()?).to_string(),
            6 => f32::from_le_bytes(self.array()?).to_string(),
            7 => (self.array::<1>()? != [0]).to_string(),
            8 => self.string()?,
            9 => {
                let (kind, length) = (self.u32()?, self.u64()?);
                if depth == MAX_DEPTH {
                    return None;
                }
                for _ in 0..length {
                    self.value(kind, depth + 1)?;
                }
                return Some(None);
            }
            10 => self.u64()?.to_string(),
            11 => i64::from_le_bytes(self.array()?).to_string(),
            12 => f64::from_le_bytes(self.array()?).to_string(),
            _ => return None,
        };
        Some(Some(text))
    }
}

fn type_name(id: u32) -> String {
    let name = match id {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        30 => "BF16",
        other => return format!("type {other}"),
    };
    name.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(entries: &[u8], entry_count: u64, tensor_count: u64) -> Vec<u8> {
        let head = [b"GGUF".as_slice(), &3_u32.to_le_bytes(), &tensor_count.to_le_bytes(), &entry_count.to_le_bytes()];
        [head.concat().as_slice(), entries].concat()
    }

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn claims_beyond_the_file_are_refused() {
        assert!(GgufHeader::parse(&file(&[], 0, 0)).is_some());
        assert!(GgufHeader::parse(&file(&[], u64::MAX, 0)).is_none());
        assert!(GgufHeader::parse(&file(&[], 0, u64::MAX)).is_none());
        assert!(GgufHeader::parse(&file(&u64::MAX.to_le_bytes(), 1, 0)).is_none());
        let list = [string("list"), 9_u32.to_le_bytes().into(), 0_u32.to_le_bytes().into(), vec![0xff; 8]].concat();
        assert!(GgufHeader::parse(&file(&list, 1, 0)).is_none());
    }

    #[test]
    fn an_alignment_of_zero_is_no_trouble() {
        let entry = [string("general.alignment"), 4_u32.to_le_bytes().into(), vec![0; 4]].concat();
        let header = GgufHeader::parse(&file(&entry, 1, 0)).unwrap();
        assert_eq!(header.metadata["general.alignment"], "0");
    }

    #[test]
    fn endless_nesting_is_refused() {
        let mut entry = string("list");
        entry.extend(9_u32.to_le_bytes());
        for _ in 0..1000 {
            entry.extend(9_u32.to_le_bytes());
            entry.extend(1_u64.to_le_bytes());
        }
        assert!(GgufHeader::parse(&file(&entry, 1, 0)).is_none());
    }
}
