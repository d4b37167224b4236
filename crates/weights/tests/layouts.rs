//! The same model in different files gives the same parameters.

use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use retouch_weights::{
    ClipShape, Component, Description, FluxShape, Folder, Kind, Matrix, ModelFile, Store, T5Shape, VaeShape, Weights,
    WeightsError, describe, detect,
};

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures").join(path)
}

fn in_folder(component: Component) -> Weights {
    component.in_folder(&Folder::on_disk(fixture("tiny-kontext")), DType::F32, &Device::Cpu).unwrap()
}

fn in_file(component: Component, path: &str) -> Weights {
    component.in_file(&fixture(path), DType::F32, &Device::Cpu).unwrap()
}

fn store(path: &str) -> Store {
    Store::open(vec![ModelFile::open(fixture(path)).unwrap()]).unwrap()
}

/// The largest difference between the parameters `names` of both.
fn distance<'a>(a: &Weights, b: &Weights, names: impl Iterator<Item = &'a str>) -> f32 {
    let mut largest = 0_f32;
    let mut compared = 0;
    for name in names {
        let shape = a.shape(name).unwrap_or_else(|| panic!("{name} is missing"));
        let (a, b): (Tensor, Tensor) = (a.get(shape.clone(), name).unwrap(), b.get(shape, name).unwrap());
        let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
        largest = largest.max(difference);
        compared += 1;
    }
    assert!(compared > 20, "only {compared} parameters were compared");
    largest
}

#[test]
fn a_bfl_transformer_equals_the_folders() {
    let (bfl, folder) = (
        in_file(Component::Transformer, "tiny-kontext/flux1-kontext-dev.safetensors"),
        in_folder(Component::Transformer),
    );
    // The code's names are BFL's.
    let names: Vec<String> = bfl.store().names().map(str::to_string).collect();
    assert_eq!(distance(&bfl, &folder, names.iter().map(String::as_str)), 0.0);
    assert_eq!(FluxShape::of(&bfl).unwrap(), FluxShape::of(&folder).unwrap());
}

/// Of one tensor, of stacked ones, and of swapped halves.
#[test]
fn matrices_stay_in_the_files_dtype_and_have_the_values_of_the_widened_ones() {
    for weights in [
        in_folder(Component::Transformer),
        in_file(Component::Transformer, "tiny-kontext/flux1-kontext-dev.safetensors"),
    ] {
        for name in ["double_blocks.1.img_mlp.0", "single_blocks.2.linear1", "final_layer.adaLN_modulation.1"] {
            let weights = weights.pp(name);
            let [out, input] = weights.shape("weight").unwrap()[..] else { panic!("{name} is no matrix") };
            let expected = weights.get((out, input), "weight").unwrap();
            let Matrix::Packed(packed) = weights.matrix((out, input), "weight").unwrap() else {
                panic!("{name} was widened")
            };
            assert_eq!(packed.bytes(), 2 * out * input);
            let found = packed.dequantise(DType::F32).unwrap();
            assert_eq!(found.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap(), "{name}");
            let same = weights.with_dtype(DType::BF16).matrix((out, input), "weight").unwrap();
            assert!(matches!(same, Matrix::Dense(weight) if weight.dtype() == DType::BF16));
            assert!(weights.matrix((input + 1, out), "weight").is_err());
        }
    }
}

#[test]
fn a_bfl_vae_equals_the_folders() {
    let (bfl, folder) = (in_file(Component::Vae, "tiny-kontext/ae.safetensors"), in_folder(Component::Vae));
    // The code's names are diffusers'.
    let names: Vec<String> = folder.store().names().map(str::to_string).collect();
    assert_eq!(distance(&folder, &bfl, names.iter().map(String::as_str)), 0.0);
    assert_eq!(VaeShape::of(&bfl).unwrap(), VaeShape::of(&folder).unwrap());
}

#[test]
fn comfyui_text_encoders_equal_the_folders() {
    for (component, file) in
        [(Component::Clip, "comfy/clip_l.safetensors"), (Component::T5, "comfy/t5xxl_fp16.safetensors")]
    {
        let (comfy, folder) = (in_file(component, file), in_folder(component));
        let names: Vec<String> = folder.store().names().map(str::to_string).collect();
        // f16 there, bf16 here: only the smallest values differ.
        let distance = distance(&folder, &comfy, names.iter().map(String::as_str));
        assert!(distance < 1e-6, "{file}: {distance}");
    }
}

