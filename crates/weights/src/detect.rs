//! What a file holds, told from its tensors' names, and the weights of one component ready to be read.

use std::path::Path;

use candle_core::{DType, Device};

use crate::{
    Folder, ModelFile, Result, Store, Weights, WeightsError,
    lora::is_lora_key,
    naming::{Naming, Prefixed, SameNames, clip, flux, t5, vae},
};

/// Whose names (and layout) a file uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Black Forest Labs' own, as in `flux1-kontext-dev.safetensors`.
    Bfl,
    /// That of diffusers' model folders.
    Diffusers,
    /// llama.cpp's, as in GGUF files of text encoders.
    LlamaCpp,
}

/// One thing that a file holds; `prefix` stands before the names of all of its tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    FluxTransformer {
        layout: Layout,
        prefix: String,
    },
    Vae {
        layout: Layout,
        prefix: String,
    },
    Clip {
        prefix: String,
    },
    T5 {
        layout: Layout,
        prefix: String,
    },
    /// A LoRA or another low-rank adapter.
    Lora,
    /// Nothing that this crate reads; the name of the model where it is recognised.
    Unknown {
        model: Option<&'static str>,
    },
}

/// The four parts of a FLUX model that have weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Component {
    Transformer,
    Vae,
    Clip,
    T5,
}

/// All that the store holds; never empty. A file may hold several components.
pub fn detect(store: &Store) -> Vec<Kind> {
    let mut kinds = Vec::new();
    let first = |marker: &str| store.prefixes_of(marker).first().map(|prefix| prefix.to_string());

    // FLUX.2, Chroma and HunyuanVideo have blocks of the same names; only FLUX.1's have this layer.
    if let Some(prefix) = first("double_blocks.0.img_mod.lin.weight") {
        kinds.push(Kind::FluxTransformer { layout: Layout::Bfl, prefix });
    }
    // Stable Diffusion 3 shares the first of these, not the second.
    if let Some(prefix) = first("transformer_blocks.0.norm1_context.linear.weight")
        && store.has(&format!("{prefix}x_embedder.weight"))
    {
        kinds.push(Kind::FluxTransformer { layout: Layout::Diffusers, prefix });
    }
    for (layout, marker) in [
        (Layout::Bfl, "decoder.up.0.block.0.conv1.weight"),
        (Layout::Diffusers, "decoder.up_blocks.0.resnets.0.conv1.weight"),
    ] {
        // Rank 4: video models' VAEs have the same names on convolutions of rank 5.
        if let Some(prefix) = first(marker)
            && store.shape(&format!("{prefix}{marker}")).is_some_and(|shape| shape.len() == 4)
        {
            kinds.push(Kind::Vae { layout, prefix });
        }
    }
    let mut clips = store.prefixes_of("embeddings.token_embedding.weight");
    // Files for other models hold CLIP-G beside CLIP-L, and name them.
    clips.sort_by_key(|prefix| !prefix.contains("clip_l"));
    if let Some(prefix) = clips.first() {
        kinds.push(Kind::Clip { prefix: prefix.to_string() });
    }
    for (layout, marker) in [
        (Layout::Diffusers, "encoder.block.0.layer.0.SelfAttention.q.weight"),
        (Layout::LlamaCpp, "enc.blk.0.attn_q.weight"),
    ] {
        if let Some(prefix) = first(marker) {
            kinds.push(Kind::T5 { layout, prefix });
        }
    }
    if kinds.is_empty() {
        kinds.push(if store.names().any(is_lora_key) {
            Kind::Lora
        } else {
            Kind::Unknown { model: other_model(store) }
        });
    }
    kinds
}

/// Models that people mistake for FLUX.1's parts, by a tensor that only they have.
fn other_model(store: &Store) -> Option<&'static str> {
    const MARKERS: [(&str, &str); 12] = [
        ("double_stream_modulation_img.lin.weight", "FLUX.2 transformer"),
        ("double_stream_modulation_img.linear.weight", "FLUX.2 transformer"),
        ("distilled_guidance_layer.in_proj.weight", "Chroma transformer"),
        ("transformer_blocks.0.img_mod.1.weight", "Qwen-Image transformer"),
        ("double_blocks.0.img_mod.linear.weight", "HunyuanVideo transformer"),
        ("joint_blocks.0.context_block.attn.qkv.weight", "Stable Diffusion 3 transformer"),
        ("transformer_blocks.0.norm1_context.linear.weight", "Stable Diffusion 3 transformer"),
        ("input_blocks.0.0.weight", "Stable Diffusion UNet"),
        ("down_blocks.0.resnets.0.time_emb_proj.weight", "Stable Diffusion UNet"),
        ("transformer.resblocks.0.attn.in_proj_weight", "OpenCLIP model"),
        ("model.layers.0.self_attn.q_proj.weight", "language model"),
        ("vision_model.embeddings.patch_embedding.weight", "vision model"),
    ];
    let has = |marker: &str| !store.prefixes_of(marker).is_empty();
    MARKERS.iter().find(|(marker, _)| has(marker)).map(|&(_, model)| model)
}

impl Kind {
    /// The component that it is, if it is one.
    pub fn component(&self) -> Option<Component> {
        match self {
            Self::FluxTransformer { .. } => Some(Component::Transformer),
            Self::Vae { .. } => Some(Component::Vae),
            Self::Clip { .. } => Some(Component::Clip),
            Self::T5 { .. } => Some(Component::T5),
            Self::Lora | Self::Unknown { .. } => None,
        }
    }

