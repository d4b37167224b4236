//! The transformer's velocities against the reference implementation's, given the reference's own inputs.

#[path = "../../weights/tests/support/feed.rs"]
mod feed;

use std::{
    collections::HashMap,
    fs,
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::Arc,
};

use candle_core::{DType, Device, Tensor};
use retouch_flow::{Conditioning, FluxConfig, FluxTransformer, ModulationTable, Reference, Saving, StepCache, tokens};
use retouch_weights::{
    Adapters, Component, Folder, LoraFile, Weights,
    convert::{Conversion, FileFormat},
};
use serde::Deserialize;

use feed::HostFeed;

type Tensors = HashMap<String, Tensor>;

#[derive(Deserialize)]
struct Case {
    name: String,
    true_cfg_scale: f64,
    width: usize,
    height: usize,
    guidance: f64,
}

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn cases() -> Vec<Case> {
    serde_json::from_slice(&fs::read(fixtures().join("kontext/cases.json")).unwrap()).unwrap()
}

fn load(folder: &str, case: &str) -> Tensors {
    candle_core::safetensors::load(fixtures().join(folder).join(format!("{case}.safetensors")), &Device::Cpu).unwrap()
}

struct Model {
    weights: Weights,
    config: FluxConfig,
    transformer: FluxTransformer,
}

impl Model {
    fn tiny(dtype: DType) -> Self {
        let folder = Folder::on_disk(fixtures().join("tiny-kontext"));
        let weights = Component::Transformer.in_folder(&folder, dtype, &Device::Cpu).unwrap();
        let config: FluxConfig = folder.json("transformer/config.json").unwrap();
        let transformer = FluxTransformer::load(&weights, &config).unwrap();
        Self { weights, config, transformer }
    }

    /// `prefix` picks the positive or the negative prompt.
    fn condition(&self, case: &Case, inputs: &Tensors, prefix: &str) -> Conditioning {
        let sigmas = inputs["sigmas"].to_vec1::<f32>().unwrap();
        let timesteps: Vec<f32> = sigmas[..sigmas.len() - 1].iter().map(|sigma| sigma * 1000.0).collect();
        let pooled = inputs[&format!("{prefix}clip_pooled")].to_dtype(self.weights.dtype()).unwrap();
        let table = ModulationTable::compute(&self.weights, &self.config, &timesteps, case.guidance, &pooled).unwrap();
        let packed =
            inputs.get("ref_latents").map(|latents| (tokens::pack(latents).unwrap(), latents.dims4().unwrap()));
        let reference = packed.as_ref().map(|(tokens, (_, _, height, width))| Reference {
            tokens,
            rows: height / 2,
            columns: width / 2,
        });
        let text = &inputs[&format!("{prefix}t5_embeds")];
        self.transformer.condition(text, reference, (case.height / 16, case.width / 16), table).unwrap()
    }
}

/// Largest difference over the largest magnitude of the expected values.
fn error(found: &Tensor, expected: &Tensor) -> f32 {
    let max = |t: Tensor| t.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let expected = expected.to_dtype(DType::F32).unwrap();
    max((found - &expected).unwrap()) / max(expected)
}

