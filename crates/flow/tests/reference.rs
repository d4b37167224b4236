//! The transformer's velocities against the reference implementation's, given the reference's own inputs.

use std::{collections::HashMap, fs, path::PathBuf};

use candle_core::{DType, Device, Tensor};
use retouch_flow::{Conditioning, FluxConfig, FluxTransformer, ModulationTable, Reference, Saving, StepCache, tokens};
use retouch_weights::{Component, Folder, Weights};
use serde::Deserialize;

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
    let mut model = Model::tiny(dtype);
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
