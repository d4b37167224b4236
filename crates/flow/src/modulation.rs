//! What the blocks' modulation vectors depend on, and all of them for all steps at once.
//!
//! A block scales, shifts and gates its activations by vectors that depend on the timestep, the guidance scale and the
//! pooled prompt alone. Their linear layers hold 27 % of the model's parameters (3.25 of 11.9 billion in FLUX.1), so
//! all steps' vectors are computed before the loop, one block after the other, and those weights never stay in memory.
//!
//! Source: diffusers, `CombinedTimestepGuidanceTextProjEmbeddings`, `AdaLayerNormZero(Single)`, `AdaLayerNormContinuous`.

use candle_core::{DType, Device, Module, Tensor};
use half::{bf16, f16};
use retouch_weights::{Linear, Result, Weights};

use crate::FluxConfig;

/// Channels of the sinusoidal embedding of timestep and guidance.
const SINUSOID: usize = 256;

/// One shift-scale-gate triple, each `[1, hidden]`.
pub struct Modulation {
    pub shift: Tensor,
    pub scale: Tensor,
    pub gate: Tensor,
}

/// The modulation vectors of a whole edit: for each layer `[steps, n * hidden]`, `n` vectors a step.
pub struct ModulationTable {
    hidden: usize,
    double_image: Vec<Tensor>,
    double_text: Vec<Tensor>,
    single: Vec<Tensor>,
    last: Tensor,
}

impl ModulationTable {
    /// Computes the vectors of all steps.
    ///
    /// `timesteps` are the noise levels times 1000, `guidance` the scale as the user gives it (ignored by models that
    /// do not take one), `pooled` `[1, pooled_projection_dim]` in the weights' dtype.
    pub fn compute(
        weights: &Weights,
        config: &FluxConfig,
        timesteps: &[f32],
        guidance: f64,
        pooled: &Tensor,
    ) -> Result<Self> {
        let hidden = config.hidden();
        let vector = silu(&conditioning_vector(weights, config, timesteps, guidance, pooled)?)?;
        // The weights of each layer live only while its vectors are computed.
        let vectors = |layer: Weights, n: usize| -> Result<Tensor> {
            Ok(Linear::load(&layer, hidden, n * hidden)?.forward(&vector)?)
        };
        let double = |stream: &'static str| {
            (0..config.num_layers)
                .map(|i| vectors(weights.pp("double_blocks").pp(i).pp(stream).pp("lin"), 6))
                .collect::<Result<Vec<_>>>()
        };
        Ok(Self {
            hidden,
            double_image: double("img_mod")?,
            double_text: double("txt_mod")?,
            single: (0..config.num_single_layers)
                .map(|i| vectors(weights.pp("single_blocks").pp(i).pp("modulation").pp("lin"), 3))
                .collect::<Result<_>>()?,
            last: vectors(weights.pp("final_layer").pp("adaLN_modulation").pp(1), 2)?,
        })
    }

    pub(crate) fn double_image(&self, block: usize, step: usize) -> candle_core::Result<[Modulation; 2]> {
        Ok([self.triple(&self.double_image[block], step, 0)?, self.triple(&self.double_image[block], step, 3)?])
    }

    pub(crate) fn double_text(&self, block: usize, step: usize) -> candle_core::Result<[Modulation; 2]> {
        Ok([self.triple(&self.double_text[block], step, 0)?, self.triple(&self.double_text[block], step, 3)?])
    }

    pub(crate) fn single(&self, block: usize, step: usize) -> candle_core::Result<Modulation> {
        self.triple(&self.single[block], step, 0)
    }

    /// The shift and scale before the output projection.
    pub(crate) fn last(&self, step: usize) -> candle_core::Result<(Tensor, Tensor)> {
        Ok((self.vector(&self.last, step, 0)?, self.vector(&self.last, step, 1)?))
    }

    fn triple(&self, layer: &Tensor, step: usize, first: usize) -> candle_core::Result<Modulation> {
        Ok(Modulation {
            shift: self.vector(layer, step, first)?,
            scale: self.vector(layer, step, first + 1)?,
            gate: self.vector(layer, step, first + 2)?,
        })
    }

    fn vector(&self, layer: &Tensor, step: usize, index: usize) -> candle_core::Result<Tensor> {
        layer.narrow(0, step, 1)?.narrow(1, index * self.hidden, self.hidden)
    }
}

