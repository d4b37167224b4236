//! Files that were made to do harm, one trick each. `fuzz` looks for more of them; what it found in other readers is in
//! `tests/fixtures/hostile`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use retouch_weights::{Folder, LoraFile, ModelFile, Pipeline, Store, WeightsError};
use tempfile::TempDir;

/// A safetensors file of this header and so many bytes of data.
fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &vec![0; data]].concat()
}

fn entry(name: &str, dtype: &str, shape: &str, end: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[0,{end}]}}"#)
}

/// A GGUF file of one tensor.
fn gguf(name: &str, sizes: &[u64], kind: u32) -> Vec<u8> {
    let mut bytes = [b"GGUF\x03\0\0\0".as_slice(), &1_u64.to_le_bytes(), &[0; 8]].concat();
    bytes.extend((name.len() as u64).to_le_bytes());
    bytes.extend(name.as_bytes());
    bytes.extend((sizes.len() as u32).to_le_bytes());
    bytes.extend(sizes.iter().flat_map(|size| size.to_le_bytes()));
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0; 8 + 32]);
    bytes
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    }
}

fn open(path: &Path) -> Result<Store, WeightsError> {
    Store::open(vec![ModelFile::open(path)?])
}

/// The sentence with which something is refused.
fn sentence<T>(refused: Result<T, WeightsError>) -> String {
    let error = refused.err().expect("it was not refused").to_string();
    assert!(!error.contains(char::is_control) && error.chars().count() < 1000, "{error}");
    error
}

#[test]
fn sizes_whose_product_leaves_the_range_of_numbers_are_refused_even_without_values() {
    let place = Place::new();
    // The product is 0 as long as the first factor is.
    let huge = "[0,1099511627776,1099511627776]";
    for (name, file) in [
        ("no values", safetensors(&format!("{{{}}}", entry("a", "F32", huge, 0)), 0)),
        ("bits", safetensors(&format!("{{{}}}", entry("a", "F32", "[0,9223372036854775808]", 0)), 0)),
        ("axes", safetensors(&format!("{{{}}}", entry("a", "U8", &format!("[{}1]", "1,".repeat(1000)), 1)), 1)),
        ("GGUF", gguf("a", &[1 << 63, 0], 0)),
        ("a type of unknown size", gguf("a", &[1 << 62, 1 << 62], 23)),
    ] {
        assert!(sentence(open(&place.write(name, file))).contains("tensor `a`"), "{name}");
    }
}

#[test]
fn names_that_no_tensor_has_are_refused_in_a_line() {
    let place = Place::new();
    for name in ["x".repeat(100_000), "\\u001b[31m".to_string(), "\\n".to_string()] {
        let file = safetensors(&format!("{{{}}}", entry(&name, "U8", "[0]", 0)), 0);
        assert!(sentence(open(&place.write("names", file))).contains("no tensor has the name"));
    }
    let bomb = "x".repeat(100_000);
    assert!(sentence(open(&place.write("names", gguf(&bomb, &[0], 0)))).contains("no tensor has the name"));
    let dtype = safetensors(&format!("{{{}}}", entry("a", &bomb, "[0]", 0)), 0);
    assert!(sentence(open(&place.write("dtype", dtype))).contains("header is damaged"));
}

#[test]
fn the_second_of_two_tensors_of_one_name_does_not_count() {
    let place = Place::new();
    let (first, second) = (entry("a", "F32", "[1]", 4), entry("a", "F32", "[0]", 0));
    let file = safetensors(&format!("{{{first},{second}}}"), 4);
    assert!(sentence(open(&place.write("twice", file))).contains("two tensors named `a`"));
}

#[test]
fn deep_and_long_json_is_refused_wherever_it_is_read() {
    let place = Place::new();
    let folder = Folder::on_disk(place.0.path());
    for json in ["[".repeat(200_000), "{\"a\":".repeat(200_000), format!("\"{}\"", "\\u001b".repeat(50_000))] {
        place.write("model.safetensors.index.json", &json);
        sentence(Store::open_component(&folder, "model"));
        place.write("model_index.json", &json);
        sentence(Pipeline::of(&folder));
        let metadata =
            format!(r#""__metadata__":{{"lora_adapter_metadata":{}}}"#, serde_json::to_string(&json).unwrap());
        let lora = safetensors(&format!("{{{metadata},{}}}", entry("img_in.alpha", "F32", "[]", 4)), 4);
        assert!(sentence(LoraFile::open(&place.write("lora", lora))).contains("lora_adapter_metadata"));
    }
    // A class or a shard is quoted, but not all of it.
    let bomb = "x".repeat(1 << 20);
    place.write("model_index.json", format!(r#"{{"_class_name":"{bomb}"}}"#));
    assert!(sentence(Pipeline::of(&folder)).contains("xxx"));
    place.write("model.safetensors.index.json", format!(r#"{{"weight_map":{{"a":"{bomb}"}}}}"#));
    assert!(sentence(Store::open_component(&folder, "model")).contains("xxx"));
}

#[test]
fn numbers_of_other_types_are_no_scales() {
    let place = Place::new();
    let lora = |alpha: &str| {
        let parts = [("img_in.lora_A.weight", "[1,64]", 0, 256), ("img_in.lora_B.weight", "[64,1]", 256, 512)];
        let parts = parts.map(|(name, shape, start, end)| {
            format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
        });
        let file = safetensors(&format!("{{{},\"img_in.alpha\":{alpha}}}", parts.join(",")), 520);
        LoraFile::open(&place.write("lora", file))
    };
    assert!(lora(r#"{"dtype":"F32","shape":[],"data_offsets":[512,516]}"#).is_ok());
    for (alpha, words) in [
        (r#"{"dtype":"I64","shape":[],"data_offsets":[512,520]}"#, "I64"),
        (r#"{"dtype":"F32","shape":[0],"data_offsets":[512,512]}"#, "not one number"),
        (r#"{"dtype":"F32","shape":[2],"data_offsets":[512,520]}"#, "not one number"),
    ] {
        let refused = sentence(lora(alpha));
        assert!(refused.contains(words), "{refused}");
    }
}