#[test]
fn velocities_equal_the_reference_at_every_step() {
    let model = Model::tiny(DType::F32);
    let mut compared = 0;
    for case in cases() {
        let inputs = load("kontext", &case.name);
        // Some cases keep only a part of the reference latents, or no velocities.
        if !inputs.contains_key("velocity.0") || inputs.contains_key("ref_latents_sub8") {
            continue;
        }
        let positive = model.condition(&case, &inputs, "");
        let negative = (case.true_cfg_scale > 1.0).then(|| model.condition(&case, &inputs, "negative_"));
        let sigmas = inputs["sigmas"].to_vec1::<f32>().unwrap();
        for image in 0..inputs["noise"].dim(0).unwrap() {
            let of_image = |name: &str| inputs[name].narrow(0, image, 1).unwrap();
            let mut latents = tokens::pack(&of_image("noise")).unwrap();
            for (step, sigma) in sigmas.windows(2).enumerate() {
                let mut velocity = model.transformer.velocity(&latents, &positive, step).unwrap();
                if let Some(negative) = &negative {
                    let base = model.transformer.velocity(&latents, negative, step).unwrap();
                    velocity = (&base + ((velocity - &base).unwrap() * case.true_cfg_scale).unwrap()).unwrap();
                }
                let expected = of_image(&format!("velocity.{step}"));
                let error = error(&velocity, &expected);
                assert!(error < 1e-5, "{} image {image} step {step}: {error:e}", case.name);
                // The reference's own way on, so that errors do not add up.
                latents = (latents + (expected * f64::from(sigma[1] - sigma[0])).unwrap()).unwrap();
                compared += 1;
            }
        }
    }
    assert!(compared > 20, "only {compared} velocities were compared");
}

#[test]
fn bf16_stays_within_the_reference_s_own_distance_from_f32() {
    let model = Model::tiny(DType::BF16);
    let mut compared = 0;
    for case in cases() {
        if !fixtures().join(format!("kontext_bf16/{}.safetensors", case.name)).exists() || case.true_cfg_scale > 1.0 {
            continue;
        }
        let (mut inputs, low) = (load("kontext", &case.name), load("kontext_bf16", &case.name));
        let high = inputs["velocity.0"].clone();
        for embeds in ["clip_pooled", "t5_embeds"] {
            inputs.insert(embeds.to_string(), low[embeds].clone());
        }
        let conditioning = model.condition(&case, &inputs, "");
        let latents = tokens::pack(&inputs["noise"]).unwrap();
        let velocity = model.transformer.velocity(&latents, &conditioning, 0).unwrap();
        // bf16 rounds the guidance scale too, which moves the reference's result far more than its arithmetic does:
        // the bound of 0.03 is what the same rounded inputs leave between bf16 and f32.
        let reference = low["velocity.0"].to_dtype(DType::F32).unwrap();
        let (distance, own_distance) = (error(&velocity, &reference), error(&reference, &high));
        assert!(distance < 0.03 && distance < own_distance, "{}: {distance} against {own_distance}", case.name);
        compared += 1;
    }
    assert!(compared >= 3, "only {compared} cases were compared");
}

#[test]
fn a_bfl_file_and_a_diffusers_folder_give_the_same_velocity() {
    let model = Model::tiny(DType::F32);
    let file = fixtures().join("tiny-kontext/flux1-kontext-dev.safetensors");
    let weights = Component::Transformer.in_file(&file, DType::F32, &Device::Cpu).unwrap();
    let other = Model {
        transformer: FluxTransformer::load(&weights, &model.config).unwrap(),
        weights,
        config: model.config.clone(),
    };
    let case = cases().into_iter().find(|case| case.name == "square").unwrap();
    let inputs = load("kontext", "square");
    let latents = tokens::pack(&inputs["noise"]).unwrap();
    let velocity = |m: &Model| m.transformer.velocity(&latents, &m.condition(&case, &inputs, ""), 1).unwrap();
    let bits = |t: Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_eq!(bits(velocity(&model)), bits(velocity(&other)));
}

/// The velocities of one case at two steps, by the model with less in memory.
fn velocities(dtype: DType, saving: Saving, cache: Option<f64>) -> Vec<Vec<f32>> {
    velocities_of(Model::tiny(dtype), saving, cache)
}

fn velocities_of(mut model: Model, saving: Saving, cache: Option<f64>) -> Vec<Vec<f32>> {
    model.transformer = FluxTransformer::load_saving(&model.weights, &model.config, saving).unwrap();
    let case = cases().into_iter().find(|case| case.name == "square").unwrap();
    let inputs = load("kontext", "square");
    let latents = tokens::pack(&inputs["noise"]).unwrap();
    let (conditioning, mut cache) = (model.condition(&case, &inputs, ""), StepCache::new(cache));
    let mut velocity = |step| model.transformer.velocity_cached(&latents, &conditioning, step, &mut cache).unwrap();
    [velocity(0), velocity(1)].map(|velocity| velocity.flatten_all().unwrap().to_vec1().unwrap()).to_vec()
}

