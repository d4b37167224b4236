//! Layers whose products are of 8-bit floats, from every kind of file.

use std::{
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use candle_core::{DType, Device, Module, Tensor};
use retouch_kernels::{Activation, Fp8Rows, Kernels, Portable};
use retouch_sampler::TorchGenerator;
use retouch_weights::{
    Component, Folder, Linear, ModelFile, Store, Weights,
    convert::{Conversion, FileFormat},
};

const BFL: &str = "tiny-kontext/flux1-kontext-dev.safetensors";
const MATRIX: &str = "double_blocks.0.img_mlp.0";

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(path)
}

fn transformer(path: &Path) -> Weights {
    Component::Transformer.in_file(path, DType::F32, &Device::Cpu).unwrap()
}

fn size(weights: &Weights, module: &str) -> (usize, usize) {
    let shape = weights.pp(module).shape("weight").unwrap();
    (shape[0], shape[1])
}

fn rows(weights: &Weights, module: &str) -> Fp8Rows {
    let rows = weights.pp(module).fp8_rows(size(weights, module), "weight").unwrap();
    rows.unwrap_or_else(|| panic!("{module} is not in 8-bit floats"))
}

fn parts(rows: &Fp8Rows) -> (Vec<u8>, Vec<f32>) {
    (rows.codes.flatten_all().unwrap().to_vec1().unwrap(), rows.scales.to_vec1().unwrap())
}

#[test]
fn a_files_own_8_bit_floats_are_multiplied_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    for kind in ["fp8_scaled", "fp8"] {
        let path = folder.path().join(kind);
        let target = kind.parse().unwrap();
        let conversion = Conversion::plan(&fixture(BFL), FileFormat::Safetensors, target, &[]).unwrap();
        conversion.write(&mut fs::File::create(&path).unwrap(), &mut |_| ControlFlow::Continue(())).unwrap();
        let store = Store::open(vec![ModelFile::open(&path).unwrap()]).unwrap();
        let (codes, scales) = parts(&rows(&transformer(&path).in_fp8(), MATRIX));
        let scale = store.tensor(&format!("{MATRIX}.scale_weight"), DType::F32, &Device::Cpu);
        let scale = scale.map_or(1.0, |scale| scale.to_scalar::<f32>().unwrap());
        assert_eq!(scale == 1.0, kind == "fp8");
        assert_eq!(scales, vec![scale; codes.len() / size(&transformer(&path), MATRIX).1]);
        // The file says of a scaled tensor's bytes nothing but with its scale: its values are compared.
        let found = rows(&transformer(&path).in_fp8(), MATRIX);
        let found = (found.unscaled(DType::F32).unwrap() * f64::from(scale)).unwrap();
        let expected = store.tensor(&format!("{MATRIX}.weight"), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(found.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap(), "{kind}");
    }
}

#[test]
fn everything_else_is_rounded_a_row_at_a_time() {
    for path in [BFL, "quantised/flux-q4_0.gguf"] {
        let weights = transformer(&fixture(path));
        let values = weights.pp(MATRIX).get(size(&weights, MATRIX), "weight").unwrap();
        let expected = Fp8Rows::quantise(&values).unwrap();
        assert_eq!(parts(&rows(&weights.in_fp8(), MATRIX)), parts(&expected), "{path}");
    }
}

#[test]
fn tensors_that_are_parts_of_a_matrix_become_its_rows() {
    let whole = transformer(&fixture(BFL)).in_fp8();
    let folder = Folder::on_disk(fixture("tiny-kontext"));
    let parted = Component::Transformer.in_folder(&folder, DType::F32, &Device::Cpu).unwrap().in_fp8();
    for module in ["double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"] {
        assert_eq!(parts(&rows(&parted, module)), parts(&rows(&whole, module)), "{module}");
    }
}

#[test]
fn the_layers_of_blocks_multiply_8_bit_floats_and_no_others() {
    let plain = transformer(&fixture(BFL));
    let weights = plain.clone().in_fp8();
    let (out, input) = size(&weights, MATRIX);
    let x = Tensor::from_vec(TorchGenerator::new(0).normal(5 * input), (1, 5, input), &Device::Cpu).unwrap();
    let layer = Linear::load(&weights.pp(MATRIX), input, out).unwrap();
    let bias = plain.pp(MATRIX).get(out, "bias").unwrap();
    let values = Fp8Rows::quantise(&plain.pp(MATRIX).get((out, input), "weight").unwrap()).unwrap();
    let largest = |x: &Tensor| x.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
    let distance = |found: &Tensor, expected: &Tensor| largest(&(found - expected).unwrap()) / largest(expected);
    let by_definition =
        |rows: &Fp8Rows, bias: &Tensor, activation| Portable.linear_fp8(&x, rows, Some(bias), activation).unwrap();
    // Roundings of sums in f32 in another order; widened weights are further off by their rounding to three bits.
    let found = layer.forward(&x).unwrap();
    assert!(distance(&found, &by_definition(&values, &bias, Activation::None)) < 2e-6);
    let widened = Linear::load(&plain.pp(MATRIX), input, out).unwrap().forward(&x).unwrap();
    assert!((0.005..0.1).contains(&distance(&found, &widened)), "{}", distance(&found, &widened));
    let gelu = by_definition(&values, &bias, Activation::Gelu);
    assert!(distance(&layer.forward_gelu(&x).unwrap(), &gelu) < 2e-6);
    let some = by_definition(&values, &bias, Activation::None).narrow(2, 3, out - 5).unwrap();
    assert!(distance(&layer.outputs(3..out - 2).unwrap().forward(&x).unwrap(), &some) < 2e-6);

    for module in ["img_in", "txt_in", "final_layer.linear", "double_blocks.0.img_mod.lin", "time_in.in_layer"] {
        let size = size(&weights, module);
        assert!(weights.pp(module).fp8_rows(size, "weight").unwrap().is_none(), "{module}");
    }
    assert!(plain.pp(MATRIX).fp8_rows((out, input), "weight").unwrap().is_none());
    let refusal = weights.pp(MATRIX).fp8_rows((out + 16, input), "weight").unwrap_err().to_string();
    assert!(refusal.contains(MATRIX), "{refusal}");
}

#[test]
fn a_weight_counts_as_a_byte_and_its_row_as_four_more() {
    let weights = transformer(&fixture(BFL)).in_fp8();
    let (out, input) = size(&weights, MATRIX);
    let assumed = Weights::assumed("bf16".parse().unwrap(), DType::F32).unwrap().in_fp8();
    for weights in [weights, assumed] {
        let counted = weights.count(|weights| Linear::load_no_bias(&weights.pp(MATRIX), input, out)).unwrap();
        assert_eq!(counted.values().sum::<u64>(), (out * input + 4 * out) as u64);
    }
}
