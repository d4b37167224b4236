//! Each stage of an edit with the embedded nano-kontext on the CPU, and the whole edit.
//!
//! `cargo bench --bench stages`; the real model's blocks are in `real_width`.

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, criterion_group, criterion_main};
use image::RgbImage;
use retouch::{
    EditRequest, Engine, EngineOptions, ModelSource, NoProgress, Silent,
    weights::{Component, Folder, Weights},
};
use retouch_flow::{FluxConfig, FluxTransformer, ModulationTable, Reference, tokens};
use retouch_sampler::{Schedule, SchedulerConfig, TorchGenerator};
use retouch_text_encoder::{ClipEncoder, ClipTokenizer, T5Encoder, T5Tokenizer};
use retouch_vae::{VaeConfig, VaeDecoder, VaeEncoder};

const PROMPT: &str = "make the circle blue";
const PIXELS: usize = 128;

fn nano() -> Folder {
    Folder::embedded("nano-kontext", retouch::models::NANO_KONTEXT)
}

fn weights(component: Component) -> Weights {
    component.in_folder(&nano(), DType::F32, &Device::Cpu).unwrap()
}

fn noise(shape: &[usize]) -> Tensor {
    let values = TorchGenerator::new(1).normal(shape.iter().product());
    Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
}

fn sampler(c: &mut Criterion) {
    let values = 16 * 128 * 128;
    c.bench_function("noise/1024px", |b| b.iter(|| TorchGenerator::new(1).normal(values)));
    let config = SchedulerConfig::flux_dev();
    c.bench_function("schedule/28_steps", |b| b.iter(|| Schedule::new(&config, 28, 4096)));
}

fn text(c: &mut Criterion) {
    let folder = nano();
    let clip_tokenizer = ClipTokenizer::open(&folder.sub("tokenizer")).unwrap();
    let t5_tokenizer = T5Tokenizer::open(&folder.sub("tokenizer_2")).unwrap();
    c.bench_function("tokenize/clip+t5", |b| {
        b.iter(|| (clip_tokenizer.encode(PROMPT, 77).unwrap(), t5_tokenizer.encode(PROMPT, 32).unwrap()))
    });
    let clip = ClipEncoder::load(&weights(Component::Clip), &folder.json("text_encoder/config.json").unwrap()).unwrap();
    let t5 = T5Encoder::load(&weights(Component::T5), &folder.json("text_encoder_2/config.json").unwrap()).unwrap();
    let row = |ids: &[u32]| Tensor::new(ids, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let clip_ids = row(&clip_tokenizer.encode(PROMPT, 77).unwrap().ids);
    let t5_ids = row(&t5_tokenizer.encode(PROMPT, 32).unwrap().ids);
    c.bench_function("encode_prompt/nano", |b| {
        b.iter(|| (clip.pooled(&clip_ids).unwrap(), t5.embed(&t5_ids).unwrap()))
    });
}

fn vae(c: &mut Criterion) {
    let config: VaeConfig = nano().json("vae/config.json").unwrap();
    let encoder = VaeEncoder::load(&weights(Component::Vae), &config).unwrap();
    let decoder = VaeDecoder::load(&weights(Component::Vae), &config).unwrap();
    for pixels in [128, 512] {
        let image = noise(&[1, 3, pixels, pixels]);
        let latents = encoder.encode(&image).unwrap();
        c.bench_function(&format!("vae_encode/nano/{pixels}px"), |b| b.iter(|| encoder.encode(&image).unwrap()));
        c.bench_function(&format!("vae_decode/nano/{pixels}px"), |b| b.iter(|| decoder.decode(&latents).unwrap()));
    }
}

fn denoise(c: &mut Criterion) {
    let folder = nano();
    let config: FluxConfig = folder.json("transformer/config.json").unwrap();
    let weights = weights(Component::Transformer);
    let transformer = FluxTransformer::load(&weights, &config).unwrap();
    let pooled = noise(&[1, config.pooled_projection_dim]);
    let text = noise(&[1, 32, config.joint_attention_dim]);
    let modulation = |steps: &[f32]| ModulationTable::compute(&weights, &config, steps, 2.5, &pooled).unwrap();
    c.bench_function("modulation/nano/8_steps", |b| b.iter(|| modulation(&[1000.0; 8])));
    for pixels in [128, 512] {
        let side = pixels / 16;
        let latents = noise(&[1, config.in_channels / 4, 2 * side, 2 * side]);
        let tokens = tokens::pack(&latents).unwrap();
        let reference = Reference { tokens: &tokens, rows: side, columns: side };
        let conditioning = transformer.condition(&text, Some(reference), (side, side), modulation(&[1000.0])).unwrap();
        c.bench_function(&format!("denoise_step/nano/{pixels}px"), |b| {
            b.iter(|| transformer.velocity(&tokens, &conditioning, 0).unwrap())
        });
    }
}

fn edit(c: &mut Criterion) {
    let picture = RgbImage::from_fn(PIXELS as u32, PIXELS as u32, |x, y| image::Rgb([2 * x as u8, 2 * y as u8, 90]));
    c.bench_function("resize/512_to_1024px", |b| {
        let picture = retouch::image::resize(&picture, 512, 512);
        b.iter(|| retouch::image::resize(&picture, 1024, 1024))
    });
    let request = EditRequest { prompt: PROMPT.into(), image: Some(picture), ..Default::default() };
    for (name, keep_loaded) in [("load_per_stage", false), ("keep_loaded", true)] {
        let options = EngineOptions { keep_loaded: keep_loaded.into(), ..Default::default() };
        let mut engine = Engine::open(&ModelSource::default(), options, &mut NoProgress).unwrap();
        c.bench_function(&format!("edit/nano/{PIXELS}px/{name}"), |b| {
            b.iter(|| engine.edit(&request, &mut Silent).unwrap())
        });
    }
}

criterion_group! {
    name = stages;
    config = Criterion::default().sample_size(10).warm_up_time(std::time::Duration::from_secs(1));
    targets = sampler, text, vae, denoise, edit
}
criterion_main!(stages);
