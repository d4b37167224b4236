//! What each type of weights costs and keeps: its size, the error of a matrix and of a transformer's step, and the time of a
//! linear layer beside dense ones, at FLUX.1's width; and an edit of nano-kontext beside the one with all bits.
//!
//! `cargo bench --bench quantised` prints two tables in some minutes; `-- fp8` only the second, of products of 8-bit floats
//! beside bf16. The wide transformer has one block of each kind and random
//! weights, normally distributed times a factor that is itself spread (the logarithm's standard deviation is 0.4), which makes
//! tails as heavy as trained weights have; no trained weights of that width are at hand.

use std::{collections::HashMap, time::Instant};

use candle_core::{DType, Device, Tensor};
use retouch::{
    EditRequest, Engine, EngineOptions, ModelSource, NoProgress, Precision, Seeds, Silent, Target, image,
    weights::{Component, Linear, Matrix, ModelFile, Store, Weights, naming::flux},
};
use retouch_flow::{FluxConfig, FluxTransformer, ModulationTable, tokens};
use retouch_kernels::{Activation, for_device};
use retouch_sampler::TorchGenerator;

const TARGETS: [&str; 12] =
    ["q8_0", "fp8_scaled", "fp8", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k"];
const PIXELS: usize = 256;
const TEXT_TOKENS: usize = 64;
/// Tokens of the layers that are timed: few, and as many as the wide transformer has here; a real edit has thousands.
const TOKENS: [usize; 2] = [64, 320];
const MATRIX: &str = "double_blocks.0.img_mlp.0";

fn main() {
    let (wide, nano) = (Wide::new(), Nano::new());
    if !std::env::args().any(|argument| argument == "fp8") {
        types(&wide, &nano);
    }
    products(&wide, &nano);
}

/// bf16, and fp8's bf16 with products of 8-bit floats, beside f32 and each other.
fn products(wide: &Wide, nano: &Nano) {
    println!("| computed in | beside | step error | nano step error | nano latents PSNR | nano image PSNR |");
    println!("|---|---|---|---|---|---|");
    let step = |dtype: DType, fp8: bool| {
        let weights = wide.weights.with_dtype(dtype);
        wide.velocity_of(&if fp8 { weights.in_fp8() } else { weights })
    };
    let edit = |precision| nano.edit(EngineOptions { precision: Some(precision), ..Default::default() });
    let steps = [step(DType::F32, false), step(DType::BF16, false), step(DType::BF16, true)];
    let edits = [Precision::F32, Precision::Bf16, Precision::Fp8].map(edit);
    let names = ["f32", "bf16", "fp8"];
    for (found, beside) in [(1, 0), (2, 0), (2, 1)] {
        let (edit, own) = (&edits[found], &edits[beside]);
        println!(
            "| {} | {} | {:.2} % | {:.2} % | {:.1} dB | {:.1} dB |",
            names[found],
            names[beside],
            100.0 * error(&steps[beside], &steps[found]),
            100.0 * error(&own["velocity.0"], &edit["velocity.0"]),
            psnr(&own["latents"], &edit["latents"]),
            psnr(&own["image"], &edit["image"]),
        );
    }
}

fn types(wide: &Wide, nano: &Nano) {
    let quantised = |quantize| EngineOptions { quantize, ..Default::default() };
    let exact = wide.velocity(None);
    let own = nano.edit(quantised(None));
    println!(
        "| type | bits | matrix error | step error | {} tokens | {} tokens | nano step error | nano latents PSNR | nano image PSNR |",
        TOKENS[0], TOKENS[1]
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let [few, many] = wide.layer_seconds(&wide.weights);
    let (ms, ratio) = (|[_, dense]: [f64; 2]| 1e3 * dense, |[own, dense]: [f64; 2]| own / dense);
    println!("| f32 | 32 | | | {:.1} ms | {:.1} ms | | | |", ms(few), ms(many));
    println!("| bf16 | 16 | | | {:.2} x | {:.2} x | | | |", ratio(few), ratio(many));
    for name in TARGETS {
        let target: Target = name.parse().unwrap();
        let weights = wide.weights.clone().quantised(Component::Transformer, target);
        let (bits, matrix) = wide.matrix_error(&weights);
        let step = error(&exact, &wide.velocity(Some(target)));
        let [few, many] = wide.layer_seconds(&weights);
        let edit = nano.edit(quantised(Some(target)));
        println!(
            "| {name} | {bits:.2} | {:.2} % | {:.2} % | {:.2} x | {:.2} x | {:.2} % | {:.1} dB | {:.1} dB |",
            100.0 * matrix,
            100.0 * step,
            ratio(few),
            ratio(many),
            100.0 * error(&own["velocity.0"], &edit["velocity.0"]),
            psnr(&own["latents"], &edit["latents"]),
            psnr(&own["image"], &edit["image"]),
        );
    }
}

fn rms(x: &Tensor) -> f64 {
    f64::from(x.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap()).sqrt()
}

/// Root mean square, relative.
fn error(exact: &Tensor, found: &Tensor) -> f64 {
    rms(&(exact - found).unwrap()) / rms(exact)
}

/// Of the exact values' own range.
fn psnr(exact: &Tensor, found: &Tensor) -> f64 {
    let of = |x: candle_core::Result<Tensor>| f64::from(x.unwrap().to_scalar::<f32>().unwrap());
    20.0 * ((of(exact.max_all()) - of(exact.min_all())) / rms(&(exact - found).unwrap())).log10()
}

fn noise(shape: &[usize]) -> Tensor {
    Tensor::from_vec(TorchGenerator::new(1).normal(shape.iter().product()), shape, &Device::Cpu).unwrap()
}

/// A transformer of FLUX.1's width.
struct Wide {
    weights: Weights,
    config: FluxConfig,
}

impl Wide {
    fn new() -> Self {
        let config = FluxConfig {
            in_channels: 64,
            num_layers: 1,
            num_single_layers: 1,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 4096,
            pooled_projection_dim: 768,
            guidance_embeds: true,
            axes_dims_rope: FluxConfig::real_axes(),
        };
        let normal = TorchGenerator::new(2).normal(1 << 21);
        let (values, spreads) = normal.split_at(1 << 20);
        let heavy: Vec<f32> = values.iter().zip(spreads).map(|(value, spread)| value * (0.4 * spread).exp()).collect();
        let heavy = Tensor::new(heavy, &Device::Cpu).unwrap();
        let heavy = (&heavy / rms(&heavy)).unwrap();
        let tensors: HashMap<String, Tensor> = flux::parameters(1, 1)
            .into_iter()
            .map(|name| {
                let shape = shape(&name, config.hidden());
                let count: usize = shape.iter().product();
                let repeated = heavy.repeat(count.div_ceil(1 << 20)).unwrap().narrow(0, 0, count).unwrap();
                let scale = match shape.as_slice() {
                    [_, input] => (*input as f64).powf(-0.5),
                    _ => 0.1,
                };
                let norm = if name.ends_with("scale") { 1.0 } else { 0.0 };
                let tensor = repeated.affine(scale, norm).unwrap().reshape(shape).unwrap();
                (name, tensor.to_dtype(DType::BF16).unwrap())
            })
            .collect();
        let place = tempfile::NamedTempFile::new().unwrap();
        candle_core::safetensors::save(&tensors, place.path()).unwrap();
        let store = Store::open(vec![ModelFile::open(place.path()).unwrap()]).unwrap();
        Self { weights: Component::Transformer.in_store(store, DType::F32, &Device::Cpu).unwrap(), config }
    }

    fn velocity(&self, target: Option<Target>) -> Tensor {
        let weights = match target {
            Some(target) => self.weights.clone().quantised(Component::Transformer, target),
            None => self.weights.clone(),
        };
        self.velocity_of(&weights)
    }

    fn velocity_of(&self, weights: &Weights) -> Tensor {
        let pooled = noise(&[1, self.config.pooled_projection_dim]).to_dtype(weights.dtype()).unwrap();
        let modulation = ModulationTable::compute(weights, &self.config, &[500.0], 2.5, &pooled).unwrap();
        let transformer = FluxTransformer::load(weights, &self.config).unwrap();
        let side = PIXELS / 16;
        let latents = tokens::pack(&noise(&[1, 16, 2 * side, 2 * side])).unwrap();
        let text = noise(&[1, TEXT_TOKENS, self.config.joint_attention_dim]);
        let conditioning = transformer.condition(&text, None, (side, side), modulation).unwrap();
        transformer.velocity(&latents, &conditioning, 0).unwrap()
    }

    fn shape(&self) -> (usize, usize) {
        (self.config.mlp(), self.config.hidden())
    }

    /// Bits a weight and the error of the values.
    fn matrix_error(&self, weights: &Weights) -> (f64, f64) {
        let Matrix::Packed(packed) = weights.pp(MATRIX).matrix(self.shape(), "weight").unwrap() else {
            panic!("{MATRIX} is dense")
        };
        let exact = self.weights.pp(MATRIX).get(self.shape(), "weight").unwrap();
        let bits = 8.0 * packed.bytes() as f64 / exact.elem_count() as f64;
        (bits, error(&exact, &packed.dequantise(DType::F32).unwrap()))
    }

    /// Seconds of the layer at each number of tokens, with these weights and dense in f32: of five runs of both, one after the
    /// other, the best.
    fn layer_seconds(&self, weights: &Weights) -> [[f64; 2]; 2] {
        let (output, input) = self.shape();
        let dense = self.weights.pp(MATRIX).get((output, input), "weight").unwrap();
        let bias = self.weights.pp(MATRIX).get(output, "bias").unwrap();
        let layer = Linear::load(&weights.pp(MATRIX), input, output).unwrap();
        TOKENS.map(|tokens| {
            let x = noise(&[1, tokens, input]);
            let mut best = [f64::INFINITY; 2];
            for _ in 0..5 {
                let start = Instant::now();
                layer.forward_gelu(&x).unwrap();
                best[0] = best[0].min(start.elapsed().as_secs_f64());
                let start = Instant::now();
                for_device(&Device::Cpu).linear(&x, &dense, Some(&bias), Activation::Gelu).unwrap();
                best[1] = best[1].min(start.elapsed().as_secs_f64());
            }
            best
        })
    }
}

fn shape(name: &str, hidden: usize) -> Vec<usize> {
    const SHAPES: [(&str, usize, usize); 14] = [
        // The end of a module's name, and its outputs and inputs: those up to 10 in widths of the token stream.
        ("img_in", 1, 64),
        ("txt_in", 1, 4096),
        ("vector_in.in_layer", 1, 768),
        (".in_layer", 1, 256),
        (".out_layer", 1, 1),
        ("adaLN_modulation.1", 2, 1),
        ("final_layer.linear", 64, 1),
        ("_mod.lin", 6, 1),
        ("modulation.lin", 3, 1),
        ("qkv", 3, 1),
        ("proj", 1, 1),
        ("mlp.0", 4, 1),
        ("linear1", 7, 1),
        ("linear2", 1, 5),
    ];
    let (module, leaf) = name.rsplit_once('.').unwrap();
    if leaf == "scale" {
        return vec![128];
    }
    let known = SHAPES.iter().find(|(end, ..)| module.ends_with(end));
    let (outputs, inputs) = known.map_or((1, 4), |(_, outputs, inputs)| (*outputs, *inputs)); // mlp.2
    let width = |size: usize| if size <= 10 { size * hidden } else { size };
    if leaf == "bias" { vec![width(outputs)] } else { vec![width(outputs), width(inputs)] }
}

/// An edit with the embedded model.
struct Nano(EditRequest);

impl Nano {
    fn new() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/images/scene.png");
        let picture = image::read_image(&std::fs::read(path).unwrap(), path).unwrap();
        let (prompt, seeds) = ("make the circle blue".to_string(), Seeds::Each(vec![1]));
        Self(EditRequest { prompt, image: Some(picture), seeds, ..Default::default() })
    }

    fn edit(&self, options: EngineOptions) -> std::collections::BTreeMap<String, Tensor> {
        let mut engine = Engine::open(&ModelSource::default(), options, &mut NoProgress).unwrap();
        engine.edit_traced(&self.0, &mut Silent).unwrap().1.tensors().unwrap()
    }
}
