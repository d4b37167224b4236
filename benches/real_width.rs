//! The real model's work on the CPU in f32 with random weights: one double and two single blocks at FLUX.1's width for a
//! 512 px edit, its VAE at 512 px, and two layers of T5-XXL at 512 tokens.
//!
//! `cargo bench --bench real_width [-- [--json] [blocks] [vae_encode] [vae_decode] [t5]]`. A run takes tens of seconds on
//! two cores, so this is no criterion bench (its smallest sample is ten): each line is the median of three runs, beside
//! the floating-point operations counted here. `scripts/compare.py --cpu --blocks` runs it beside PyTorch.

#[path = "support/random.rs"]
mod random;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use retouch::weights::{Component, ModelFile, Store, Weights};
use retouch_flow::{FluxConfig, FluxTransformer, ModulationTable, Reference, tokens};
use retouch_sampler::TorchGenerator;
use retouch_text_encoder::{T5Config, T5Encoder};
use retouch_vae::{VaeConfig, VaeDecoder, VaeEncoder};

const PIXELS: usize = 512;
const TEXT_TOKENS: usize = 512;
const RUNS: usize = 3;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let json = arguments.iter().any(|a| a == "--json");
    let named: Vec<&str> = arguments.iter().map(String::as_str).filter(|a| *a != "--json").collect();
    let cases: [(&str, Case); 4] =
        [("blocks", blocks), ("vae_encode", vae_encode), ("vae_decode", vae_decode), ("t5", t5)];
    if let Some(unknown) = named.iter().find(|name| !cases.iter().any(|(case, _)| case == *name)) {
        eprintln!("there is no work `{unknown}`; there are blocks, vae_encode, vae_decode and t5");
        std::process::exit(2);
    }
    if !json {
        println!("{:12} {:>9} {:>9} {:>9}", "work", "median s", "TFLOP", "GFLOP/s");
    }
    for (name, run) in cases {
        if named.is_empty() || named.contains(&name) {
            run(&Report { name, json });
        }
    }
}

type Case = fn(&Report);

struct Report {
    name: &'static str,
    json: bool,
}

