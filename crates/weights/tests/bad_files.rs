//! Damaged and wrong files: one clear sentence each, no panic, and no memory for what a header merely claims.

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device, Tensor};
use retouch_weights::{
    Component, Folder, ModelFile, Pipeline, Store, Weights, WeightsError, detect,
    naming::{Naming, Recipe, SameNames, flux},
};
use tempfile::TempDir;

/// A safetensors file of this header and so many bytes of data.
fn file(header: &str, data: usize) -> Vec<u8> {
    let length = (header.len() as u64).to_le_bytes();
    [length.as_slice(), header.as_bytes(), &vec![0; data]].concat()
}

fn open(bytes: impl AsRef<[u8]>) -> Result<Store, WeightsError> {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("weights.safetensors");
    std::fs::write(&path, bytes).unwrap();
    Store::open(vec![ModelFile::open(&path)?])
}

/// The sentence with which something is refused.
fn sentence<T>(refused: Result<T, WeightsError>) -> String {
    let error = refused.err().expect("it was not refused").to_string();
    assert!(!error.contains('\n') && error.chars().count() < 400, "{error}");
    error
}

fn refusal(bytes: impl AsRef<[u8]>) -> String {
    let sentence = sentence(open(bytes));
    assert!(sentence.contains("weights.safetensors"), "{sentence}");
    sentence
}

/// A store of zeros with these names, shapes and dtypes.
fn store(tensors: &[(&str, &[usize], DType)]) -> Store {
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    let tensors: HashMap<String, Tensor> =
        tensors.iter().map(|(name, shape, dtype)| (name.to_string(), zeros(shape, *dtype))).collect();
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("weights.safetensors");
    candle_core::safetensors::save(&tensors, &path).unwrap();
    Store::open(vec![ModelFile::open(&path).unwrap()]).unwrap()
}

fn weights(tensors: &[(&str, &[usize], DType)], naming: impl Naming + 'static) -> Weights {
    Weights::new(store(tensors), naming, DType::F32, &Device::Cpu)
}

#[test]
fn a_whole_file_is_read() {
    let store = open(file(r#"{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#, 24)).unwrap();
    assert_eq!(store.tensor("a", DType::F32, &Device::Cpu).unwrap().dims(), [2, 3]);
    assert!(open(file(r#"{"__metadata__":{"format":"pt"}}"#, 0)).unwrap().names().next().is_none());
}

#[test]
fn damaged_headers_are_refused() {
    assert!(refusal([]).contains("only 0 bytes"));
    assert!(refusal([1, 2, 3]).contains("only 3 bytes"));
    for length in [100, 1 << 40, u64::MAX] {
        let message = refusal([length.to_le_bytes().as_slice(), b"{}"].concat());
        assert!(message.contains(&format!("{length} bytes")) && message.contains("download it again"), "{message}");
    }
    for header in ["", "{", "[]", "null", "\u{0}", r#"{"a":1}"#, r#"{"a":{"dtype":"F32","shape":[1]}}"#] {
        assert!(refusal(file(header, 8)).contains("header is damaged"), "{header}");
    }
    let negative = r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#;
    assert!(refusal(file(negative, 4)).contains("header is damaged"));
    assert!(refusal(file(&format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)), 0)).contains("damaged"));
    let unknown = r#"{"a":{"dtype":"F3","shape":[1],"data_offsets":[0,4]}}"#;
    assert!(refusal(file(unknown, 4)).contains("F3"));
}

#[test]
fn tensors_outside_of_the_file_or_over_each_other_are_refused() {
    let tensor = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let truncated = refusal(file(&format!("{{\"a\":{}}}", tensor("[4]", 0, 16)), 15));
    assert!(truncated.contains("truncated") && truncated.contains("`a`"), "{truncated}");
    let header = format!("{{\"a\":{},\"b\":{}}}", tensor("[4]", 0, 16), tensor("[4]", 8, 24));
    assert!(refusal(file(&header, 24)).contains("`b` overlaps"));
    let backwards = refusal(file(&format!("{{\"a\":{}}}", tensor("[4]", 16, 0)), 16));
    assert!(backwards.contains("`a`"), "{backwards}");
    let misfit = refusal(file(&format!("{{\"a\":{}}}", tensor("[5]", 0, 16)), 16));
    assert!(misfit.contains("`a` of shape [5]"), "{misfit}");
    // Products and sums that leave the range of numbers.
    for (shape, end) in [("[4294967296,4294967296,16]", 0), ("[1152921504606846975]", u64::MAX), ("[0]", u64::MAX)] {
        let header = format!("{{\"a\":{}}}", tensor(shape, 0, end));
        assert!(refusal(file(&header, 0)).contains("`a`"), "{shape}");
    }
}

#[test]
fn every_truncation_of_a_file_is_refused() {
    let whole = file(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 8);
    for length in 0..whole.len() {
        refusal(&whole[..length]);
    }
}

/// Whatever is in a file: a sentence, or tensors as large as their bytes; no panic.
#[test]
fn no_change_of_a_byte_does_more_than_a_sentence() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("weights");
    let (mut refused, mut read) = (0, 0);
    let mut attempt = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        let store = match Store::open(vec![ModelFile::open(&path).unwrap()]) {
            Ok(store) => store,
            Err(error) => {
                sentence::<()>(Err(error));
                refused += 1;
                return;
            }
        };
        detect(&store);
        for name in store.names() {
            let shape = store.shape(name).unwrap();
            match store.tensor(name, DType::F32, &Device::Cpu) {
                Ok(tensor) => assert_eq!(tensor.dims(), shape),
                Err(error) => assert!(!error.to_string().is_empty()),
            }
            let _ = store.packed(name, DType::F32, &Device::Cpu);
            read += 1;
        }
    };
    for (file, header) in [("quantised/blocks.gguf", 900), ("quantised/fp8.safetensors", 1700)] {
        let whole =
            std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(file)).unwrap();
        for length in (0..header).chain([whole.len() - 1]) {
            attempt(&whole[..length]);
        }
        for place in 0..header {
            for flip in [0x01, 0x90] {
                let mut bytes = whole.clone();
                bytes[place] ^= flip;
                attempt(&bytes);
            }
        }
    }
    assert!(refused > 3000 && read > 10_000, "{refused} refused, {read} read");
}

