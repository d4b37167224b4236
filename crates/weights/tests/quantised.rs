//! Weights in few bits, from files that other tools' libraries wrote.

use std::{collections::HashMap, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use retouch_kernels::{Activation, Packed, for_device};
use retouch_weights::{Component, FluxShape, Folder, Matrix, ModelFile, Store, T5Shape, Weights};

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(path)
}

fn store(path: &str) -> Store {
    Store::open(vec![ModelFile::open(fixture(path)).unwrap()]).unwrap()
}

fn bits(x: &Tensor) -> Vec<u32> {
    x.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Rows of the identity through a layer of this weight: its values, by the kernels that edits run.
fn through_the_layer(store: &Store, name: &str) -> Tensor {
    let part = store.packed(name, DType::F32, &Device::Cpu).unwrap().expect("it is in few bits");
    let packed = Packed::stack(vec![part]).unwrap();
    let one = Tensor::eye(packed.columns(), DType::F32, &Device::Cpu).unwrap();
    let y = for_device(&Device::Cpu).linear_packed(&one, &packed, None, Activation::None).unwrap();
    y.t().unwrap().contiguous().unwrap()
}

#[test]
fn blocks_have_the_values_of_the_gguf_package_bit_for_bit() {
    let store = store("quantised/blocks.gguf");
    let expected = candle_core::safetensors::load(fixture("quantised/blocks.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(store.names().count(), 13);
    for (name, expected) in expected {
        let found = store.tensor(&name, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(found.dims(), expected.dims());
        assert!(bits(&found) == bits(&expected), "{name}");
        assert!(bits(&store.rows(&name, 1..2).unwrap()) == bits(&expected.narrow(0, 1, 1).unwrap()), "a row of {name}");
        if name != "F32" {
            // Adding up zeros turns a negative zero into zero.
            let found = through_the_layer(&store, &name).to_vec2::<f32>().unwrap();
            assert!(found == expected.to_vec2::<f32>().unwrap(), "{name} through a layer");
        }
    }
}

#[test]
fn eight_bit_floats_have_torchs_values_times_their_scale() {
    let store = store("quantised/fp8.safetensors");
    let layers =
        ["", ".scale_weight", ".weight_scale"].map(|scale| ["e4m3", "e5m2"].map(|format| format!("{format}{scale}")));
    for layer in layers.as_flattened() {
        let expected = store.tensor(&format!("{layer}.values"), DType::F32, &Device::Cpu).unwrap();
        let name = format!("{layer}.weight");
        assert!(bits(&store.tensor(&name, DType::F32, &Device::Cpu).unwrap()) == bits(&expected), "{layer}");
        assert_eq!(through_the_layer(&store, &name).to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
    }
}

/// A file with these tensors, by candle's writer.
fn written(tensors: &[(&str, Tensor)]) -> Store {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w");
    let tensors: HashMap<&str, Tensor> = tensors.iter().cloned().collect();
    candle_core::safetensors::save(&tensors, &path).unwrap();
    Store::open(vec![ModelFile::open(path).unwrap()]).unwrap()
}

#[test]
fn a_scale_counts_whatever_it_stands_beside_and_must_be_one_number() {
    let ones = Tensor::ones((2, 4), DType::BF16, &Device::Cpu).unwrap();
    let scale = |n: usize| Tensor::full(0.5f32, n, &Device::Cpu).unwrap();
    let store = written(&[("a.weight", ones.clone()), ("a.scale_weight", scale(1)), ("a.bias", ones.clone())]);
    let sum = |name: &str| store.tensor(name, DType::F32, &Device::Cpu).unwrap().sum_all().unwrap().to_scalar::<f32>();
    assert_eq!((sum("a.weight").unwrap(), sum("a.bias").unwrap()), (4.0, 8.0));
    // Its values are no longer those of the file.
    assert!(store.packed("a.weight", DType::F32, &Device::Cpu).unwrap().is_none());
    let store = written(&[("a.weight", ones), ("a.weight_scale", scale(2))]);
    let refusal = store.tensor("a.weight", DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(refusal.contains("`a.weight_scale` of shape [2]"), "{refusal}");
}

/// The largest error of the parameters `names`, relative to their root mean square, root mean square over each.
fn error<'a>(exact: &Weights, found: &Weights, names: impl Iterator<Item = &'a str>) -> f64 {
    let rms = |x: &Tensor| {
        f64::from(x.sqr().unwrap().mean_all().unwrap().to_dtype(DType::F32).unwrap().to_scalar::<f32>().unwrap()).sqrt()
    };
    let mut largest = 0_f64;
    for name in names {
        let shape = exact.shape(name).unwrap_or_else(|| panic!("{name} is missing"));
        let (exact, found) = (exact.get(shape.clone(), name).unwrap(), found.get(shape, name).unwrap());
        largest = largest.max(rms(&(&exact - found).unwrap()) / rms(&exact));
    }
    largest
}

#[test]
fn a_transformer_of_stable_diffusion_cpp_is_the_one_that_it_was_made_from() {
    let open = |path: &str| Component::Transformer.in_file(&fixture(path), DType::F32, &Device::Cpu).unwrap();
    let (exact, found) = (open("tiny-kontext/flux1-kontext-dev.safetensors"), open("quantised/flux-q4_0.gguf"));
    let shape = FluxShape::of(&found).unwrap();
    assert_eq!(shape, FluxShape { double_blocks: 1, single_blocks: 1, ..FluxShape::of(&exact).unwrap() });
    let names: Vec<String> = found.store().names().map(|name| name.replace("model.diffusion_model.", "")).collect();
    let matrices = names.iter().filter(|name| exact.shape(name).is_some_and(|shape| shape.len() == 2));
    // Q4_0 rounds to steps of an eighth of a block's largest value, mostly 2 to 2.5 standard deviations: uniformly
    // distributed errors of 0.25 to 0.31 / sqrt(12) of one.
    let distance = error(&exact, &found, matrices.clone().map(String::as_str));
    assert!((0.07..0.1).contains(&distance), "{distance}");
    let vectors = names.iter().filter(|name| exact.shape(name).is_some_and(|shape| shape.len() == 1));
    assert_eq!(error(&exact, &found, vectors.map(String::as_str)), 0.0);
    for name in matrices {
        let [out, input] = exact.shape(name).unwrap()[..] else { unreachable!() };
        let Matrix::Packed(packed) = found.matrix((out, input), name).unwrap() else { panic!("{name} was widened") };
        assert_eq!(packed.bytes(), out * input * 18 / 32);
    }
}

#[test]
fn a_t5_encoder_of_llama_cpp_is_the_one_that_it_was_made_from() {
    let exact = Component::T5.in_folder(&Folder::on_disk(fixture("tiny-kontext")), DType::F32, &Device::Cpu).unwrap();
    let found = Component::T5.in_file(&fixture("quantised/t5-q8_0.gguf"), DType::F32, &Device::Cpu).unwrap();
    assert_eq!(T5Shape::of(&found).unwrap(), T5Shape::of(&exact).unwrap());
    let names: Vec<&str> = exact.store().names().filter(|name| *name != "encoder.embed_tokens.weight").collect();
    // Q8_0: steps of 1/127 of a block's largest value, at most 4 standard deviations: 4 / 127 / sqrt(12) = 0.009.
    let distance = error(&exact, &found, names.iter().copied());
    assert!((0.001..0.009).contains(&distance), "{distance}");
    let norms = names.iter().filter(|name| name.contains("norm"));
    assert_eq!(error(&exact, &found, norms.copied()), 0.0);
}

#[test]
fn types_that_are_not_read_are_named() {
    let mut bytes = std::fs::read(fixture("quantised/blocks.gguf")).unwrap();
    let name = b"Q4_0";
    let at = bytes.windows(4).position(|four| four == name).unwrap();
    // After the name: the number of axes, two sizes, the type.
    bytes[at + 4 + 4 + 16] = 23;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("iq4.gguf");
    std::fs::write(&path, bytes).unwrap();
    let store = Store::open(vec![ModelFile::open(path).unwrap()]).unwrap();
    let refusal = store.tensor("Q4_0", DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(refusal.contains("iq4.gguf: tensor `Q4_0` is in IQ4_XS, which is not supported; take"), "{refusal}");
    assert!(store.tensor("Q8_0", DType::F32, &Device::Cpu).is_ok());
}