#[test]
fn blocks_that_are_read_at_each_step_compute_the_same_bits() {
    for (dtype, cache) in [(DType::F32, None), (DType::BF16, None), (DType::F32, Some(1e-9))] {
        let resident = velocities(dtype, Saving::default(), cache);
        for blocks in [0, 1, 2, 3] {
            let saving = Saving { resident_blocks: Some(blocks), ..Saving::default() };
            assert!(velocities(dtype, saving, cache) == resident, "{blocks} resident blocks in {dtype:?}");
        }
    }
}

/// The weights of the small model in every form that blocks are sent in; `folder` is for files of other types.
fn all_forms(folder: &Path) -> Vec<(&'static str, Weights)> {
    let original = fixtures().join("tiny-kontext/flux1-kontext-dev.safetensors");
    let file = |path: &Path, dtype| Component::Transformer.in_file(path, dtype, &Device::Cpu).unwrap();
    let converted = |target: &str, format, dtype| {
        let path = folder.join(target);
        let conversion = Conversion::plan(&original, format, target.parse().unwrap(), &[]).unwrap();
        let mut out = fs::File::create(&path).unwrap();
        conversion.write(&mut out, &mut |_| ControlFlow::Continue(())).unwrap();
        file(&path, dtype)
    };
    let lora = |weights: Weights| {
        let file = LoraFile::open(&fixtures().join("lora/kohya.safetensors")).unwrap();
        let files = [(Arc::new(file), 0.7)];
        let adapters = Adapters::new(&files, Component::Transformer, &weights).unwrap();
        assert!(!adapters.is_empty());
        weights.with_adapters(Arc::new(adapters))
    };
    let parted = |dtype| Model::tiny(dtype).weights;
    let quantised = |target: &str| parted(DType::F32).quantised(Component::Transformer, target.parse().unwrap());
    vec![
        ("matrices of several tensors", parted(DType::F32)),
        ("narrowed to bf16", parted(DType::BF16)),
        ("narrowed to f16", parted(DType::F16)),
        ("matrices of one tensor", file(&original, DType::F32)),
        ("bf16 in f32", converted("bf16", FileFormat::Safetensors, DType::F32)),
        ("q4_0", converted("q4_0", FileFormat::Gguf, DType::F32)),
        ("q8_0 in bf16", converted("q8_0", FileFormat::Gguf, DType::BF16)),
        ("scaled 8-bit floats", converted("fp8_scaled", FileFormat::Safetensors, DType::F32)),
        ("quantised when read", quantised("q8_0")),
        ("scaled 8-bit floats when read", quantised("fp8_scaled")),
        ("products of 8-bit floats", parted(DType::F32).in_fp8()),
        ("a LoRA merged", lora(parted(DType::F32))),
        ("a LoRA beside", lora(quantised("q8_0"))),
    ]
}

/// The velocities with blocks that are sent, and whether those are on the host and there is pinned memory.
fn sent_velocities(weights: &Weights, on_host: bool, pins: bool) -> Vec<Vec<f32>> {
    let saving = Saving { resident_blocks: Some(1), blocks_on_host: on_host, ..Saving::default() };
    let weights = weights.clone().with_feed(HostFeed::new(pins));
    velocities_of(Model { weights, ..Model::tiny(DType::F32) }, saving, None)
}

