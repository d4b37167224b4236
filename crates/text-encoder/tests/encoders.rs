//! Embeddings equal those of the reference implementation.

#[path = "../../weights/tests/support/feed.rs"]
mod feed;

use std::{collections::HashMap, error::Error, fs, path::Path, sync::Mutex};

use candle_core::{DType, Device, Tensor};
use retouch_kernels::{Kernels, for_device};
use retouch_text_encoder::{ClipConfig, ClipEncoder, T5Config, T5Encoder};
use retouch_weights::{Component, Folder, Weights};

use feed::HostFeed;

type Outcome = Result<(), Box<dyn Error>>;

/// What the reference computed in one whole call, and the file it lies in.
type Call = (String, HashMap<String, Tensor>);

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures");

/// Largest difference over the largest magnitude. Measured: 1e-6 for CLIP; 3e-5 for T5 with 512 tokens, as far as the
/// reference in f32 is from itself in f64 (its scores are not scaled, so small differences in them grow).
const CLIP_TOLERANCE: f64 = 1e-5;
const T5_TOLERANCE: f64 = 1e-4;

fn tiny() -> Folder {
    Folder::on_disk(format!("{FIXTURES}/tiny-kontext"))
}

fn clip(weights: &Weights) -> Result<ClipEncoder, Box<dyn Error>> {
    Ok(ClipEncoder::load(weights, &tiny().json::<ClipConfig>("text_encoder/config.json")?)?)
}

fn t5(weights: &Weights) -> Result<T5Encoder, Box<dyn Error>> {
    Ok(T5Encoder::load(weights, &tiny().json::<T5Config>("text_encoder_2/config.json")?)?)
}

fn weights(component: Component, dtype: DType) -> Result<Weights, Box<dyn Error>> {
    Ok(component.in_folder(&tiny(), dtype, &Device::Cpu)?)
}

/// Every whole call of the reference in `folder`.
fn calls(folder: &str) -> Result<Vec<Call>, Box<dyn Error>> {
    let mut calls = Vec::new();
    for entry in fs::read_dir(format!("{FIXTURES}/{folder}"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            calls.push((path.display().to_string(), candle_core::safetensors::load(&path, &Device::Cpu)?));
        }
    }
    assert!(!calls.is_empty());
    Ok(calls)
}

/// Largest difference over the largest magnitude of `expected`.
fn distance(found: &Tensor, expected: &Tensor) -> candle_core::Result<f64> {
    assert_eq!(found.dims(), expected.dims());
    let (found, expected) = (found.to_dtype(DType::F64)?, expected.to_dtype(DType::F64)?);
    let largest = |x: Tensor| x.abs()?.max_all()?.to_scalar::<f64>();
    Ok(largest((found - &expected)?)? / largest(expected)?)
}

#[test]
fn clips_pooled_vectors_equal_the_references() -> Outcome {
    let encoder = clip(&weights(Component::Clip, DType::F32)?)?;
    for (call, tensors) in calls("kontext")? {
        for prefix in ["", "negative_"] {
            let Some(ids) = tensors.get(&format!("{prefix}clip_ids")) else { continue };
            let distance = distance(&encoder.pooled(ids)?, &tensors[&format!("{prefix}clip_pooled")])?;
            assert!(distance < CLIP_TOLERANCE, "{call}: {distance:e}");
        }
    }
    Ok(())
}

#[test]
fn t5_blocks_that_are_read_for_each_text_compute_the_same_bits() -> Outcome {
    let weights = weights(Component::T5, DType::F32)?;
    let config = tiny().json::<T5Config>("text_encoder_2/config.json")?;
    let ids = Tensor::arange(0u32, 24, &Device::Cpu)?.unsqueeze(0)?;
    let resident = T5Encoder::load(&weights, &config)?.embed(&ids)?;
    // As on a device whose memory is the host's, and as on one to which blocks are sent.
    let feed = HostFeed::new(true);
    for weights in [weights.clone(), weights.with_feed(feed.clone())] {
        let streamed = T5Encoder::load_resident(&weights, &config, Some(1))?;
        for _ in 0..2 {
            assert_eq!(distance(&streamed.embed(&ids)?, &resident)?, 0.0);
        }
    }
    assert_ne!(feed.sent(), (0, 0));
    Ok(())
}