#[test]
fn sizes_read_off_shapes_are_those_of_the_configs() {
    let config = |component: Component| -> serde_json::Value {
        Folder::on_disk(fixture("tiny-kontext")).sub(component.folder()).json("config.json").unwrap()
    };
    let number = |config: &serde_json::Value, key: &str| config[key].as_u64().unwrap() as usize;

    let (flux, c) = (FluxShape::of(&in_folder(Component::Transformer)).unwrap(), config(Component::Transformer));
    assert_eq!(flux.double_blocks, number(&c, "num_layers"));
    assert_eq!(flux.single_blocks, number(&c, "num_single_layers"));
    assert_eq!(flux.head_dim, number(&c, "attention_head_dim"));
    assert_eq!(flux.hidden, flux.head_dim * number(&c, "num_attention_heads"));
    assert_eq!(flux.in_channels, number(&c, "in_channels"));
    assert_eq!(flux.out_channels, flux.in_channels);
    assert_eq!(flux.joint_dim, number(&c, "joint_attention_dim"));
    assert_eq!(flux.pooled_dim, number(&c, "pooled_projection_dim"));
    assert_eq!((flux.guidance, flux.mlp_ratio, flux.time_dim), (true, 4.0, 256));

    let (vae, c) = (VaeShape::of(&in_folder(Component::Vae)).unwrap(), config(Component::Vae));
    assert_eq!(serde_json::json!(vae.channels), c["block_out_channels"]);
    assert_eq!(vae.layers_per_block, number(&c, "layers_per_block"));
    assert_eq!(vae.latent_channels, number(&c, "latent_channels"));
    assert_eq!(vae.image_channels, number(&c, "in_channels"));

    let (clip, c) = (ClipShape::of(&in_folder(Component::Clip)).unwrap(), config(Component::Clip));
    assert_eq!((clip.layers, clip.hidden), (number(&c, "num_hidden_layers"), number(&c, "hidden_size")));
    assert_eq!((clip.intermediate, clip.vocab), (number(&c, "intermediate_size"), number(&c, "vocab_size")));
    assert_eq!(clip.positions, number(&c, "max_position_embeddings"));

    let (t5, c) = (T5Shape::of(&in_folder(Component::T5)).unwrap(), config(Component::T5));
    assert_eq!((t5.layers, t5.d_model, t5.d_kv), (number(&c, "num_layers"), number(&c, "d_model"), number(&c, "d_kv")));
    assert_eq!((t5.heads, t5.d_ff, t5.vocab), (number(&c, "num_heads"), number(&c, "d_ff"), number(&c, "vocab_size")));
    assert_eq!(t5.buckets, number(&c, "relative_attention_num_buckets"));
}

#[test]
fn kinds_are_told_whatever_the_file_is_called() {
    let kind = |path: &str| detect(&store(path)).first().and_then(Kind::component);
    assert_eq!(kind("tiny-kontext/flux1-kontext-dev.safetensors"), Some(Component::Transformer));
    assert_eq!(kind("tiny-kontext/ae.safetensors"), Some(Component::Vae));
    assert_eq!(kind("comfy/clip_l.safetensors"), Some(Component::Clip));
    assert_eq!(kind("comfy/t5xxl_fp16.safetensors"), Some(Component::T5));
}

#[test]
fn a_file_for_another_option_is_named_as_what_it_is() {
    let refused =
        Component::Vae.in_file(&fixture("tiny-kontext/flux1-kontext-dev.safetensors"), DType::F32, &Device::Cpu);
    let Err(error @ WeightsError::WrongKind { .. }) = refused.map(|_| ()) else { panic!("not refused") };
    let message = error.to_string();
    assert!(
        message
            .ends_with("flux1-kontext-dev.safetensors holds a FLUX transformer, not a VAE; pass it as --transformer"),
        "{message}"
    );
}