#[test]
fn blocks_that_are_sent_at_each_step_compute_the_same_bits_in_every_form() {
    let folder = tempfile::tempdir().unwrap();
    for (form, weights) in all_forms(folder.path()) {
        let model = Model { weights: weights.clone(), ..Model::tiny(DType::F32) };
        let resident = velocities_of(model, Saving::default(), None);
        for (on_host, pins) in [(true, true), (true, false), (false, true)] {
            let sent = sent_velocities(&weights, on_host, pins);
            assert!(sent == resident, "{form}, on the host: {on_host}, pinned: {pins}");
        }
    }
}

#[test]
fn blocks_in_the_other_16_bits_are_sent_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("f16.safetensors");
    let original = fixtures().join("tiny-kontext/flux1-kontext-dev.safetensors");
    let conversion = Conversion::plan(&original, FileFormat::Safetensors, "f16".parse().unwrap(), &[]).unwrap();
    conversion.write(&mut fs::File::create(&path).unwrap(), &mut |_| ControlFlow::Continue(())).unwrap();
    let velocities = |dtype| {
        let weights = Component::Transformer.in_file(&path, dtype, &Device::Cpu).unwrap();
        let sent = sent_velocities(&weights, true, true);
        let resident = velocities_of(Model { weights, ..Model::tiny(DType::F32) }, Saving::default(), None);
        (sent.concat(), resident.concat())
    };
    let distance = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| (x - y).abs()).fold(0f32, f32::max);
    let ((sent, resident), (_, exact)) = (velocities(DType::BF16), velocities(DType::F32));
    // On the CPU they are multiplied without rounding them to bf16: another computation in bf16, no worse than the other.
    let bf16 = distance(&resident, &exact);
    assert!(distance(&sent, &exact) < 1.25 * bf16 && bf16 > 0.0, "{} and {bf16}", distance(&sent, &exact));
}

#[test]
fn blocks_on_the_host_are_sent_from_pinned_memory_and_others_from_their_files() {
    let counted = Model::tiny(DType::F32);
    let counted = counted.weights.count(|weights| FluxTransformer::load(weights, &counted.config)).unwrap();
    let block = |name: &str| name.contains("_blocks.") && !name.starts_with("double_blocks.0.");
    let bytes: u64 = counted.iter().filter(|(name, _)| block(name)).map(|(_, bytes)| bytes).sum();
    for blocks_on_host in [true, false] {
        let (model, feed) = (Model::tiny(DType::F32), HostFeed::new(true));
        let weights = model.weights.clone().with_feed(feed.clone());
        let saving = Saving { resident_blocks: Some(1), blocks_on_host, ..Saving::default() };
        velocities_of(Model { weights, ..model }, saving, None);
        let (pinned, pieces) = feed.sent();
        assert_eq!((pinned + pieces) as u64, 2 * bytes, "two steps");
        // Small parameters stay on the host in any case, and this model has no others.
        assert_eq!(pieces, 0);
    }
}

#[test]
fn mlps_in_runs_of_tokens_compute_the_same() {
    let whole = velocities(DType::F32, Saving::default(), None);
    for mlp_tokens in [1, 7, 64, 1000] {
        let runs = velocities(DType::F32, Saving { mlp_tokens: Some(mlp_tokens), ..Saving::default() }, None);
        let largest = whole.concat().iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let pairs = whole.concat().into_iter().zip(runs.concat());
        let difference = pairs.map(|(x, y)| (x - y).abs()).fold(0f32, f32::max) / largest;
        // A product of fewer rows may add its terms in another order: 5e-7 for one row at a time.
        assert!(difference < 3e-6, "{mlp_tokens} tokens at a time: {difference:e}");
    }
}

#[test]
fn a_lone_file_of_unusual_heads_is_refused_with_the_way_out() {
    let file = fixtures().join("tiny-kontext/flux1-kontext-dev.safetensors");
    let weights = Component::Transformer.in_file(&file, DType::F32, &Device::Cpu).unwrap();
    let refusal = FluxConfig::of(&weights).unwrap_err().to_string();
    assert!(refusal.contains("32 channels") && refusal.contains("--model"), "{refusal}");
}
