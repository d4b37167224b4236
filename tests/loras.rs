//! LoRAs in every format against the reference, on weights in f32, bf16 and few bits.
//!
//! scripts/reference/loras.py makes tests/fixtures/lora; tests/fixtures/README.md says what is in it.

mod support;

use std::{collections::HashMap, fs, path::Path};

use candle_core::{
    DType, Device, Tensor,
    quantized::{GgmlDType, QTensor, gguf_file},
};
use image::RgbImage;
use retouch::{
    DeviceChoice, EditRequest, Engine, EngineOptions, Lora, ModelSource, NoProgress, OutputSize, Precision,
    ReferenceSize, Seeds, Silent, Target,
};
use serde::Deserialize;
use support::fixtures;

type Tensors = HashMap<String, Tensor>;

/// Two LoRAs at different scales.
#[derive(Deserialize)]
struct Case {
    name: String,
    loras: Vec<(String, f64)>,
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&fs::read(fixtures().join("lora/cases.json")).unwrap()).unwrap()
}

fn load(path: impl AsRef<Path>) -> Tensors {
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn expected() -> Tensors {
    load(fixtures().join("lora/expected.safetensors"))
}

fn file(name: &str) -> std::path::PathBuf {
    fixtures().join("lora").join(name)
}

fn tiny_model() -> ModelSource {
    ModelSource { base: Some(fixtures().join("tiny-kontext").display().to_string()), ..Default::default() }
}

fn options(precision: Precision, keep_loaded: bool) -> EngineOptions {
    EngineOptions {
        device: DeviceChoice::Cpu,
        precision: Some(precision),
        keep_loaded: keep_loaded.into(),
        ..Default::default()
    }
}

fn engine(source: &ModelSource, precision: Precision, keep_loaded: bool) -> Engine {
    Engine::open(source, options(precision, keep_loaded), &mut NoProgress).unwrap()
}

/// The case `min` of the reference's calls, with LoRAs.
fn request(loras: &[(String, f64)]) -> EditRequest {
    let pixels = load(fixtures().join("kontext/min.safetensors"))["image_in_u8"].clone();
    let (height, width, _) = pixels.dims3().unwrap();
    let bytes = pixels.flatten_all().unwrap().to_vec1::<u8>().unwrap();
    EditRequest {
        prompt: "Make the astronaut wear a red hat".to_string(),
        image: RgbImage::from_raw(width as u32, height as u32, bytes),
        steps: Some(2),
        guidance: Some(2.5),
        size: OutputSize::Exact { width: 48, height: 64 },
        reference_size: ReferenceSize::Keep,
        max_sequence_length: Some(20),
        seeds: Seeds::Each(vec![0]),
        loras: loras.iter().map(|(name, scale)| Lora { file: file(name), scale: *scale }).collect(),
        ..Default::default()
    }
}

/// CLIP's vector and the first velocity.
fn run(engine: &mut Engine, loras: &[(String, f64)]) -> [Tensor; 2] {
    let (_, trace) = engine.edit_traced(&request(loras), &mut Silent).unwrap();
    let tensors = trace.tensors().unwrap();
    ["clip_pooled", "velocity.0"].map(|name| tensors[name].to_dtype(DType::F32).unwrap())
}

fn of(expected: &Tensors, name: &str) -> [Tensor; 2] {
    ["clip_pooled", "velocity.0"].map(|tensor| expected[&format!("{name}.{tensor}")].clone())
}

fn largest(x: &Tensor) -> f32 {
    x.abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

/// Largest difference over the largest magnitude of the expected values, of the worse of both tensors.
fn distance(found: &[Tensor; 2], expected: &[Tensor; 2]) -> f32 {
    let error = |(found, expected): (&Tensor, &Tensor)| largest(&(found - expected).unwrap()) / largest(expected);
    found.iter().zip(expected).map(error).fold(0f32, f32::max)
}

/// The tiny model's transformer and CLIP as single files in another dtype.
fn converted(folder: &Path, dtype: DType) -> ModelSource {
    let convert = |from: &str, to: &str| {
        let tensors = load(fixtures().join(from)).into_iter().map(|(name, x)| (name, x.to_dtype(dtype).unwrap()));
        candle_core::safetensors::save(&tensors.collect::<Tensors>(), folder.join(to)).unwrap();
        Some(folder.join(to))
    };
    ModelSource {
        transformer: convert("tiny-kontext/flux1-kontext-dev.safetensors", "transformer.safetensors"),
        clip: convert("comfy/clip_l.safetensors", "clip.safetensors"),
        ..tiny_model()
    }
}

/// The model's files are in bf16, which stay so and have the LoRAs beside them; in f32 they have them merged.
#[test]
fn every_format_equals_the_reference_merged_and_at_run_time() {
    let folder = tempfile::tempdir().unwrap();
    let dense = converted(folder.path(), DType::F32);
    let (mut at_run_time, mut merged) =
        (engine(&tiny_model(), Precision::F32, true), engine(&dense, Precision::F32, true));
    let expected = expected();
    let none = of(&expected, "none");
    assert!(distance(&run(&mut at_run_time, &[]), &none) < 1e-5);
    let cases = cases();
    assert!(cases.len() >= 8);
    for case in &cases {
        let expected = of(&expected, &case.name);
        for (how, engine) in [("at run time", &mut at_run_time), ("merged", &mut merged)] {
            let found = run(engine, &case.loras);
            // As close as the model without LoRAs is: f32 rounding in another order.
            let error = distance(&found, &expected);
            assert!(error < 1e-5, "{} {how}: {error:e}", case.name);
            // Both tensors change by far more than that; each of the two LoRAs matters.
            for (found, none) in found.iter().zip(&none) {
                assert!(largest(&(found - none).unwrap()) > 0.1 * largest(none), "{} {how} changes little", case.name);
            }
            let alone = run(engine, &case.loras[..1]);
            assert!(distance(&alone, &expected) > 0.05, "{} {how}: the second LoRA changes little", case.name);
        }
    }
}

/// Matrices in blocks of 8 and 4 bits, against the same values in f32 with the LoRAs merged into them.
#[test]
fn quantised_matrices_have_the_loras_beside_them() {
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4_0] {
        let folder = tempfile::tempdir().unwrap();
        let (mut blocks, mut values) = (Vec::new(), Tensors::new());
        for (name, x) in load(fixtures().join("tiny-kontext/flux1-kontext-dev.safetensors")) {
            let x = x.to_dtype(DType::F32).unwrap();
            let kind = if x.rank() == 2 { kind } else { GgmlDType::F32 };
            let quantised = QTensor::quantize(&x, kind).unwrap();
            values.insert(name.clone(), quantised.dequantize(&Device::Cpu).unwrap());
            blocks.push((name, quantised));
        }
        let (gguf, dense) = (folder.path().join("flux.gguf"), folder.path().join("flux.safetensors"));
        candle_core::safetensors::save(&values, &dense).unwrap();
        let tensors: Vec<_> = blocks.iter().map(|(name, x)| (name.as_str(), x)).collect();
        gguf_file::write(&mut fs::File::create(&gguf).unwrap(), &[], &tensors).unwrap();

        let with = |transformer| ModelSource { transformer: Some(transformer), ..tiny_model() };
        let (mut quantised, mut dense) =
            (engine(&with(gguf), Precision::F32, true), engine(&with(dense), Precision::F32, true));
        for case in cases() {
            let (found, expected) = (run(&mut quantised, &case.loras), run(&mut dense, &case.loras));
            let error = distance(&found, &expected);
            // f32 rounding in another order, as against the reference.
            assert!(error < 1e-5, "{kind:?} {}: {error:e}", case.name);
        }
    }
}

/// Merged into bf16 weights, beside weights that become 8 bits in memory: as far from f32 as the model without LoRAs is.
#[test]
fn loras_round_no_worse_than_the_weights_do() {
    let expected = expected();
    let quantised = |target| EngineOptions { quantize: Some(target), ..options(Precision::F32, true) };
    // How much further: a LoRA on every layer that is half as large as the weights makes another model, which carries on the
    // weights' roundings otherwise. bf16's are large already, by those of timestep and guidance, which LoRAs do not touch.
    for (how, limit, options) in [
        ("bf16", 1.5, options(Precision::Bf16, true)),
        ("q8_0", 4.0, quantised(Target::Blocks(GgmlDType::Q8_0))),
        ("fp8", 4.0, quantised(Target::Fp8Scaled)),
        ("products of fp8", 4.0, options(Precision::Fp8, true)),
    ] {
        let mut engine = Engine::open(&tiny_model(), options, &mut NoProgress).unwrap();
        let own = distance(&run(&mut engine, &[]), &of(&expected, "none"));
        for case in cases() {
            let error = distance(&run(&mut engine, &case.loras), &of(&expected, &case.name));
            assert!(error < limit * own, "{how} {}: {error} against {own} without LoRAs", case.name);
        }
    }
}

/// The same tensors behind other prefixes and with other endings.
#[test]
fn other_spellings_are_the_same_lora() {
    let folder = tempfile::tempdir().unwrap();
    let mut engine = engine(&tiny_model(), Precision::F32, true);
    let mut with = |file: &Path| {
        let mut request = request(&[]);
        request.loras = vec![Lora { file: file.to_path_buf(), scale: 0.5 }];
        let (_, trace) = engine.edit_traced(&request, &mut Silent).unwrap();
        trace.tensors().unwrap()["velocity.0"].flatten_all().unwrap().to_vec1::<f32>().unwrap()
    };
    for (name, replacements) in [
        // As Black Forest Labs' own control LoRAs, and as kohya's.
        (
            "fal",
            [
                [("base_model.model.", ""), ("", ""), ("", "")],
                [("base_model.model.", "diffusion_model."), ("lora_A", "lora_down"), ("lora_B", "lora_up")],
            ],
        ),
        (
            "diffusers",
            [
                [("transformer.", ""), ("lora_A", "lora.down"), ("lora_B", "lora.up")],
                [("transformer.", "base_model.model."), ("lora_A", "lora_A.default"), ("lora_B", "lora_B.default")],
            ],
        ),
    ] {
        let original = with(&file(&format!("{name}.safetensors")));
        for (i, replacements) in replacements.iter().enumerate() {
            let rename = |(name, x): (String, Tensor)| {
                (replacements.iter().fold(name, |name, (from, to)| name.replacen(from, to, 1)), x)
            };
            let tensors: Tensors = load(file(&format!("{name}.safetensors"))).into_iter().map(rename).collect();
            let path = folder.path().join(format!("{name}{i}.safetensors"));
            candle_core::safetensors::save(&tensors, &path).unwrap();
            assert_eq!(with(&path), original, "{name} {replacements:?}");
        }
    }
}

#[test]
fn a_model_in_memory_never_acts_with_the_loras_of_another_request() {
    let sequence = [("fal.safetensors", 1.0), ("fal.safetensors", 0.5), ("common.safetensors", 1.0)];
    let mut kept = engine(&tiny_model(), Precision::F32, true);
    let bits =
        |[clip, velocity]: [Tensor; 2]| [clip, velocity].map(|x| x.flatten_all().unwrap().to_vec1::<f32>().unwrap());
    let mut seen = Vec::new();
    let requests = sequence.map(|(name, scale)| vec![(name.to_string(), scale)]);
    for loras in requests.iter().chain([&vec![], &requests[0], &vec![("fal.safetensors".to_string(), 0.0)]]) {
        let found = bits(run(&mut kept, loras));
        assert_eq!(found, bits(run(&mut engine(&tiny_model(), Precision::F32, false), loras)), "{loras:?}");
        seen.push(found);
    }
    // The three LoRAs and none differ; the first comes again; at scale 0 it is none.
    assert!((0..4).all(|i| (0..i).all(|j| seen[i] != seen[j])));
    assert!(seen[4] == seen[0] && seen[5] == seen[3]);
}

#[test]
fn a_file_that_is_replaced_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("lora.safetensors");
    let mut engine = engine(&tiny_model(), Precision::F32, true);
    let mut with = |name: &str| {
        let new = folder.path().join("new");
        fs::copy(file(name), &new).unwrap();
        fs::rename(new, &path).unwrap();
        let mut request = request(&[]);
        request.loras = vec![Lora { file: path.clone(), scale: 1.0 }];
        engine.edit(&request, &mut Silent).unwrap().images[0].pixels.clone()
    };
    let first = with("fal.safetensors");
    assert_ne!(with("xlabs.safetensors"), first);
    assert_eq!(with("fal.safetensors"), first);
}
