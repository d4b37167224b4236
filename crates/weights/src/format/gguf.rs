//! The header of a GGUF file.
//!
//! The format: magic and version, counts, metadata (key, type, value), tensors (name, dimensions from the fastest, type,
//! offset), padding, the data. <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>. Our own reader, because
//! candle's panics on an alignment of zero and its errors name no tensor.

use std::collections::{BTreeMap, HashMap, hash_map};

use candle_core::quantized::GgmlDType;

use super::{Encoding, Entry, Header, check};

pub const MAGIC: &[u8; 4] = b"GGUF";

/// What tensors are aligned to where the metadata does not say.
pub const ALIGNMENT: usize = 32;

/// Lists of lists do not occur; a file that nests them deeply is no model.
const MAX_DEPTH: usize = 4;

/// ggml's own limit.
const MAX_AXES: u32 = 4;

const CUT_OFF: &str = "it ends inside of its header, or claims more than it has";

/// The block types that are read, by their numbers in the format and their names.
const BLOCKS: [(u32, GgmlDType, &str); 10] = [
    (2, GgmlDType::Q4_0, "Q4_0"),
    (3, GgmlDType::Q4_1, "Q4_1"),
    (6, GgmlDType::Q5_0, "Q5_0"),
    (7, GgmlDType::Q5_1, "Q5_1"),
    (8, GgmlDType::Q8_0, "Q8_0"),
    (10, GgmlDType::Q2K, "Q2_K"),
    (11, GgmlDType::Q3K, "Q3_K"),
    (12, GgmlDType::Q4K, "Q4_K"),
    (13, GgmlDType::Q5K, "Q5_K"),
    (14, GgmlDType::Q6K, "Q6_K"),
];

/// Types that files for FLUX.1 are known to have and that are not read, for the message.
const UNREAD: [(u32, &str); 14] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

/// The name of a type of blocks, as GGUF's tools have it.
pub fn block_name(kind: GgmlDType) -> &'static str {
    BLOCKS.iter().find(|(_, known, _)| *known == kind).map_or("blocks", |(_, _, name)| name)
}

/// The number of an encoding in the format; 8-bit floats have none.
pub fn type_number(encoding: &Encoding) -> Option<u32> {
    match encoding {
        Encoding::F32 => Some(0),
        Encoding::F16 => Some(1),
        Encoding::F64 => Some(28),
        Encoding::Bf16 => Some(30),
        Encoding::Blocks(kind) => BLOCKS.iter().find(|(_, known, _)| known == kind).map(|(number, ..)| *number),
        Encoding::Fp8(_) | Encoding::Other(_) => None,
    }
}

pub fn parse(file: &[u8]) -> Result<Header, String> {
    let mut rest = Rest(file);
    let cut_off = || CUT_OFF.to_string();
    rest.take(MAGIC.len()).ok_or_else(cut_off)?;
    let version = rest.u32().ok_or_else(cut_off)?;
    if !(2..=3).contains(&version) {
        return Err(format!("its version is {version}; 2 and 3 are read"));
    }
    let counts = rest.u64().zip(rest.u64());
    let (tensor_count, entry_count) = counts.ok_or_else(cut_off)?;
    let metadata = metadata(&mut rest, entry_count).ok_or_else(cut_off)?;
    let alignment = metadata.get("general.alignment").map_or(Ok(ALIGNMENT), |text| text.parse());
    let Some(alignment) = alignment.ok().filter(|alignment| alignment.is_power_of_two()) else {
        return Err("its alignment is no power of two".to_string());
    };
    let mut tensors = HashMap::new();
    // Counts are only claims: each round reads something, so the file's end is the limit.
    for _ in 0..tensor_count {
        let (name, entry) = tensor(&mut rest)?;
        match tensors.entry(name) {
            hash_map::Entry::Vacant(free) => free.insert(entry),
            hash_map::Entry::Occupied(taken) => return Err(format!("it has two tensors named `{}`", taken.key())),
        };
    }
    let header = file.len() - rest.0.len();
    let data_start = header.checked_next_multiple_of(alignment).unwrap_or(usize::MAX);
    for entry in tensors.values_mut() {
        // Where that leaves the range of numbers, it is beyond the file's end as well.
        entry.start = entry.start.saturating_add(data_start);
    }
    check(&tensors, file.len())?;
    Ok(Header { metadata, tensors })
}

fn metadata(rest: &mut Rest<'_>, count: u64) -> Option<BTreeMap<String, String>> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let (key, kind) = (rest.string()?, rest.u32()?);
        if let Some(value) = rest.value(kind, 0)? {
            metadata.insert(key, value);
        }
    }
    Some(metadata)
}

/// The next tensor, with the offset in the data as its start.
fn tensor(rest: &mut Rest<'_>) -> Result<(String, Entry), String> {
    let cut_off = || CUT_OFF.to_string();
    let name = rest.string().ok_or_else(cut_off)?;
    let axes = rest.u32().ok_or_else(cut_off)?;
    if axes > MAX_AXES {
        return Err(format!("tensor `{name}` has {axes} axes; at most {MAX_AXES} are read"));
    }
    let size = |_| rest.u64().map(|size| usize::try_from(size).unwrap_or(usize::MAX));
    let mut shape = (0..axes).map(size).collect::<Option<Vec<_>>>().ok_or_else(cut_off)?;
    shape.reverse(); // the file has the fastest axis first
    let (kind, offset) = rest.u32().zip(rest.u64()).ok_or_else(cut_off)?;
    let encoding = encoding(kind);
    let len = match (&encoding, encoding.bytes(&shape)) {
        (Encoding::Other(_), _) => 0,
        (_, Some(len)) => len,
        (_, None) => return Err(format!("tensor `{name}` of shape {shape:?} cannot be in {encoding}")),
    };
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    Ok((name, Entry { shape, encoding, start, len }))
}

