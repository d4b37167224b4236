// TEMPORARY: timing
use candle_core::{DType, Device, Tensor};
use retouch_vae::*;
use std::{collections::HashMap, time::Instant};
fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().collect();
    let (size, runs): (usize, usize) = (args[2].parse()?, args[3].parse()?);
    let mut config = VaeConfig::flux();
    if args[1] == "small" {
        config.block_out_channels = vec![16, 32, 64, 64];
        config.layers_per_block = 1;
        config.norm_num_groups = 8;
    }
    let file = format!("/opt/retouch-dev/te-vae/{}.safetensors", args[1]);
    let store = retouch_weights::Store::open(vec![retouch_weights::ModelFile::open(&file)?])?;
    let w = retouch_weights::Weights::new(store, retouch_weights::naming::SameNames, DType::F32, &Device::Cpu);
    let (e, d) = (VaeEncoder::load(&w, &config)?, VaeDecoder::load(&w, &config)?);
    let image = Tensor::rand(-1f32, 1f32, (1, 3, size, size), &Device::Cpu)?;
    let latents = e.encode(&image)?;
    let mut times: HashMap<&str, Vec<f64>> = HashMap::new();
    for _ in 0..runs {
        let t = Instant::now();
        e.encode(&image)?;
        times.entry("encode").or_default().push(t.elapsed().as_secs_f64());
        let t = Instant::now();
        d.decode(&latents)?;
        times.entry("decode").or_default().push(t.elapsed().as_secs_f64());
    }
    for (k, mut v) in times {
        v.sort_by(f64::total_cmp);
        println!("{k} min {:.3} median {:.3}", v[0], v[v.len() / 2]);
    }
    Ok(())
}