    pub(crate) fn with_article(&self) -> String {
        let name = self.to_string();
        let article = if name.starts_with(['A', 'E', 'I', 'O', 'U']) { "an" } else { "a" };
        format!("{article} {name}")
    }

    /// From the code's names to the store's, for a component.
    fn naming(&self, store: &Store) -> Box<dyn Naming> {
        match self.clone() {
            Self::FluxTransformer { layout: Layout::Diffusers, prefix } => {
                Box::new(Prefixed { prefix, naming: flux::Diffusers })
            }
            Self::FluxTransformer { prefix, .. } | Self::Vae { layout: Layout::Diffusers, prefix } => {
                Box::new(Prefixed { prefix, naming: SameNames })
            }
            Self::Vae { prefix, .. } => {
                let level = |l: &usize| store.has(&format!("{prefix}decoder.up.{l}.block.0.conv1.weight"));
                let levels = (0..).take_while(level).count();
                Box::new(Prefixed { prefix, naming: vae::Bfl { levels } })
            }
            Self::Clip { prefix } => Box::new(clip::Clip { prefix }),
            Self::T5 { layout: Layout::LlamaCpp, prefix } => Box::new(Prefixed { prefix, naming: t5::LlamaCpp }),
            Self::T5 { prefix, .. } => {
                let [shared, own] = t5::EMBEDDINGS;
                let embedding = if store.has(&format!("{prefix}{shared}")) { shared } else { own };
                Box::new(t5::T5 { prefix, embedding })
            }
            Self::Lora | Self::Unknown { .. } => Box::new(SameNames),
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.component(), self) {
            (Some(component), _) => component.fmt(f),
            (None, Self::Unknown { model: Some(model) }) => f.write_str(model),
            (None, Self::Lora) => f.write_str("LoRA"),
            (None, _) => f.write_str("model of an unknown kind"),
        }
    }
}

impl Component {
    pub const ALL: [Self; 4] = [Self::Transformer, Self::Vae, Self::Clip, Self::T5];

    /// Its folder in a model folder.
    pub fn folder(self) -> &'static str {
        match self {
            Self::Transformer => "transformer",
            Self::Vae => "vae",
            Self::Clip => "text_encoder",
            Self::T5 => "text_encoder_2",
        }
    }

    /// What its weights' file names start with in its folder: diffusers' and transformers' models differ.
    pub fn stem(self) -> &'static str {
        match self {
            Self::Transformer | Self::Vae => "diffusion_pytorch_model",
            Self::Clip | Self::T5 => "model",
        }
    }

    /// The option of the command line that takes its file.
    pub fn option(self) -> &'static str {
        match self {
            Self::Transformer => "--transformer",
            Self::Vae => "--vae",
            Self::Clip => "--clip",
            Self::T5 => "--t5",
        }
    }

    /// Its weights in a model folder; `dtype` is what parameters are converted to when read.
    pub fn in_folder(self, model: &Folder, dtype: DType, device: &Device) -> Result<Weights> {
        self.in_store(Store::open_component(&model.sub(self.folder()), self.stem())?, dtype, device)
    }

    /// Its weights in a single file, whatever else that holds.
    pub fn in_file(self, path: &Path, dtype: DType, device: &Device) -> Result<Weights> {
        self.in_store(Store::open(vec![ModelFile::open(path)?])?, dtype, device)
    }

    /// Its weights in a store.
    ///
    /// # Errors
    /// [`WeightsError::WrongKind`] says what the store holds instead.
    pub fn in_store(self, store: Store, dtype: DType, device: &Device) -> Result<Weights> {
        let kinds = detect(&store);
        let Some(kind) = kinds.iter().find(|kind| kind.component() == Some(self)) else {
            return Err(self.wrong_kind(&store, &kinds));
        };
        if let Kind::Vae { prefix, .. } = kind
            && store.has(&format!("{prefix}quant_conv.weight"))
        {
            return Err(WeightsError::Unsupported {
                what: store.describe(),
                reason: "this VAE has a quant_conv layer, so it is Stable Diffusion's or FLUX.2's; \
                         give the VAE of FLUX.1 (ae.safetensors)"
                    .to_string(),
            });
        }
        let naming = kind.naming(&store);
        Ok(Weights::new(store, naming, dtype, device))
    }

    fn wrong_kind(self, store: &Store, kinds: &[Kind]) -> WeightsError {
        let found = kinds.iter().map(Kind::with_article).collect::<Vec<_>>().join(" and ");
        let advice = match kinds {
            [kind] => match (kind.component(), kind) {
                (Some(component), _) => format!("pass it as {}", component.option()),
                (None, Kind::Lora) => format!("pass it as --lora, beside the {self} that it was made for"),
                (None, _) => "give a file of FLUX.1 [dev] or FLUX.1 Kontext [dev]".to_string(),
            },
            _ => format!("give a file that holds a {self}"),
        };
        WeightsError::WrongKind { file: store.describe(), found, wanted: self.to_string(), advice }
    }
}

impl std::fmt::Display for Component {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Transformer => "FLUX transformer",
            Self::Vae => "VAE",
            Self::Clip => "CLIP text encoder",
            Self::T5 => "T5 text encoder",
        })
    }
}