impl Report {
    /// Times `work` of `flop` floating-point operations after one run to warm up, and takes the peak memory of all runs.
    fn time(&self, flop: f64, mut work: impl FnMut()) {
        forget_peak();
        work();
        let mut seconds: Vec<f64> = (0..RUNS)
            .map(|_| {
                let start = Instant::now();
                work();
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        let median = seconds[RUNS / 2];
        if self.json {
            let peak = peak_bytes();
            let line = serde_json::json!({"work": self.name, "seconds": seconds, "flop": flop, "peak_bytes": peak});
            println!("{line}");
        } else {
            println!("{:12} {median:>9.2} {:>9.3} {:>9.1}", self.name, flop / 1e12, flop / median / 1e9);
        }
    }
}

/// From here on the peak counts anew (Linux only, see proc_pid_clear_refs(5)): loading is no part of what is measured.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

fn noise(shape: &[usize]) -> Tensor {
    let values = TorchGenerator::new(1).normal(shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

/// A store of random tensors of those shapes, on disk, so that it is out of memory once it is read.
fn random_store(shapes: &[(String, Vec<usize>)]) -> Store {
    let place = tempfile::NamedTempFile::new().unwrap();
    random::write(place.path(), shapes);
    Store::open(vec![ModelFile::open(place.path()).unwrap()]).unwrap()
}

fn blocks(report: &Report) {
    let config = FluxConfig { num_layers: 1, num_single_layers: 2, ..FluxConfig::dev() };
    let weights =
        Component::Transformer.in_store(random_store(&random::flux(&config)), DType::F32, &Device::Cpu).unwrap();
    let pooled = noise(&[1, config.pooled_projection_dim]);
    let modulation = ModulationTable::compute(&weights, &config, &[500.0], 2.5, &pooled).unwrap();
    let transformer = FluxTransformer::load(&weights, &config).unwrap();
    let side = PIXELS / 16;
    let latents = tokens::pack(&noise(&[1, 16, 2 * side, 2 * side])).unwrap();
    let reference = Reference { tokens: &latents, rows: side, columns: side };
    let text = noise(&[1, TEXT_TOKENS, config.joint_attention_dim]);
    let conditioning = transformer.condition(&text, Some(reference), (side, side), modulation).unwrap();

    let tokens = (TEXT_TOKENS + 2 * side * side) as f64;
    let layers = (config.num_layers + config.num_single_layers) as f64;
    let hidden = config.hidden() as f64;
    // Per token and layer 12 hidden^2 multiply-adds in the linears, per pair of tokens 2 hidden in the attention.
    let flop = 2.0 * layers * tokens * (12.0 * hidden * hidden + 2.0 * tokens * hidden);
    drop(weights);
    report.time(flop, || {
        transformer.velocity(&latents, &conditioning, 0).unwrap();
    });
}

fn vae_weights() -> (Weights, VaeConfig) {
    let weights: Weights = Component::Vae.in_store(random_store(&random::vae()), DType::F32, &Device::Cpu).unwrap();
    let config = VaeConfig::of(&weights).unwrap();
    (weights, config)
}

/// Counted for 1024 px in total (4.9 and 10.5 TFLOP), nearly all of it proportional to the pixels.
const VAE_SHARE: f64 = (PIXELS * PIXELS) as f64 / (1024.0 * 1024.0);

fn vae_encode(report: &Report) {
    let (weights, config) = vae_weights();
    let encoder = VaeEncoder::load(&weights, &config).unwrap();
    drop(weights);
    let image = noise(&[1, 3, PIXELS, PIXELS]);
    report.time(4.9e12 * VAE_SHARE, || {
        encoder.encode(&image).unwrap();
    });
}

fn vae_decode(report: &Report) {
    let (weights, config) = vae_weights();
    let decoder = VaeDecoder::load(&weights, &config).unwrap();
    drop(weights);
    let latents = noise(&[1, 16, PIXELS / 8, PIXELS / 8]);
    report.time(10.5e12 * VAE_SHARE, || {
        decoder.decode(&latents).unwrap();
    });
}

fn t5(report: &Report) {
    const LAYERS: usize = 2;
    const VOCABULARY: usize = 64;
    let (hidden, inner, heads, buckets) = (4096, 10240, 64, 32);
    let mut shapes = vec![
        ("shared.weight".to_string(), vec![VOCABULARY, hidden]),
        ("encoder.final_layer_norm.weight".to_string(), vec![hidden]),
        ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight".to_string(), vec![buckets, heads]),
    ];
    for block in 0..LAYERS {
        let (attention, mlp) = (format!("encoder.block.{block}.layer.0"), format!("encoder.block.{block}.layer.1"));
        for name in ["q", "k", "v", "o"] {
            shapes.push((format!("{attention}.SelfAttention.{name}.weight"), vec![hidden, hidden]));
        }
        shapes.push((format!("{mlp}.DenseReluDense.wi_0.weight"), vec![inner, hidden]));
        shapes.push((format!("{mlp}.DenseReluDense.wi_1.weight"), vec![inner, hidden]));
        shapes.push((format!("{mlp}.DenseReluDense.wo.weight"), vec![hidden, inner]));
        shapes.push((format!("{attention}.layer_norm.weight"), vec![hidden]));
        shapes.push((format!("{mlp}.layer_norm.weight"), vec![hidden]));
    }
    let weights = Component::T5.in_store(random_store(&shapes), DType::F32, &Device::Cpu).unwrap();
    let encoder = T5Encoder::load(&weights, &T5Config::of(&weights).unwrap()).unwrap();
    drop(weights);
    let ids: Vec<u32> = (0..TEXT_TOKENS as u32).map(|i| i % VOCABULARY as u32).collect();
    let ids = Tensor::from_vec(ids, (1, TEXT_TOKENS), &Device::Cpu).unwrap();
    let matrices = 4 * hidden * hidden + 3 * hidden * inner;
    let flop = (2 * LAYERS * TEXT_TOKENS * (matrices + 2 * TEXT_TOKENS * hidden)) as f64;
    report.time(flop, || {
        encoder.embed(&ids).unwrap();
    });
}
