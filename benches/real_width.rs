//! The real model's work on the CPU in f32 with random weights: one double and two single blocks at FLUX.1's width for a
//! 512 px edit, its VAE at 512 px, and two layers of T5-XXL at 512 tokens.
//!
//! `cargo bench --bench real_width [-- [--json] [blocks] [vae_encode] [vae_decode] [t5]]`. A run takes tens of seconds on
//! two cores, so this is no criterion bench (its smallest sample is ten): each line is the median of three runs, beside
//! the floating-point operations counted here. `scripts/compare.py --cpu --blocks` runs it beside PyTorch.

use std::{collections::HashMap, time::Instant};

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

/// A store of bf16 tensors of those shapes, filled with small numbers; `fan_in` 0 stands for a norm or bias.
fn random_store(shapes: &[(String, Vec<usize>)]) -> Store {
    let block: Vec<f32> = TorchGenerator::new(2).normal(1 << 16);
    let mut data: Vec<u8> = Vec::new();
    let mut header = HashMap::new();
    for (name, shape) in shapes {
        let start = data.len();
        let fan_in: usize = shape[1..].iter().product();
        let scale = (fan_in.max(1) as f32).powf(-0.5);
        let bytes: Vec<u8> = block.iter().flat_map(|v| half::bf16::from_f32(v * scale).to_le_bytes()).collect();
        let len = 2 * shape.iter().product::<usize>();
        data.extend(bytes.iter().cycle().take(len));
        header.insert(
            name.clone(),
            serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, data.len()]}),
        );
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    // On disk, so that it is out of memory once it is read.
    let place = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(place.path(), file).unwrap();
    Store::open(vec![ModelFile::open(place.path()).unwrap()]).unwrap()
}

fn linear(shapes: &mut Vec<(String, Vec<usize>)>, name: String, input: usize, output: usize) {
    shapes.push((format!("{name}.weight"), vec![output, input]));
    shapes.push((format!("{name}.bias"), vec![output]));
}

fn blocks(report: &Report) {
    let config = FluxConfig {
        in_channels: 64,
        num_layers: 1,
        num_single_layers: 2,
        attention_head_dim: 128,
        num_attention_heads: 24,
        joint_attention_dim: 4096,
        pooled_projection_dim: 768,
        guidance_embeds: true,
        axes_dims_rope: FluxConfig::real_axes(),
    };
    let (hidden, mlp) = (config.hidden(), config.mlp());
    let mut shapes = Vec::new();
    linear(&mut shapes, "img_in".into(), config.in_channels, hidden);
    linear(&mut shapes, "txt_in".into(), config.joint_attention_dim, hidden);
    for (name, input) in [("time_in", 256), ("guidance_in", 256), ("vector_in", config.pooled_projection_dim)] {
        linear(&mut shapes, format!("{name}.in_layer"), input, hidden);
        linear(&mut shapes, format!("{name}.out_layer"), hidden, hidden);
    }
    for stream in ["img", "txt"] {
        let block = "double_blocks.0";
        linear(&mut shapes, format!("{block}.{stream}_mod.lin"), hidden, 6 * hidden);
        linear(&mut shapes, format!("{block}.{stream}_attn.qkv"), hidden, 3 * hidden);
        linear(&mut shapes, format!("{block}.{stream}_attn.proj"), hidden, hidden);
        linear(&mut shapes, format!("{block}.{stream}_mlp.0"), hidden, mlp);
        linear(&mut shapes, format!("{block}.{stream}_mlp.2"), mlp, hidden);
        for norm in ["query_norm", "key_norm"] {
            shapes.push((format!("{block}.{stream}_attn.norm.{norm}.scale"), vec![128]));
        }
    }
    for i in 0..config.num_single_layers {
        let block = format!("single_blocks.{i}");
        linear(&mut shapes, format!("{block}.modulation.lin"), hidden, 3 * hidden);
        linear(&mut shapes, format!("{block}.linear1"), hidden, 3 * hidden + mlp);
        linear(&mut shapes, format!("{block}.linear2"), hidden + mlp, hidden);
        for norm in ["query_norm", "key_norm"] {
            shapes.push((format!("{block}.norm.{norm}.scale"), vec![128]));
        }
    }
    linear(&mut shapes, "final_layer.linear".into(), hidden, config.in_channels);
    linear(&mut shapes, "final_layer.adaLN_modulation.1".into(), hidden, 2 * hidden);

    let weights = Component::Transformer.in_store(random_store(&shapes), DType::F32, &Device::Cpu).unwrap();
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
    let hidden = hidden as f64;
    // Per token and layer 12 hidden^2 multiply-adds in the linears, per pair of tokens 2 hidden in the attention.
    let flop = 2.0 * layers * tokens * (12.0 * hidden * hidden + 2.0 * tokens * hidden);
    drop(weights);
    report.time(flop, || {
        transformer.velocity(&latents, &conditioning, 0).unwrap();
    });
}

