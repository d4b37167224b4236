//! From the names in LoRA files to the layers of the model, under the code's names.
//!
//! Files name a layer as Black Forest Labs do, as diffusers and transformers do, or as XLabs do, behind one of many
//! prefixes, and some trainers write underscores for dots. All of them are one name once the prefix is gone and the dots
//! are underscores: `lora_unet_double_blocks_7_img_attn_qkv` and `base_model.model.double_blocks.7.img_attn.qkv`.
//!
//! Source: diffusers, `loaders/lora_conversion_utils.py`; kohya's sd-scripts, `networks/lora_flux.py`.

use std::{collections::HashMap, ops::Range, sync::LazyLock};

use crate::{
    Component,
    naming::{Naming, Recipe, flux},
};

/// A layer or a norm of a model, or some of its rows.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    pub component: Component,
    /// The code's name, e.g. `double_blocks.7.img_attn.qkv`.
    pub module: String,
    pub part: Part,
}

/// Which rows of a parameter are meant: the code fuses matrices that diffusers keeps apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    All,
    Query,
    Key,
    Value,
    /// Of a single block's first matrix, without its MLP's rows.
    QueryKeyValue,
    Mlp,
    /// All, the halves the other way round: diffusers keeps (scale, shift) where the code keeps (shift, scale).
    SwappedHalves,
}

impl Part {
    /// The rows, where the code's matrix has the shape `[out, input]`; `None` if it has not that many.
    pub fn rows(self, out: usize, input: usize) -> Option<Range<usize>> {
        // Queries, keys and values are as wide as what they are made from.
        let at = |n: usize| input.saturating_mul(n);
        let rows = match self {
            Self::All | Self::SwappedHalves => 0..out,
            Self::Query => 0..input,
            Self::Key => input..at(2),
            Self::Value => at(2)..at(3),
            Self::QueryKeyValue => 0..at(3),
            Self::Mlp => at(3)..out,
        };
        (rows.start < rows.end && rows.end <= out).then_some(rows)
    }
}

impl Target {
    /// What a file calls `module`, or `None` for a name that no FLUX.1 model has.
    pub fn of(module: &str) -> Option<Self> {
        let (rest, component) = without_prefix(module);
        let name = rest.replace('.', "_");
        let target = lookup(&name)?;
        component.is_none_or(|component| component == target.component).then_some(target)
    }

    /// The code's name of the parameter that `weight` means: norms of heads call theirs a scale.
    pub fn weight(&self) -> String {
        let leaf = if is_head_norm(&self.module) { "scale" } else { "weight" };
        format!("{}.{leaf}", self.module)
    }

    pub fn bias(&self) -> String {
        format!("{}.bias", self.module)
    }
}

/// What stands before a layer's name, and the component that it means where it means one.
const PREFIXES: [(&str, Option<Component>); 18] = [
    // Longer ones before their own beginnings.
    ("base_model.model.transformer.", Some(Component::Transformer)),
    ("base_model.model.text_encoder.", Some(Component::Clip)),
    ("base_model.model.", None),
    ("model.diffusion_model.", Some(Component::Transformer)),
    ("diffusion_model.", Some(Component::Transformer)),
    ("transformer.", Some(Component::Transformer)),
    ("text_encoder.", Some(Component::Clip)),
    ("text_encoder_2.", Some(Component::T5)),
    ("text_encoders.clip_l.transformer.", Some(Component::Clip)),
    ("text_encoders.t5xxl.transformer.", Some(Component::T5)),
    ("lora_unet_", Some(Component::Transformer)),
    ("lora_transformer_", Some(Component::Transformer)),
    ("lycoris_", Some(Component::Transformer)),
    ("lora_te1_", Some(Component::Clip)),
    // kohya counts SD3's encoders, of which T5 is the third; OneTrainer counts FLUX's.
    ("lora_te2_", Some(Component::T5)),
    ("lora_te3_", Some(Component::T5)),
    ("lora_te_", Some(Component::Clip)),
    ("unet.", Some(Component::Transformer)),
];

fn without_prefix(module: &str) -> (&str, Option<Component>) {
    let stripped = PREFIXES.iter().find_map(|(prefix, part)| Some((module.strip_prefix(prefix)?, *part)));
    stripped.unwrap_or((module, None))
}

/// By a name with underscores: as it stands, else with the number of its block taken out.
fn lookup(name: &str) -> Option<Target> {
    if let Some(target) = KNOWN.get(name) {
        return Some(target.clone());
    }
    let number = name.split('_').find(|word| !word.is_empty() && word.bytes().all(|b| b.is_ascii_digit()))?;
    let block: u16 = number.parse().ok()?;
    let target = KNOWN.get(&name.replacen(&format!("_{number}_"), "_0_", 1))?;
    Some(Target { module: target.module.replacen(".0.", &format!(".{block}."), 1), ..target.clone() })
}