#[test]
fn t5s_embeddings_equal_the_references() -> Outcome {
    let encoder = t5(&weights(Component::T5, DType::F32)?)?;
    for (call, tensors) in calls("kontext")? {
        for prefix in ["", "negative_"] {
            let Some(ids) = tensors.get(&format!("{prefix}t5_ids")) else { continue };
            let distance = distance(&encoder.embed(ids)?, &tensors[&format!("{prefix}t5_embeds")])?;
            assert!(distance < T5_TOLERANCE, "{call}: {distance:e}");
        }
    }
    Ok(())
}

/// Its table and matrices stay in blocks; what it computes is what the widened values give.
#[test]
fn a_quantised_t5_embeds_as_its_values_do() -> Outcome {
    let file = format!("{FIXTURES}/quantised/t5-q8_0.gguf");
    let packed = Component::T5.in_file(file.as_ref(), DType::F32, &Device::Cpu)?;
    let mut values = HashMap::new();
    for name in weights(Component::T5, DType::F32)?.store().names() {
        let shape = packed.shape(name).ok_or("a parameter is missing")?;
        values.insert(name.to_string(), packed.get(shape, name)?);
    }
    let folder = tempfile::tempdir()?;
    let wide = folder.path().join("t5.safetensors");
    candle_core::safetensors::save(&values, &wide)?;
    let wide = t5(&Component::T5.in_file(&wide, DType::F32, &Device::Cpu)?)?;
    assert_eq!(T5Config::of(&packed)?, tiny().json::<T5Config>("text_encoder_2/config.json")?);
    let packed = t5(&packed)?;
    for (call, tensors) in calls("kontext")? {
        let ids = &tensors["t5_ids"];
        let found = packed.embed(ids)?;
        let distance = distance(&found, &wide.embed(ids)?)?;
        assert!(distance < T5_TOLERANCE, "{call}: {distance:e}");
        // Of the original weights it is as far away as 8 bits are.
        assert!(mean_distance(&found, &tensors["t5_embeds"])? > 1e-3, "{call}");
    }
    Ok(())
}

#[test]
fn several_texts_at_once_equal_each_alone() -> Outcome {
    let (clip, t5) = (clip(&weights(Component::Clip, DType::F32)?)?, t5(&weights(Component::T5, DType::F32)?)?);
    let calls = calls("kontext")?;
    let of = |name: &str| calls.iter().find_map(|(call, t)| call.contains(name).then_some(t)).ok_or("no such call");
    let (first, second) = (of("no_image")?, of("unicode")?);
    let both = |name: &str| Tensor::cat(&[&first[name], &second[name]], 0);
    assert!(distance(&clip.pooled(&both("clip_ids")?)?, &both("clip_pooled")?)? < CLIP_TOLERANCE);
    assert!(distance(&t5.embed(&both("t5_ids")?)?, &both("t5_embeds")?)? < T5_TOLERANCE);
    Ok(())
}

/// Root of the mean square of the difference, over that of `expected`: what rounding everywhere in a half-precision
/// computation amounts to, where the largest difference is a matter of luck.
fn mean_distance(found: &Tensor, expected: &Tensor) -> candle_core::Result<f64> {
    let (found, expected) = (found.to_dtype(DType::F64)?, expected.to_dtype(DType::F64)?);
    let mean = |x: Tensor| x.sqr()?.mean_all()?.sqrt()?.to_scalar::<f64>();
    Ok(mean((found - &expected)?)? / mean(expected)?)
}

#[test]
fn in_bf16_they_lose_about_what_the_reference_does() -> Outcome {
    let (clip, t5) = (clip(&weights(Component::Clip, DType::BF16)?)?, t5(&weights(Component::T5, DType::BF16)?)?);
    // Over all calls together: how rounding turns out for a single text is a matter of luck.
    let mut losses = HashMap::from([("clip_pooled", (0.0, 0.0)), ("t5_embeds", (0.0, 0.0))]);
    for (call, half) in calls("kontext_bf16")? {
        let exact = candle_core::safetensors::load(call.replace("kontext_bf16", "kontext"), &Device::Cpu)?;
        let (pooled, embeds) = (clip.pooled(&exact["clip_ids"])?, t5.embed(&exact["t5_ids"])?);
        assert_eq!((pooled.dtype(), embeds.dtype()), (DType::BF16, DType::BF16));
        for (name, found) in [("clip_pooled", pooled), ("t5_embeds", embeds)] {
            let (ours, theirs) = losses.entry(name).or_default();
            *ours += mean_distance(&found, &exact[name])?;
            *theirs += mean_distance(&half[name], &exact[name])?;
        }
    }
    for (name, (ours, theirs)) in losses {
        assert!(ours < 1.25 * theirs, "{name}: {ours}, the reference {theirs}");
    }
    Ok(())
}