#[test]
fn other_formats_are_named() {
    for (start, name) in [
        (b"GGUF\x03\0\0\0aaaaaaaaaaaaaaaa".as_slice(), "not a usable GGUF file: it ends"),
        (b"PK\x03\x04aaaaaaaaaaaaaaa", "PyTorch"),
        (b"\x80\x02}q\0aaaaaaaaaaaaaaa", "PyTorch"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
        (b"\n<!DOCTYPE html><html>", "web page"),
    ] {
        let message = refusal(start);
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn folders_and_absent_files_are_no_files() {
    let folder = TempDir::new().unwrap();
    assert!(sentence(ModelFile::open(folder.path())).contains("a folder"));
    assert!(sentence(ModelFile::open(folder.path().join("absent"))).contains("absent"));
    let nothing = Component::Vae.in_folder(&Folder::on_disk(folder.path()), DType::F32, &Device::Cpu);
    assert!(sentence(nothing).contains("diffusion_pytorch_model.safetensors"));
}

#[test]
fn an_index_must_name_files_beside_it() {
    let folder = TempDir::new().unwrap();
    let index = |content: &str| {
        std::fs::write(folder.path().join("model.safetensors.index.json"), content).unwrap();
        sentence(Store::open_component(&Folder::on_disk(folder.path()), "model"))
    };
    let absent = index(r#"{"weight_map":{"a":"model-00001-of-00001.safetensors"}}"#);
    assert!(absent.contains("index") && absent.contains("`model-00001-of-00001.safetensors`"), "{absent}");
    for outside in ["../secret", "/etc/passwd", "..\\\\secret", "..", ""] {
        let message = index(&format!(r#"{{"weight_map":{{"a":"{outside}"}}}}"#));
        assert!(message.contains("shard"), "{message}");
    }
    for broken in ["", "{}", "[]", r#"{"weight_map":{}}"#] {
        assert!(index(broken).contains("model.safetensors.index.json"), "{broken}");
    }
}

#[test]
fn tensors_are_checked_when_asked_for() {
    let tensors: &[(&str, &[usize], DType)] = &[("a.weight", &[4, 2], DType::F32), ("ids", &[3], DType::I64)];
    let weights = weights(tensors, SameNames);
    let missing = sentence(weights.pp("a").get(4, "bias"));
    assert!(missing.contains("`a.bias` is missing"), "{missing}");
    let wrong = sentence(weights.pp("a").get((2, 4), "weight"));
    assert!(wrong.contains("`a.weight` has shape [4, 2], expected [2, 4]"), "{wrong}");
    assert!(sentence(weights.get(3, "ids")).contains("`ids` is in I64"));
    assert!(weights.get((4, 2), "a.weight").is_ok());
    assert!(!weights.has("a.bias") && weights.shape("a.bias").is_none());
}

#[test]
fn fused_parameters_need_all_their_parts_to_fit() {
    let name = "double_blocks.0.img_attn.qkv.weight";
    let [q, k, v] = ["q", "k", "v"].map(|c| format!("transformer_blocks.0.attn.to_{c}.weight"));
    let with = |q_shape: &[usize], v_shape: Option<&[usize]>| {
        let mut tensors: Vec<(&str, &[usize], DType)> = vec![(&q, q_shape, DType::F32), (&k, &[4, 4], DType::F32)];
        tensors.extend(v_shape.map(|shape| (v.as_str(), shape, DType::F32)));
        weights(&tensors, flux::Diffusers)
    };
    assert_eq!(with(&[4, 4], Some(&[4, 4])).get((12, 4), name).unwrap().dims(), [12, 4]);
    assert!(sentence(with(&[4, 4], None).get((12, 4), name)).contains(&format!("`{v}` is missing")));
    let narrow = sentence(with(&[4, 4], Some(&[4, 3])).get((12, 4), name));
    assert!(narrow.contains(&v) && narrow.contains("[4, 3]"), "{narrow}");
    let short = sentence(with(&[3, 4], Some(&[4, 4])).get((12, 4), name));
    assert!(short.contains("[11, 4]") && short.contains("[12, 4]"), "{short}");
    // A scalar has no rows to stack.
    assert!(sentence(with(&[], Some(&[4, 4])).get((12, 4), name)).contains(&q));
}

#[test]
fn halves_are_swapped_only_where_there_are_two() {
    struct Swapped;
    impl Naming for Swapped {
        fn recipe(&self, name: &str) -> Recipe {
            Recipe::SwappedHalves(name.to_string())
        }
    }
    let weights = weights(&[("even", &[4], DType::F32), ("odd", &[3], DType::F32), ("none", &[], DType::F32)], Swapped);
    assert!(weights.get(4, "even").is_ok());
    assert!(sentence(weights.get(3, "odd")).contains("`odd`"));
    assert!(sentence(weights.get((), "none")).contains("`none`"));
}

#[test]
fn swapped_halves_change_places() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("w");
    let halves = Tensor::new(&[1_f32, 2., 3., 4.], &Device::Cpu).unwrap();
    candle_core::safetensors::save(&HashMap::from([("norm_out.linear.bias", halves)]), &path).unwrap();
    let store = Store::open(vec![ModelFile::open(&path).unwrap()]).unwrap();
    let weights = Weights::new(store, flux::Diffusers, DType::F32, &Device::Cpu);
    let bias = weights.get(4, "final_layer.adaLN_modulation.1.bias").unwrap();
    assert_eq!(bias.to_vec1::<f32>().unwrap(), [3., 4., 1., 2.]);
}

#[test]
fn values_are_the_same_by_every_way_of_conversion() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("w");
    let values: Vec<f32> = (0..200_000).map(|i| (i as f32 - 1e5) * 0.37e-3).collect();
    let exact = Tensor::new(values, &Device::Cpu).unwrap();
    for stored in [DType::BF16, DType::F16, DType::F32, DType::F64] {
        let kept = exact.to_dtype(stored).unwrap();
        candle_core::safetensors::save(&HashMap::from([("a", kept.clone())]), &path).unwrap();
        let store = Store::open(vec![ModelFile::open(&path).unwrap()]).unwrap();
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let read = store.tensor("a", dtype, &Device::Cpu).unwrap();
            assert_eq!(read.dtype(), dtype);
            let bits = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(bits(&read), bits(&kept.to_dtype(dtype).unwrap()), "{stored:?} to {dtype:?}");
        }
    }
}

#[test]
fn files_of_other_models_are_named() {
    let vae = |tensors: &[(&str, &[usize], DType)]| {
        sentence(Component::Vae.in_store(store(tensors), DType::F32, &Device::Cpu))
    };
    let lora = vae(&[("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", &[2, 2], DType::F32)]);
    assert!(lora.contains("holds a LoRA, not a VAE"), "{lora}");
    let unet = vae(&[("model.diffusion_model.input_blocks.0.0.weight", &[2, 2, 1, 1], DType::F32)]);
    assert!(unet.contains("a Stable Diffusion UNet, not a VAE"), "{unet}");
    assert!(vae(&[("x", &[1], DType::F32)]).contains("model of an unknown kind"));
    let flux2 = store(&[
        ("double_blocks.0.img_attn.qkv.weight", &[2, 2], DType::F32),
        ("double_stream_modulation_img.lin.weight", &[2, 2], DType::F32),
    ]);
    let flux2 = sentence(Component::Transformer.in_store(flux2, DType::F32, &Device::Cpu));
    assert!(flux2.contains("FLUX.2"), "{flux2}");
    let other_vae = vae(&[
        ("decoder.up.0.block.0.conv1.weight", &[2, 2, 3, 3], DType::F32),
        ("quant_conv.weight", &[2, 2, 1, 1], DType::F32),
    ]);
    assert!(other_vae.contains("quant_conv"), "{other_vae}");
}

#[test]
fn folders_of_other_architectures_are_named() {
    let folder = TempDir::new().unwrap();
    let pipeline = || sentence(Pipeline::of(&Folder::on_disk(folder.path())));
    assert!(pipeline().contains("no model_index.json"));
    let write = |content: &str| std::fs::write(Path::new(folder.path()).join("model_index.json"), content).unwrap();
    write(r#"{"_class_name":"StableDiffusion3Pipeline"}"#);
    assert!(pipeline().contains("StableDiffusion3Pipeline, which is not supported; FluxKontextPipeline"));
    write("{}");
    assert!(pipeline().contains("_class_name"));
}
