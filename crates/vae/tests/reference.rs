//! Latents and images equal those of the reference implementation.

use std::{collections::HashMap, error::Error, fs, path::Path};

use candle_core::{DType, Device, Tensor};
use retouch_sampler::TorchGenerator;
use retouch_vae::{Tiling, VaeConfig, VaeDecoder, VaeEncoder};
use retouch_weights::{Component, Folder, Weights};

type Outcome = Result<(), Box<dyn Error>>;

/// What the reference computed in one whole call, and the file it lies in.
type Call = (String, HashMap<String, Tensor>);

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");

/// Largest difference over the largest magnitude. Measured: 1.6e-6 to encode, 0.9e-6 to decode.
const TOLERANCE: f64 = 1e-5;

fn tiny() -> Folder {
    Folder::on_disk(format!("{FIXTURES}/tiny-kontext"))
}

fn config() -> Result<VaeConfig, Box<dyn Error>> {
    Ok(tiny().json("vae/config.json")?)
}

fn weights(dtype: DType) -> Result<Weights, Box<dyn Error>> {
    Ok(Component::Vae.in_folder(&tiny(), dtype, &Device::Cpu)?)
}

/// Every whole call of the reference.
fn calls() -> Result<Vec<Call>, Box<dyn Error>> {
    let mut calls = Vec::new();
    for entry in fs::read_dir(format!("{FIXTURES}/kontext"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            calls.push((path.display().to_string(), candle_core::safetensors::load(&path, &Device::Cpu)?));
        }
    }
    assert!(!calls.is_empty());
    Ok(calls)
}

/// Random values, `deviation` from 0; the same at each run.
fn random(deviation: f64, shape: (usize, usize, usize, usize)) -> candle_core::Result<Tensor> {
    let (batch, channels, height, width) = shape;
    let values = TorchGenerator::new(0).normal(batch * channels * height * width);
    Tensor::from_vec(values, shape, &Device::Cpu)? * deviation
}

/// 8-bit `[h, w, 3]` to `[1, 3, h, w]` in [-1, 1].
fn pixels(image: &Tensor) -> candle_core::Result<Tensor> {
    ((image.to_dtype(DType::F32)? / 255.)? * 2.)?.affine(1., -1.)?.permute((2, 0, 1))?.unsqueeze(0)
}

/// Largest difference over the largest magnitude of `expected`.
fn distance(found: &Tensor, expected: &Tensor) -> candle_core::Result<f64> {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (found.to_dtype(DType::F64)?, expected.to_dtype(DType::F64)?);
    let largest = |x: Tensor| x.abs()?.max_all()?.to_scalar::<f64>();
    Ok(largest((found - &expected)?)? / largest(expected)?)
}

/// The largest distance of `encode` over all calls with a whole reference image.
fn encode_distance(encoder: &VaeEncoder) -> Result<f64, Box<dyn Error>> {
    let mut worst: f64 = 0.0;
    let mut images = 0;
    for (_, tensors) in calls()? {
        if let (Some(image), Some(latents)) = (tensors.get("image_resized_u8"), tensors.get("ref_latents")) {
            worst = worst.max(distance(&encoder.encode(&pixels(image)?)?, latents)?);
            images += 1;
        }
    }
    assert!(images > 5);
    Ok(worst)
}

/// The largest distance of `decode` over all calls; images are compared as they are stored, in [0, 1] and clamped.
fn decode_distance(decoder: &VaeDecoder) -> Result<f64, Box<dyn Error>> {
    let mut worst: f64 = 0.0;
    for (_, tensors) in calls()? {
        let image = decoder.decode(&tensors["latents"])?.affine(0.5, 0.5)?.clamp(0f32, 1f32)?;
        worst = worst.max(distance(&image, &tensors["image"])?);
    }
    Ok(worst)
}

#[test]
fn latents_equal_the_references() -> Outcome {
    let distance = encode_distance(&VaeEncoder::load(&weights(DType::F32)?, &config()?)?)?;
    assert!(distance < TOLERANCE, "{distance:e}");
    Ok(())
}

#[test]
fn images_equal_the_references() -> Outcome {
    let distance = decode_distance(&VaeDecoder::load(&weights(DType::F32)?, &config()?)?)?;
    assert!(distance < TOLERANCE, "{distance:e}");
    Ok(())
}

#[test]
fn the_file_of_black_forest_labs_gives_the_same() -> Outcome {
    let file = Path::new(FIXTURES).join("tiny-kontext/ae.safetensors");
    let single = Component::Vae.in_file(&file, DType::F32, &Device::Cpu)?;
    let folder = weights(DType::F32)?;
    let latents = random(1., (1, 16, 4, 6))?;
    let image = VaeDecoder::load(&folder, &config()?)?.decode(&latents)?;
    assert_eq!(distance(&VaeDecoder::load(&single, &config()?)?.decode(&latents)?, &image)?, 0.0);
    let latents = VaeEncoder::load(&folder, &config()?)?.encode(&image)?;
    assert_eq!(distance(&VaeEncoder::load(&single, &config()?)?.encode(&image)?, &latents)?, 0.0);
    // Its groups leave no trace in the shapes, and 32 do not divide the tiny one's channels.
    let refusal = VaeConfig::of(&single).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(refusal.contains("ae.safetensors: block_out_channels has 4"), "{refusal}");
    Ok(())
}