/// The CPU's attention, and what it was asked for: the dtypes, and the shape of the bias.
#[derive(Debug, Default)]
struct Recorder(Mutex<Vec<([DType; 4], Vec<usize>)>>);

impl Kernels for Recorder {
    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        bias: Option<&Tensor>,
        scale: f64,
    ) -> candle_core::Result<Tensor> {
        let Some(bias) = bias else { candle_core::bail!("an encoder's attention has a bias") };
        assert!([q, k, v, bias].iter().all(|x| x.is_contiguous()));
        self.0.lock().unwrap().push(([q, k, v, bias].map(|x| x.dtype()), bias.dims().to_vec()));
        for_device(&Device::Cpu).attention(q, k, v, Some(bias), scale)
    }
}

#[test]
fn in_bf16_attention_and_its_bias_are_bf16_as_the_fused_kernel_takes_them() -> Outcome {
    let recorder: &'static Recorder = Box::leak(Box::default());
    let weights = |component| Ok::<_, Box<dyn Error>>(weights(component, DType::BF16)?.with_kernels(recorder));
    let ids = Tensor::arange(0u32, 24, &Device::Cpu)?.unsqueeze(0)?;
    let heads = tiny().json::<T5Config>("text_encoder_2/config.json")?.num_heads;
    t5(&weights(Component::T5)?)?.embed(&ids)?;
    let of_t5 = std::mem::take(&mut *recorder.0.lock().unwrap());
    clip(&weights(Component::Clip)?)?.pooled(&ids)?;
    let of_clip = std::mem::take(&mut *recorder.0.lock().unwrap());
    for (calls, heads) in [(of_t5, heads), (of_clip, 1)] {
        assert!(!calls.is_empty());
        assert!(calls.iter().all(|call| *call == ([DType::BF16; 4], vec![1, heads, 24, 24])), "{calls:?}");
    }
    Ok(())
}

#[test]
fn in_f16_they_stay_near_the_reference() -> Outcome {
    let (clip, t5) = (clip(&weights(Component::Clip, DType::F16)?)?, t5(&weights(Component::T5, DType::F16)?)?);
    for (call, exact) in calls("kontext")? {
        let (pooled, embeds) = (clip.pooled(&exact["clip_ids"])?, t5.embed(&exact["t5_ids"])?);
        assert_eq!((pooled.dtype(), embeds.dtype()), (DType::F16, DType::F16));
        for (ours, name) in [(pooled, "clip_pooled"), (embeds, "t5_embeds")] {
            let distance = mean_distance(&ours, &exact[name])?;
            assert!(distance < 0.005, "{call}, {name}: {distance}");
        }
    }
    Ok(())
}

#[test]
fn f16_does_not_overflow_where_the_second_matrix_makes_large_values() -> Outcome {
    // 3000 times as large an output of one feed-forward leaves f16's range (65504) for the sum, not for f32's.
    let folder = tempfile::tempdir()?;
    let source = tiny().sub("text_encoder_2");
    let mut tensors = HashMap::new();
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        tensors.extend(candle_core::safetensors::load_buffer(&source.open(shard)?.bytes, &Device::Cpu)?);
    }
    let name = "encoder.block.1.layer.1.DenseReluDense.wo.weight";
    let larger = (tensors[name].to_dtype(DType::F32)? * 3e5)?;
    assert!(larger.abs()?.max_all()?.to_scalar::<f32>()? > 65504.0);
    tensors.insert(name.to_string(), larger);
    fs::create_dir(folder.path().join("text_encoder_2"))?;
    candle_core::safetensors::save(&tensors, folder.path().join("text_encoder_2/model.safetensors"))?;
    let (model, config) = (Folder::on_disk(folder.path()), tiny().json::<T5Config>("text_encoder_2/config.json")?);
    let load = |dtype| T5Encoder::load(&Component::T5.in_folder(&model, dtype, &Device::Cpu)?, &config);
    let ids = Tensor::new(&[[5u32, 7, 9, 1, 0, 0]], &Device::Cpu)?;
    let (half, exact) = (load(DType::F16)?.embed(&ids)?, load(DType::F32)?.embed(&ids)?);
    let distance = distance(&half, &exact)?;
    assert!(distance < 0.01, "{distance:e}");
    Ok(())
}