/// The shapes of FLUX.1's VAE in Black Forest Labs' naming.
fn vae_shapes() -> Vec<(String, Vec<usize>)> {
    const CHANNELS: [usize; 4] = [128, 256, 512, 512];
    let mut shapes = Vec::new();
    let conv = |shapes: &mut Vec<_>, name: String, input: usize, output: usize, side: usize| {
        shapes.push((format!("{name}.weight"), vec![output, input, side, side]));
        shapes.push((format!("{name}.bias"), vec![output]));
    };
    let norm = |shapes: &mut Vec<_>, name: String, channels: usize| {
        shapes.push((format!("{name}.weight"), vec![channels]));
        shapes.push((format!("{name}.bias"), vec![channels]));
    };
    let resnet = |shapes: &mut Vec<_>, name: String, input: usize, output: usize| {
        norm(shapes, format!("{name}.norm1"), input);
        conv(shapes, format!("{name}.conv1"), input, output, 3);
        norm(shapes, format!("{name}.norm2"), output);
        conv(shapes, format!("{name}.conv2"), output, output, 3);
        if input != output {
            conv(shapes, format!("{name}.nin_shortcut"), input, output, 1);
        }
    };
    for (half, ends, layers) in [("encoder", (3, 32), 2), ("decoder", (16, 3), 3)] {
        let (input, output) = ends;
        let inner = if half == "encoder" { CHANNELS[0] } else { CHANNELS[3] };
        conv(&mut shapes, format!("{half}.conv_in"), input, inner, 3);
        let mut channels = inner;
        let order: Vec<usize> = if half == "encoder" { (0..4).collect() } else { (0..4).rev().collect() };
        for (nth, level) in order.into_iter().enumerate() {
            let direction = if half == "encoder" { "down" } else { "up" };
            for layer in 0..layers {
                resnet(&mut shapes, format!("{half}.{direction}.{level}.block.{layer}"), channels, CHANNELS[level]);
                channels = CHANNELS[level];
            }
            if nth < 3 {
                conv(&mut shapes, format!("{half}.{direction}.{level}.{direction}sample.conv"), channels, channels, 3);
            }
        }
        for block in ["block_1", "block_2"] {
            resnet(&mut shapes, format!("{half}.mid.{block}"), 512, 512);
        }
        norm(&mut shapes, format!("{half}.mid.attn_1.norm"), 512);
        for name in ["q", "k", "v", "proj_out"] {
            conv(&mut shapes, format!("{half}.mid.attn_1.{name}"), 512, 512, 1);
        }
        norm(&mut shapes, format!("{half}.norm_out"), channels);
        conv(&mut shapes, format!("{half}.conv_out"), channels, output, 3);
    }
    shapes
}

fn vae_weights() -> (Weights, VaeConfig) {
    let weights: Weights = Component::Vae.in_store(random_store(&vae_shapes()), DType::F32, &Device::Cpu).unwrap();
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
