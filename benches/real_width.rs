//! The real model's work with random weights: one double and two single blocks at FLUX.1's width, its VAE, and two layers of
//! T5-XXL at 512 tokens. On the CPU in f32 for a 512 px edit; with the feature `cuda` on the first GPU as well, in bf16 for
//! 1024 px.
//!
//! `cargo bench --bench real_width [-- [--json] [blocks] [vae_encode] [vae_decode] [t5]]`. A run takes tens of seconds on
//! two cores, so this is no criterion bench (its smallest sample is ten): each line is the median of three runs, beside
//! the floating-point operations counted here. `scripts/compare.py --cpu --blocks` runs it beside PyTorch, by `--json`, which
//! leaves out the GPU.

#[path = "support/random.rs"]
mod random;

use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use retouch::weights::{Component, ModelFile, Store, Weights};
use retouch_flow::{FluxConfig, FluxTransformer, ModulationTable, Reference, tokens};
use retouch_sampler::TorchGenerator;
use retouch_text_encoder::{T5Config, T5Encoder};
use retouch_vae::{VaeConfig, VaeDecoder, VaeEncoder};

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
        println!("{:12} {:>9} {:>9} {:>9} {:>9}", "work", "on", "median s", "TFLOP", "GFLOP/s");
    }
    let places = [
        Place { device: Device::Cpu, dtype: DType::F32, pixels: 512 },
        #[cfg(feature = "cuda")]
        Place { device: retouch_kernels::cuda::open(0).unwrap(), dtype: DType::BF16, pixels: 1024 },
    ];
    for place in places.iter().filter(|place| !json || place.device.is_cpu()) {
        for (name, run) in cases {
            if named.is_empty() || named.contains(&name) {
                run(&Report { name, json, place });
            }
        }
    }
}

struct Place {
    device: Device,
    dtype: DType,
    /// The sides of the images, of the result's and of the reference's.
    pixels: usize,
}

impl Place {
    fn weights(&self, part: Component, shapes: &[(String, Vec<usize>)]) -> Weights {
        part.in_store(random_store(shapes), self.dtype, &self.device).unwrap()
    }

    fn noise(&self, shape: &[usize]) -> Tensor {
        let values = TorchGenerator::new(1).normal(shape.iter().product());
        Tensor::from_vec(values, shape, &self.device).unwrap().to_dtype(self.dtype).unwrap()
    }
}

type Case = fn(&Report<'_>);

struct Report<'a> {
    name: &'static str,
    json: bool,
    place: &'a Place,
}

impl Report<'_> {
    /// Times `work` of `flop` floating-point operations after one run to warm up, and takes the peak memory of all runs.
    fn time(&self, flop: f64, work: impl Fn() -> candle_core::Result<Tensor>) {
        let work = || {
            work().unwrap();
            self.place.device.synchronize().unwrap();
        };
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
            let on = format!("{:?}", self.place.device.location());
            let on = on.split_whitespace().next().unwrap_or_default();
            println!("{:12} {on:>9} {median:>9.4} {:>9.3} {:>9.1}", self.name, flop / 1e12, flop / median / 1e9);
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

/// A store of random tensors of those shapes, on disk, so that it is out of memory once it is read.
fn random_store(shapes: &[(String, Vec<usize>)]) -> Store {
    let place = tempfile::NamedTempFile::new().unwrap();
    random::write(place.path(), shapes);
    Store::open(vec![ModelFile::open(place.path()).unwrap()]).unwrap()
}

fn blocks(report: &Report<'_>) {
    let config = FluxConfig { num_layers: 1, num_single_layers: 2, ..FluxConfig::dev() };
    let place = report.place;
    let weights = place.weights(Component::Transformer, &random::flux(&config));
    let pooled = place.noise(&[1, config.pooled_projection_dim]);
    let modulation = ModulationTable::compute(&weights, &config, &[500.0], 2.5, &pooled).unwrap();
    let transformer = FluxTransformer::load(&weights, &config).unwrap();
    let side = place.pixels / 16;
    let latents = tokens::pack(&place.noise(&[1, 16, 2 * side, 2 * side])).unwrap();
    let reference = Reference { tokens: &latents, rows: side, columns: side };
    let text = place.noise(&[1, TEXT_TOKENS, config.joint_attention_dim]);
    let conditioning = transformer.condition(&text, Some(reference), (side, side), modulation).unwrap();

    let tokens = (TEXT_TOKENS + 2 * side * side) as f64;
    let layers = (config.num_layers + config.num_single_layers) as f64;
    let hidden = config.hidden() as f64;
    // Per token and layer 12 hidden^2 multiply-adds in the linears, per pair of tokens 2 hidden in the attention.
    let flop = 2.0 * layers * tokens * (12.0 * hidden * hidden + 2.0 * tokens * hidden);
    drop(weights);
    report.time(flop, || transformer.velocity(&latents, &conditioning, 0));
}

fn vae_weights(place: &Place) -> (Weights, VaeConfig) {
    let weights = place.weights(Component::Vae, &random::vae());
    let config = VaeConfig::of(&weights).unwrap();
    (weights, config)
}

/// Of what was counted for 1024 px (4.9 and 10.5 TFLOP), nearly all of it proportional to the pixels.
fn vae_share(place: &Place) -> f64 {
    (place.pixels as f64 / 1024.0).powi(2)
}

fn vae_encode(report: &Report<'_>) {
    let place = report.place;
    let (weights, config) = vae_weights(place);
    let encoder = VaeEncoder::load(&weights, &config).unwrap();
    drop(weights);
    let image = place.noise(&[1, 3, place.pixels, place.pixels]);
    report.time(4.9e12 * vae_share(place), || encoder.encode(&image));
}

fn vae_decode(report: &Report<'_>) {
    let place = report.place;
    let (weights, config) = vae_weights(place);
    let decoder = VaeDecoder::load(&weights, &config).unwrap();
    drop(weights);
    let latents = place.noise(&[1, 16, place.pixels / 8, place.pixels / 8]);
    report.time(10.5e12 * vae_share(place), || decoder.decode(&latents));
}

fn t5(report: &Report<'_>) {
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
    let weights = report.place.weights(Component::T5, &shapes);
    let encoder = T5Encoder::load(&weights, &T5Config::of(&weights).unwrap()).unwrap();
    drop(weights);
    let ids: Vec<u32> = (0..TEXT_TOKENS as u32).map(|i| i % VOCABULARY as u32).collect();
    let ids = Tensor::from_vec(ids, (1, TEXT_TOKENS), &report.place.device).unwrap();
    let matrices = 4 * hidden * hidden + 3 * hidden * inner;
    let flop = (2 * LAYERS * TEXT_TOKENS * (matrices + 2 * TEXT_TOKENS * hidden)) as f64;
    report.time(flop, || encoder.embed(&ids));
}