/// A file with all four components, each behind a prefix, as all-in-one checkpoints have them.
#[test]
fn an_all_in_one_file_gives_each_component() {
    let parts = [
        (Component::Transformer, "tiny-kontext/flux1-kontext-dev.safetensors", "model.diffusion_model."),
        (Component::Vae, "tiny-kontext/ae.safetensors", "first_stage_model."),
        (Component::Clip, "comfy/clip_l.safetensors", "text_encoders.clip_l.transformer."),
        (Component::T5, "comfy/t5xxl_fp16.safetensors", "text_encoders.t5xxl.transformer."),
    ];
    let mut tensors = std::collections::HashMap::new();
    for (_, path, prefix) in parts {
        for (name, tensor) in candle_core::safetensors::load(fixture(path), &Device::Cpu).unwrap() {
            tensors.insert(format!("{prefix}{name}"), tensor);
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let whole = folder.path().join("whatever.bin");
    candle_core::safetensors::save(&tensors, &whole).unwrap();
    for (component, path, _) in parts {
        let (alone, inside) = (in_file(component, path), component.in_file(&whole, DType::F32, &Device::Cpu).unwrap());
        let names: Vec<String> = match component {
            Component::Vae => in_folder(component).store().names().map(str::to_string).collect(),
            _ => alone.store().names().map(str::to_string).collect(),
        };
        assert_eq!(distance(&alone, &inside, names.iter().map(String::as_str)), 0.0, "{component}");
    }
}

/// transformers 5 saves CLIP without `text_model.`; some T5 files have only the encoder's own name of the embedding.
#[test]
fn other_names_of_the_text_encoders_are_known() {
    let folder = tempfile::tempdir().unwrap();
    let renamed = |path: &str, from: &str, to: &str| {
        let tensors = candle_core::safetensors::load(fixture(path), &Device::Cpu).unwrap();
        let tensors = tensors.into_iter().map(|(name, tensor)| (name.replacen(from, to, 1), tensor)).collect();
        let file = folder.path().join("renamed");
        candle_core::safetensors::save(&tensors, &file).unwrap();
        file
    };
    for (component, path, from, to) in [
        (Component::Clip, "comfy/clip_l.safetensors", "text_model.", ""),
        (Component::T5, "comfy/t5xxl_fp16.safetensors", "shared.weight", "encoder.embed_tokens.weight"),
    ] {
        let file = renamed(path, from, to);
        let (alone, other) = (in_file(component, path), component.in_file(&file, DType::F32, &Device::Cpu).unwrap());
        let names: Vec<String> = alone.store().names().map(str::to_string).collect();
        assert_eq!(distance(&alone, &other, names.iter().map(String::as_str)), 0.0, "{component}");
    }
}

#[test]
fn files_and_folders_are_described() {
    let Description::Model(model) = describe(&fixture("tiny-kontext")).unwrap() else { panic!("not a model") };
    assert_eq!(model.components.len(), 4);
    let (_, transformer) = &model.components[0];
    assert_eq!(transformer.kind, "FLUX transformer");
    assert_eq!(transformer.bytes, 2 * transformer.parameters);
    assert_eq!(transformer.dtypes.keys().collect::<Vec<_>>(), ["BF16"]);

    let Description::Safetensors(file) = describe(&fixture("comfy/clip_l.safetensors")).unwrap() else {
        panic!("not a safetensors file")
    };
    assert_eq!((file.kind.as_str(), file.tensors), ("CLIP text encoder", 52));
    assert_eq!(file.metadata.get("format").map(String::as_str), Some("pt"));
    let Description::Gguf(file) = describe(&fixture("quantised/t5-q8_0.gguf")).unwrap() else {
        panic!("not a GGUF file")
    };
    assert_eq!((file.kind.as_str(), file.tensors), ("T5 text encoder", 30));
    assert_eq!(
        file.dtypes.iter().map(|(name, n)| (name.as_str(), *n)).collect::<Vec<_>>(),
        [("F16", 1), ("F32", 7), ("Q8_0", 22)]
    );
    let Description::Gguf(file) = describe(&fixture("quantised/blocks.gguf")).unwrap() else {
        panic!("not a GGUF file")
    };
    assert_eq!((file.kind.as_str(), file.parameters), ("test", 10 * 1024 + 3 * 15));
}
