//! Weights of the real model's shapes with random values, in files.

// Each bench uses a part of this.
#![allow(dead_code)]

use std::{
    collections::HashMap,
    fs::File,
    io::{BufWriter, Write},
    path::Path,
};

use retouch_flow::FluxConfig;
use retouch_sampler::TorchGenerator;

pub type Shapes = Vec<(String, Vec<usize>)>;

/// Writes a safetensors file of bf16 tensors of those shapes, filled with small numbers.
pub fn write(path: &Path, shapes: &[(String, Vec<usize>)]) {
    write_as(path, shapes, "BF16", |value| half::bf16::from_f32(value).to_le_bytes().to_vec());
}

/// The same in f32.
pub fn write_f32(path: &Path, shapes: &[(String, Vec<usize>)]) {
    write_as(path, shapes, "F32", |value| value.to_le_bytes().to_vec());
}

fn write_as(path: &Path, shapes: &[(String, Vec<usize>)], dtype: &str, encode: impl Fn(f32) -> Vec<u8>) {
    let size = encode(0.0).len();
    let mut header = HashMap::new();
    let mut end = 0;
    for (name, shape) in shapes {
        let start = end;
        end += size * shape.iter().product::<usize>();
        header.insert(name, serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]}));
    }
    let mut header = serde_json::to_vec(&header).unwrap();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(&header).unwrap();
    let block: Vec<f32> = TorchGenerator::new(2).normal(1 << 16);
    for (_, shape) in shapes {
        let fan_in: usize = shape[1..].iter().product();
        let scale = (fan_in.max(1) as f32).powf(-0.5);
        let bytes: Vec<u8> = block.iter().flat_map(|value| encode(value * scale)).collect();
        let mut left = size * shape.iter().product::<usize>();
        while left > 0 {
            let part = left.min(bytes.len());
            file.write_all(&bytes[..part]).unwrap();
            left -= part;
        }
    }
    file.flush().unwrap();
}

fn linear(shapes: &mut Shapes, name: String, input: usize, output: usize) {
    shapes.push((format!("{name}.weight"), vec![output, input]));
    shapes.push((format!("{name}.bias"), vec![output]));
}

/// A transformer in Black Forest Labs' naming.
pub fn flux(config: &FluxConfig) -> Shapes {
    let (hidden, mlp, head) = (config.hidden(), config.mlp(), config.attention_head_dim);
    let mut shapes = Vec::new();
    linear(&mut shapes, "img_in".into(), config.in_channels, hidden);
    linear(&mut shapes, "txt_in".into(), config.joint_attention_dim, hidden);
    for (name, input) in [("time_in", 256), ("guidance_in", 256), ("vector_in", config.pooled_projection_dim)] {
        linear(&mut shapes, format!("{name}.in_layer"), input, hidden);
        linear(&mut shapes, format!("{name}.out_layer"), hidden, hidden);
    }
    for i in 0..config.num_layers {
        let block = format!("double_blocks.{i}");
        for stream in ["img", "txt"] {
            linear(&mut shapes, format!("{block}.{stream}_mod.lin"), hidden, 6 * hidden);
            linear(&mut shapes, format!("{block}.{stream}_attn.qkv"), hidden, 3 * hidden);
            linear(&mut shapes, format!("{block}.{stream}_attn.proj"), hidden, hidden);
            linear(&mut shapes, format!("{block}.{stream}_mlp.0"), hidden, mlp);
            linear(&mut shapes, format!("{block}.{stream}_mlp.2"), mlp, hidden);
            for norm in ["query_norm", "key_norm"] {
                shapes.push((format!("{block}.{stream}_attn.norm.{norm}.scale"), vec![head]));
            }
        }
    }
    for i in 0..config.num_single_layers {
        let block = format!("single_blocks.{i}");
        linear(&mut shapes, format!("{block}.modulation.lin"), hidden, 3 * hidden);
        linear(&mut shapes, format!("{block}.linear1"), hidden, 3 * hidden + mlp);
        linear(&mut shapes, format!("{block}.linear2"), hidden + mlp, hidden);
        for norm in ["query_norm", "key_norm"] {
            shapes.push((format!("{block}.norm.{norm}.scale"), vec![head]));
        }
    }
    linear(&mut shapes, "final_layer.linear".into(), hidden, config.in_channels);
    linear(&mut shapes, "final_layer.adaLN_modulation.1".into(), hidden, 2 * hidden);
    shapes
}

/// A LoRA of that rank for all matrices of a transformer's blocks but those of the modulation.
pub fn lora(config: &FluxConfig, rank: usize) -> Shapes {
    let is_changed = |name: &str| name.contains("_blocks.") && name.ends_with(".weight") && !name.contains("mod");
    let matrices = flux(config).into_iter().filter(|(name, _)| is_changed(name));
    let pair = |(name, shape): (String, Vec<usize>)| {
        let layer = name.trim_end_matches(".weight");
        [
            (format!("{layer}.lora_A.weight"), vec![rank, shape[1]]),
            (format!("{layer}.lora_B.weight"), vec![shape[0], rank]),
        ]
    };
    matrices.flat_map(pair).collect()
}

/// The shapes of FLUX.1's VAE in Black Forest Labs' naming.
pub fn vae() -> Shapes {
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