/// The layers of the models, with the blocks' number 0 for all, by each of their names.
static KNOWN: LazyLock<HashMap<String, Target>> = LazyLock::new(|| {
    let mut known = HashMap::new();
    let mut add = |name: &str, component, module: &str, part| {
        known.insert(name.replace('.', "_"), Target { component, module: module.to_string(), part });
    };
    for module in FLUX {
        add(module, Component::Transformer, module, Part::All);
        let leaf = if is_head_norm(module) { ".scale" } else { ".weight" };
        let recipe = flux::Diffusers.recipe(&format!("{module}{leaf}"));
        let parts: &[Part] = match recipe {
            Recipe::SwappedHalves(_) => &[Part::SwappedHalves],
            Recipe::Rows(_) => &[Part::Query, Part::Key, Part::Value, Part::Mlp],
            Recipe::Same(_) | Recipe::Reshaped(_) => &[Part::All],
        };
        for (name, &part) in recipe.parts().iter().zip(parts) {
            add(name.trim_end_matches(".weight"), Component::Transformer, module, part);
        }
    }
    for (name, module, part) in XLABS {
        add(name, Component::Transformer, module, part);
    }
    for module in CLIP {
        add(module, Component::Clip, module, Part::All);
        // transformers 5 has no `text_model`.
        add(module.trim_start_matches("text_model."), Component::Clip, module, Part::All);
    }
    for module in T5 {
        add(module, Component::T5, module, Part::All);
    }
    known
});

fn is_head_norm(module: &str) -> bool {
    module.ends_with(".query_norm") || module.ends_with(".key_norm")
}

const FLUX: [&str; 29] = [
    "img_in",
    "txt_in",
    "time_in.in_layer",
    "time_in.out_layer",
    "vector_in.in_layer",
    "vector_in.out_layer",
    "guidance_in.in_layer",
    "guidance_in.out_layer",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
    "double_blocks.0.img_mod.lin",
    "double_blocks.0.txt_mod.lin",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_attn.qkv",
    "double_blocks.0.img_attn.proj",
    "double_blocks.0.txt_attn.proj",
    "double_blocks.0.img_mlp.0",
    "double_blocks.0.img_mlp.2",
    "double_blocks.0.txt_mlp.0",
    "double_blocks.0.txt_mlp.2",
    "double_blocks.0.img_attn.norm.query_norm",
    "double_blocks.0.img_attn.norm.key_norm",
    "double_blocks.0.txt_attn.norm.query_norm",
    "double_blocks.0.txt_attn.norm.key_norm",
    "single_blocks.0.modulation.lin",
    "single_blocks.0.linear1",
    "single_blocks.0.linear2",
    "single_blocks.0.norm.query_norm",
    "single_blocks.0.norm.key_norm",
];

/// XLabs' LoRAs sit on attention: 1 is the image's stream, 2 the text's.
const XLABS: [(&str, &str, Part); 6] = [
    ("double_blocks.0.processor.qkv_lora1", "double_blocks.0.img_attn.qkv", Part::All),
    ("double_blocks.0.processor.qkv_lora2", "double_blocks.0.txt_attn.qkv", Part::All),
    ("double_blocks.0.processor.proj_lora1", "double_blocks.0.img_attn.proj", Part::All),
    ("double_blocks.0.processor.proj_lora2", "double_blocks.0.txt_attn.proj", Part::All),
    ("single_blocks.0.processor.qkv_lora", "single_blocks.0.linear1", Part::QueryKeyValue),
    ("single_blocks.0.processor.proj_lora", "single_blocks.0.linear2", Part::All),
];

const CLIP: [&str; 8] = [
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.0.self_attn.k_proj",
    "text_model.encoder.layers.0.self_attn.v_proj",
    "text_model.encoder.layers.0.self_attn.out_proj",
    "text_model.encoder.layers.0.mlp.fc1",
    "text_model.encoder.layers.0.mlp.fc2",
    "text_model.encoder.layers.0.layer_norm1",
    "text_model.encoder.layers.0.layer_norm2",
];

const T5: [&str; 7] = [
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.0.layer.0.SelfAttention.k",
    "encoder.block.0.layer.0.SelfAttention.v",
    "encoder.block.0.layer.0.SelfAttention.o",
    "encoder.block.0.layer.1.DenseReluDense.wi_0",
    "encoder.block.0.layer.1.DenseReluDense.wi_1",
    "encoder.block.0.layer.1.DenseReluDense.wo",
];