/// Embedded timestep + guidance + pooled prompt, for each timestep: `[steps, hidden]`.
fn conditioning_vector(
    weights: &Weights,
    config: &FluxConfig,
    timesteps: &[f32],
    guidance: f64,
    pooled: &Tensor,
) -> Result<Tensor> {
    let (dtype, device, hidden) = (weights.dtype(), weights.device(), config.hidden());
    let timesteps: Vec<f32> = timesteps.iter().map(|&t| timestep_as_seen(t, dtype)).collect();
    let time = sinusoid(&timesteps, device)?.to_dtype(dtype)?;
    let mut vector = embed(&weights.pp("time_in"), SINUSOID, hidden, &time)?;
    if config.guidance_embeds {
        let guidance = sinusoid(&[guidance_as_seen(guidance as f32, dtype)], device)?.to_dtype(dtype)?;
        vector = vector.broadcast_add(&embed(&weights.pp("guidance_in"), SINUSOID, hidden, &guidance)?)?;
    }
    let text = embed(&weights.pp("vector_in"), config.pooled_projection_dim, hidden, pooled)?;
    Ok(vector.broadcast_add(&text)?)
}

fn embed(weights: &Weights, input: usize, hidden: usize, x: &Tensor) -> Result<Tensor> {
    let x = Linear::load(&weights.pp("in_layer"), input, hidden)?.forward(x)?;
    Ok(Linear::load(&weights.pp("out_layer"), hidden, hidden)?.forward(&silu(&x)?)?)
}

fn silu(x: &Tensor) -> candle_core::Result<Tensor> {
    candle_nn::ops::silu(x)
}

/// The pipeline hands `t / 1000` to the model in the model's dtype, and the model multiplies by 1000 in that dtype: in
/// bf16 the timestep 612.87 becomes 612. The trained model expects exactly these rounded values.
fn timestep_as_seen(t: f32, dtype: DType) -> f32 {
    let round = |x| round_to(dtype, x);
    round(round(round(t) / 1000.0) * 1000.0)
}

/// The same for the guidance scale: 2.5 becomes 2496 in bf16.
fn guidance_as_seen(guidance: f32, dtype: DType) -> f32 {
    round_to(dtype, round_to(dtype, guidance) * 1000.0)
}

fn round_to(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(x).to_f32(),
        DType::F16 => f16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// `[cos | sin]` of `value * 10000^(-i / 128)`, `[values, 256]`, with arguments in f32 as in the reference.
fn sinusoid(values: &[f32], device: &Device) -> candle_core::Result<Tensor> {
    const HALF: usize = SINUSOID / 2;
    let frequencies: Vec<f32> =
        (0..HALF).map(|i| ((-(10_000f64.ln()) as f32 * i as f32) / HALF as f32).exp()).collect();
    let embedding: Vec<f32> = values
        .iter()
        .flat_map(|value| {
            let arguments = frequencies.iter().map(move |frequency| value * frequency);
            arguments.clone().map(f32::cos).chain(arguments.map(f32::sin))
        })
        .collect();
    Tensor::from_vec(embedding, (values.len(), SINUSOID), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_precision_rounds_timestep_and_guidance_as_the_reference_does() {
        assert_eq!(guidance_as_seen(2.5, DType::BF16), 2496.0);
        assert_eq!(timestep_as_seen(612.87, DType::BF16), 612.0);
        assert_eq!(guidance_as_seen(2.5, DType::F32), 2500.0);
    }

    #[test]
    fn the_sinusoid_equals_the_reference() -> candle_core::Result<()> {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/small/embeddings.safetensors");
        let stored = candle_core::safetensors::load(file, &Device::Cpu)?;
        let found = sinusoid(&stored["timesteps"].to_vec1::<f32>()?, &Device::Cpu)?;
        // The largest argument is 10000: its last bit is 1e-3 of a radian's bits away from cosine's own rounding.
        let worst = (found - &stored["sinusoid"])?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        assert!(worst < 1e-3, "{worst:e}");
        Ok(())
    }
}