fn encoding(kind: u32) -> Encoding {
    match kind {
        0 => Encoding::F32,
        1 => Encoding::F16,
        28 => Encoding::F64,
        30 => Encoding::Bf16,
        _ => match BLOCKS.iter().find(|(number, ..)| *number == kind) {
            Some((_, blocks, _)) => Encoding::Blocks(*blocks),
            None => {
                let name = UNREAD.iter().find(|(number, _)| *number == kind);
                Encoding::Other(name.map_or_else(|| format!("GGUF type {kind}"), |(_, name)| name.to_string()))
            }
        },
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
            // With an exponent where it is shorter: all digits of a tiny number are hundreds.
            6 => format!("{:?}", f32::from_le_bytes(self.array()?)),
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
            12 => format!("{:?}", f64::from_le_bytes(self.array()?)),
            _ => return None,
        };
        Some(Some(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(entries: &[u8], entry_count: u64, tensor_count: u64) -> Vec<u8> {
        let head = [MAGIC.as_slice(), &3_u32.to_le_bytes(), &tensor_count.to_le_bytes(), &entry_count.to_le_bytes()];
        [head.concat().as_slice(), entries].concat()
    }

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    fn tensor(name: &str, sizes: &[u64], kind: u32, offset: u64) -> Vec<u8> {
        let mut bytes = string(name);
        bytes.extend((sizes.len() as u32).to_le_bytes());
        bytes.extend(sizes.iter().flat_map(|size| size.to_le_bytes()));
        bytes.extend(kind.to_le_bytes());
        bytes.extend(offset.to_le_bytes());
        bytes
    }

    /// Two tensors of 64 bytes of data.
    fn two(first: &[u8], second: &[u8]) -> Result<Header, String> {
        let mut bytes = file(&[first, second].concat(), 0, 2);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT) + 64, 0);
        parse(&bytes)
    }

    #[test]
    fn shapes_are_turned_around_and_places_are_from_the_data_on() {
        let header = two(&tensor("a", &[4, 2], 0, 32), &tensor("b", &[32], 8, 0)).unwrap_err();
        assert!(header.contains("`a` overlaps"), "{header}");
        let header = two(&tensor("a", &[4, 2], 0, 0), &tensor("b", &[3], 23, 40)).unwrap();
        let (a, b) = (&header.tensors["a"], &header.tensors["b"]);
        assert_eq!((a.shape.as_slice(), a.len, b.start - a.start), ([2, 4].as_slice(), 32, 40));
        assert_eq!((&a.encoding, b.encoding.to_string()), (&Encoding::F32, "IQ4_XS".to_string()));
    }

    #[test]
    fn claims_beyond_the_file_are_refused() {
        assert!(parse(&file(&[], 0, 0)).is_ok());
        assert!(parse(&file(&[], u64::MAX, 0)).is_err());
        assert!(parse(&file(&[], 0, u64::MAX)).is_err());
        assert!(parse(&file(&u64::MAX.to_le_bytes(), 1, 0)).is_err());
        let list = [string("list"), 9_u32.to_le_bytes().into(), 0_u32.to_le_bytes().into(), vec![0xff; 8]].concat();
        assert!(parse(&file(&list, 1, 0)).is_err());
        let fits = tensor("a", &[8], 0, 0);
        for (second, words) in [
            (tensor("b", &[16], 0, 32), "truncated (tensor `b`"),
            (tensor("b", &[1], 0, u64::MAX), "truncated (tensor `b`"),
            (tensor("b", &[1 << 40, 1 << 40], 0, 32), "`b` of shape"),
            (tensor("b", &[u64::MAX], 1, 32), "`b` of shape"),
            (tensor("b", &[30], 8, 32), "`b` of shape [30] cannot be in Q8_0"),
            (tensor("b", &[1, 1, 1, 1, 1], 0, 32), "`b` has 5 axes"),
            (tensor("b", &[1], 0, 28), "`b` overlaps"),
            (tensor("a", &[1], 0, 32), "two tensors named `a`"),
        ] {
            let refusal = two(&fits, &second).unwrap_err();
            assert!(refusal.contains(words), "{refusal}");
        }
    }

    #[test]
    fn impossible_alignments_are_refused() {
        for alignment in [0_u32, 3, 48] {
            let entry =
                [string("general.alignment"), 4_u32.to_le_bytes().into(), alignment.to_le_bytes().into()].concat();
            assert!(parse(&file(&entry, 1, 0)).unwrap_err().contains("alignment"), "{alignment}");
        }
        assert!(
            parse(&[MAGIC.as_slice(), &1_u32.to_le_bytes(), &[0; 16]].concat()).unwrap_err().contains("version is 1")
        );
    }

    #[test]
    fn endless_nesting_is_refused() {
        let mut entry = string("list");
        entry.extend(9_u32.to_le_bytes());
        for _ in 0..1000 {
            entry.extend(9_u32.to_le_bytes());
            entry.extend(1_u64.to_le_bytes());
        }
        assert!(parse(&file(&entry, 1, 0)).is_err());
    }
}