/// Models whose LoRAs people try here, by a piece of a name with underscores that only theirs have.
pub fn other_model(modules: &[&str]) -> Option<&'static str> {
    const MARKERS: [(&str, &str); 14] = [
        ("to_qkv_mlp_proj", "FLUX.2"),
        ("double_stream_modulation", "FLUX.2"),
        ("ff_linear_in", "FLUX.2"),
        ("distilled_guidance_layer", "Chroma"),
        ("img_mlp_fc1", "HunyuanVideo"),
        ("img_mlp_net", "Qwen-Image"),
        ("joint_blocks", "Stable Diffusion 3"),
        ("te2_text_model", "Stable Diffusion XL"),
        ("text_encoder_2_text_model", "Stable Diffusion XL"),
        ("input_blocks", "Stable Diffusion or Stable Diffusion XL"),
        ("down_blocks", "Stable Diffusion or Stable Diffusion XL"),
        ("cross_attn", "a video model such as Wan"),
        ("layers_0_attention_to_q", "Z-Image"),
        ("model_layers_0", "a language model"),
    ];
    let names: Vec<String> = modules.iter().map(|module| module.replace('.', "_")).collect();
    let has = |marker: &str| names.iter().any(|name| name.contains(marker));
    MARKERS.iter().find(|(marker, _)| has(marker)).map(|&(_, model)| model)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(module: &str) -> Option<(Component, String, Part)> {
        Target::of(module).map(|target| (target.component, target.module, target.part))
    }

    #[test]
    fn every_spelling_of_a_layer_leads_to_it() {
        let of = |module: &str, part| Some((Component::Transformer, module.to_string(), part));
        for (name, expected) in [
            ("lora_unet_double_blocks_18_img_attn_qkv", of("double_blocks.18.img_attn.qkv", Part::All)),
            ("double_blocks.1.img_attn.qkv", of("double_blocks.1.img_attn.qkv", Part::All)),
            ("base_model.model.double_blocks.0.txt_mlp.2", of("double_blocks.0.txt_mlp.2", Part::All)),
            ("diffusion_model.single_blocks.37.linear1", of("single_blocks.37.linear1", Part::All)),
            ("transformer.transformer_blocks.3.attn.to_k", of("double_blocks.3.img_attn.qkv", Part::Key)),
            ("transformer_blocks.3.attn.add_v_proj", of("double_blocks.3.txt_attn.qkv", Part::Value)),
            ("transformer.single_transformer_blocks.9.proj_mlp", of("single_blocks.9.linear1", Part::Mlp)),
            ("base_model.model.transformer_blocks.2.ff.net.0.proj", of("double_blocks.2.img_mlp.0", Part::All)),
            ("lora_transformer_single_transformer_blocks_4_attn_to_q", of("single_blocks.4.linear1", Part::Query)),
            ("lycoris_transformer_blocks_5_attn_to_out_0", of("double_blocks.5.img_attn.proj", Part::All)),
            ("transformer.norm_out.linear", of("final_layer.adaLN_modulation.1", Part::SwappedHalves)),
            ("lora_unet_final_layer_adaLN_modulation_1", of("final_layer.adaLN_modulation.1", Part::All)),
            ("transformer.time_text_embed.timestep_embedder.linear_2", of("time_in.out_layer", Part::All)),
            ("double_blocks.6.processor.proj_lora2", of("double_blocks.6.txt_attn.proj", Part::All)),
            ("single_blocks.6.processor.qkv_lora", of("single_blocks.6.linear1", Part::QueryKeyValue)),
        ] {
            assert_eq!(target(name), expected, "{name}");
            assert_eq!(other_model(&[name]), None, "{name}");
        }
        let clip = Some((Component::Clip, "text_model.encoder.layers.11.mlp.fc1".to_string(), Part::All));
        for name in [
            "lora_te1_text_model_encoder_layers_11_mlp_fc1",
            "text_encoder.text_model.encoder.layers.11.mlp.fc1",
            "text_encoder.encoder.layers.11.mlp.fc1",
            "text_encoders.clip_l.transformer.text_model.encoder.layers.11.mlp.fc1",
        ] {
            assert_eq!(target(name), clip, "{name}");
        }
        let t5 = Some((Component::T5, "encoder.block.20.layer.1.DenseReluDense.wi_0".to_string(), Part::All));
        assert_eq!(target("lora_te3_encoder_block_20_layer_1_DenseReluDense_wi_0"), t5);
    }

    #[test]
    fn names_of_other_models_lead_nowhere() {
        for name in [
            "",
            "0",
            "_0_",
            "lora_unet_",
            "transformer.",
            "lora_unet_input_blocks_4_1_proj_in",
            // The second encoder of Stable Diffusion XL, which has CLIP-L's names.
            "lora_te2_text_model_encoder_layers_0_mlp_fc1",
            "double_blocks.70000.img_attn.qkv",
            "double_blocks.x.img_attn.qkv",
            "time_text_embed.timestep_embedder.linear_7",
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
        ] {
            assert_eq!(target(name), None, "{name}");
        }
        assert_eq!(other_model(&["transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"]), Some("FLUX.2"));
        assert_eq!(other_model(&["lora_unet_double_blocks_0_img_mlp_fc1"]), Some("HunyuanVideo"));
        assert_eq!(other_model(&["double_blocks.0.something_new"]), None);
    }

    #[test]
    fn parts_are_rows_of_the_fused_matrix() {
        assert_eq!(Part::Value.rows(21 * 4, 12), Some(24..36));
        assert_eq!(Part::Mlp.rows(84, 12), Some(36..84));
        assert_eq!(Part::SwappedHalves.rows(24, 12), Some(0..24));
        // A matrix that is no fused one.
        assert_eq!(Part::Value.rows(12, 12), None);
        assert_eq!(Part::Mlp.rows(36, 12), None);
        assert_eq!(Part::Query.rows(0, usize::MAX), None);
    }
}