#[test]
fn several_images_at_once_equal_each_alone() -> Outcome {
    let (encoder, decoder) =
        (VaeEncoder::load(&weights(DType::F32)?, &config()?)?, VaeDecoder::load(&weights(DType::F32)?, &config()?)?);
    let image = random(0.5, (2, 3, 24, 40))?;
    let latents = encoder.encode(&image)?;
    assert_eq!(latents.dims(), [2, 16, 3, 5]);
    let decoded = decoder.decode(&latents)?;
    assert_eq!(decoded.dims(), image.dims());
    for i in 0..2 {
        let alone = encoder.encode(&image.narrow(0, i, 1)?)?;
        assert!(distance(&alone, &latents.narrow(0, i, 1)?)? < TOLERANCE);
        assert!(distance(&decoder.decode(&latents.narrow(0, i, 1)?)?, &decoded.narrow(0, i, 1)?)? < TOLERANCE);
    }
    Ok(())
}

/// Bands of the fewest rows, of which the largest layer of these images has ten.
fn bands() -> Tiling {
    Tiling::Bands { bytes: 1, home: Device::Cpu }
}

#[test]
fn bands_of_an_image_make_the_whole_ones_latents_and_pixels() -> Outcome {
    let weights = weights(DType::F32)?;
    let (encoder, decoder) = (VaeEncoder::load(&weights, &config()?)?, VaeDecoder::load(&weights, &config()?)?);
    // Sides that are multiples of the VAE's factor alone, so that the last band is cut; bright to the right and below,
    // so that no band has the mean of the whole.
    let (height, width) = (72, 56);
    let image = random(0.3, (2, 3, height, width))?;
    let slope = Tensor::arange(0f32, (height * width) as f32, &Device::Cpu)?.affine(2e-4, -0.4)?;
    let image = image.broadcast_add(&slope.reshape((1, 1, height, width))?)?;
    let latents = encoder.encode(&image)?;
    let pixels = decoder.decode(&latents)?;
    let (encoder, decoder) = (encoder.with_tiling(bands()), decoder.with_tiling(bands()));
    // Only the sums of the norms are taken in another order, and in f64: at most a rounding of f32 in each layer.
    let (latents_off, pixels_off) =
        (distance(&encoder.encode(&image)?, &latents)?, distance(&decoder.decode(&latents)?, &pixels)?);
    assert!(latents_off < 1e-6 && pixels_off < 1e-6, "{latents_off:e} {pixels_off:e}");
    Ok(())
}

#[test]
fn on_the_cpu_half_precision_is_computed_in_f32() -> Outcome {
    let image = random(0.5, (1, 3, 16, 24))?;
    let exact = VaeEncoder::load(&weights(DType::F32)?, &config()?)?.encode(&image)?;
    for dtype in [DType::BF16, DType::F16] {
        let encoder = VaeEncoder::load(&weights(dtype)?, &config()?)?;
        // The weights are exact in each dtype.
        assert_eq!(distance(&encoder.encode(&image)?, &exact)?, 0.0);
        let latents = encoder.encode(&image.to_dtype(dtype)?)?;
        assert_eq!(latents.dtype(), dtype);
        assert!(distance(&latents, &exact)? < 0.02);
        assert_eq!(VaeDecoder::load(&weights(dtype)?, &config()?)?.decode(&latents)?.dtype(), dtype);
    }
    Ok(())
}

#[test]
fn parameters_that_do_not_fit_are_named_with_their_file() -> Outcome {
    let message = |change: &dyn Fn(&mut VaeConfig)| -> Result<String, Box<dyn Error>> {
        let mut config = config()?;
        change(&mut config);
        let loaded = VaeEncoder::load(&weights(DType::F32)?, &config);
        Ok(loaded.err().map_or_else(|| "accepted".to_string(), |e| e.to_string()))
    };
    let wider = message(&|c| c.latent_channels = 15)?;
    assert!(wider.contains("diffusion_pytorch_model.safetensors: tensor `encoder.conv_out.weight`"), "{wider}");
    assert!(wider.contains("has shape [32, 8, 3, 3], expected [30, 8, 3, 3]"), "{wider}");
    let deeper = message(&|c| c.layers_per_block = 3)?;
    assert!(deeper.contains("`encoder.down_blocks.0.resnets.2.norm1.weight` is missing"), "{deeper}");
    let refused = message(&|c| c.norm_num_groups = 3)?;
    assert!(refused.contains("norm_num_groups (3)"), "{refused}");
    Ok(())
}

#[test]
fn shapes_that_cannot_be_computed_are_refused() -> Outcome {
    let (encoder, decoder) =
        (VaeEncoder::load(&weights(DType::F32)?, &config()?)?, VaeDecoder::load(&weights(DType::F32)?, &config()?)?);
    let zeros = |shape: (usize, usize, usize, usize)| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let message = |result: candle_core::Result<Tensor>| result.err().map(|e| e.to_string()).unwrap_or_default();
    for shape in [(1, 3, 17, 16), (1, 3, 16, 20), (1, 3, 0, 16), (1, 4, 16, 16)] {
        assert!(message(encoder.encode(&zeros(shape)?)).contains("cannot be encoded"), "{shape:?}");
    }
    for shape in [(1, 15, 2, 2), (1, 16, 0, 2)] {
        assert!(message(decoder.decode(&zeros(shape)?)).contains("cannot be decoded"), "{shape:?}");
    }
    Ok(())
}