#[test]
fn a_prompt_ends_at_the_configured_end_token() -> Outcome {
    let weights = weights(Component::Clip, DType::F32)?;
    let config = tiny().json::<ClipConfig>("text_encoder/config.json")?;
    let ids = Tensor::new(&[[912u32, 5, 913, 7, 913]], &Device::Cpu)?;
    let up_to = |tokens| ids.narrow(1, 0, tokens);
    let pooled = |eos_token_id, ids: &Tensor| -> Result<Tensor, Box<dyn Error>> {
        Ok(ClipEncoder::load(&weights, &ClipConfig { eos_token_id, ..config.clone() })?.pooled(ids)?)
    };
    // Attention is causal: what comes after the end does not change it.
    let at_third = pooled(2, &up_to(3)?)?;
    assert!(distance(&pooled(2, &ids)?, &at_third)? < CLIP_TOLERANCE);
    assert!(distance(&pooled(913, &ids)?, &at_third)? < CLIP_TOLERANCE);
    assert!(distance(&pooled(7, &ids)?, &at_third)? > 0.01);
    // None is there: the first token, as in the reference.
    assert!(distance(&pooled(800, &ids)?, &pooled(912, &ids)?)? == 0.0);
    Ok(())
}

#[test]
fn both_gelus_are_computed() -> Outcome {
    let weights = weights(Component::Clip, DType::F32)?;
    let config: ClipConfig = tiny().json("text_encoder/config.json")?;
    let json = fs::read_to_string(format!("{FIXTURES}/tiny-kontext/text_encoder/config.json"))?;
    let exact: ClipConfig = serde_json::from_str(&json.replace("quick_gelu", "gelu"))?;
    let ids = Tensor::new(&[[912u32, 5, 913]], &Device::Cpu)?;
    let pooled = |config| -> Result<Tensor, Box<dyn Error>> { Ok(ClipEncoder::load(&weights, config)?.pooled(&ids)?) };
    // Alike, not the same.
    let distance = distance(&pooled(&exact)?, &pooled(&config)?)?;
    assert!((1e-4..0.1).contains(&distance), "{distance:e}");
    assert!(serde_json::from_str::<ClipConfig>(&json.replace("quick_gelu", "relu")).is_err());
    Ok(())
}

#[test]
fn single_files_bring_their_sizes() -> Outcome {
    let file = Path::new(FIXTURES).join("comfy/t5xxl_fp16.safetensors");
    let weights = Component::T5.in_file(&file, DType::F32, &Device::Cpu)?;
    let config = T5Config::of(&weights)?;
    assert_eq!(config, tiny().json::<T5Config>("text_encoder_2/config.json")?);
    let (_, tensors) = calls("kontext")?.into_iter().next().ok_or("no call")?;
    let distance = distance(&T5Encoder::load(&weights, &config)?.embed(&tensors["t5_ids"])?, &tensors["t5_embeds"])?;
    assert!(distance < T5_TOLERANCE, "{distance:e}");

    // The tiny CLIP's heads are not as wide as those of any real one, and leave no trace in the shapes.
    let file = Path::new(FIXTURES).join("comfy/clip_l.safetensors");
    let weights = Component::Clip.in_file(&file, DType::F32, &Device::Cpu)?;
    let refusal = ClipConfig::of(&weights).err().map(|e| e.to_string()).unwrap_or_default();
    assert!(refusal.contains("clip_l.safetensors: its width is 32, and CLIP's is a multiple of 64"), "{refusal}");
    Ok(())
}

fn refusal<T>(loaded: retouch_weights::Result<T>) -> String {
    loaded.err().map_or_else(|| "accepted".to_string(), |e| e.to_string())
}

#[test]
fn configurations_that_cannot_be_computed_are_refused() -> Outcome {
    let (clip_weights, t5_weights) = (weights(Component::Clip, DType::F32)?, weights(Component::T5, DType::F32)?);
    let clip = |change: &dyn Fn(&mut ClipConfig)| -> Result<String, Box<dyn Error>> {
        let mut config: ClipConfig = tiny().json("text_encoder/config.json")?;
        change(&mut config);
        Ok(refusal(ClipEncoder::load(&clip_weights, &config)))
    };
    let t5 = |change: &dyn Fn(&mut T5Config)| -> Result<String, Box<dyn Error>> {
        let mut config: T5Config = tiny().json("text_encoder_2/config.json")?;
        change(&mut config);
        Ok(refusal(T5Encoder::load(&t5_weights, &config)))
    };
    assert_eq!(clip(&|_| ())?, "accepted");
    assert_eq!(t5(&|_| ())?, "accepted");
    assert!(clip(&|c| c.num_attention_heads = 0)?.contains("num_attention_heads is 0"));
    assert!(clip(&|c| c.num_attention_heads = 5)?.contains("not a multiple of num_attention_heads (5)"));
    assert!(clip(&|c| c.hidden_size = usize::MAX)?.contains("hidden_size"));
    assert!(t5(&|c| c.num_heads = 0)?.contains("num_heads is 0"));
    assert!(t5(&|c| c.d_kv = usize::MAX)?.contains("d_kv"));
    assert!(t5(&|c| c.relative_attention_num_buckets = 2)?.contains("relative_attention_num_buckets is 2"));
    assert!(t5(&|c| c.relative_attention_max_distance = 8)?.contains("relative_attention_max_distance 8"));
    assert!(t5(&|c| c.feed_forward_proj = "relu".into())?.contains("`relu`; supported is `gated-gelu`"));
    Ok(())
}

#[test]
fn parameters_that_do_not_fit_are_named_with_their_file() -> Outcome {
    let (clip_weights, t5_weights) = (weights(Component::Clip, DType::F32)?, weights(Component::T5, DType::F32)?);
    let clip_config: ClipConfig = tiny().json("text_encoder/config.json")?;
    let t5_config: T5Config = tiny().json("text_encoder_2/config.json")?;
    let wider = ClipConfig { intermediate_size: 65, ..clip_config.clone() };
    let message = refusal(ClipEncoder::load(&clip_weights, &wider));
    assert!(message.contains("model.safetensors: tensor `text_model.encoder.layers.0.mlp.fc1.weight`"), "{message}");
    assert!(message.contains("has shape [64, 32], expected [65, 32]"), "{message}");
    let deeper = ClipConfig { num_hidden_layers: 1 << 20, ..clip_config };
    let message = refusal(ClipEncoder::load(&clip_weights, &deeper));
    assert!(message.contains("tensor `text_model.encoder.layers.3.") && message.contains("is missing"), "{message}");
    let deeper = T5Config { num_layers: 1 << 20, ..t5_config.clone() };
    let message = refusal(T5Encoder::load(&t5_weights, &deeper));
    assert!(message.contains("tensor `encoder.block.3.") && message.contains("is missing"), "{message}");
    let wider = T5Config { num_heads: 8, d_kv: 4, ..t5_config };
    let message = refusal(T5Encoder::load(&t5_weights, &wider));
    assert!(message.contains("relative_attention_bias.weight` has shape [32, 4], expected [32, 8]"), "{message}");
    Ok(())
}

#[test]
fn ids_outside_the_vocabulary_and_texts_too_long_are_refused() -> Outcome {
    let (clip, t5) = (clip(&weights(Component::Clip, DType::F32)?)?, t5(&weights(Component::T5, DType::F32)?)?);
    let message = |result: candle_core::Result<Tensor>| result.err().map(|e| e.to_string()).unwrap_or_default();
    let stranger = Tensor::new(&[[1u32 << 30]], &Device::Cpu)?;
    assert!(message(clip.pooled(&stranger)).contains("outside the text encoder's vocabulary of 914"));
    assert!(message(t5.embed(&stranger)).contains("outside the text encoder's vocabulary"));
    assert!(message(clip.pooled(&Tensor::zeros((1, 78), DType::U32, &Device::Cpu)?)).contains("78 tokens for CLIP"));
    Ok(())
}
