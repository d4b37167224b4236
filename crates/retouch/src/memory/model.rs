//! What a model's parameters take in memory.

use std::collections::BTreeMap;

use candle_core::{DType, Device};
use retouch_flow::{FluxConfig, FluxTransformer};
use retouch_models::{ModelDefaults, defaults_for};
use retouch_text_encoder::{ClipConfig, ClipEncoder, T5Config, T5Encoder};
use retouch_vae::{VaeConfig, VaeDecoder, VaeEncoder};
use retouch_weights::{Component, Counted, Linear, LoraBytes, Weights, convert::Target};

use super::{ByPlace, DeviceKind, Work};
use crate::{
    KeepLoaded, ModelSource, OutputSize, Precision, Result,
    sizes::SizeRules,
    source::{ModelFiles, config},
};

/// The sizes of a model's parts, and the bytes that their parameters take.
#[derive(Debug, Clone)]
pub struct ModelMemory {
    pub(super) flux: FluxConfig,
    pub(super) vae: VaeConfig,
    pub(super) t5: T5Config,
    pub(super) dtype: DType,
    /// Whether the transformer's blocks multiply 8-bit floats.
    pub(super) fp8: bool,
    pub(super) text: ByPlace<TextBytes>,
    pub(super) transformer: LayerBytes,
    /// The largest of the layers of which one at a time is there before the steps.
    pub(super) modulation: u64,
    /// In f32; see [`Self::vae_bytes`].
    pub(super) vae_encoder: u64,
    pub(super) vae_decoder: u64,
}

/// The sizes of all parts.
struct Configs {
    flux: FluxConfig,
    vae: VaeConfig,
    t5: T5Config,
    clip: ClipConfig,
}

impl Configs {
    fn of(files: &ModelFiles) -> Result<Self> {
        Ok(Self {
            flux: config(files, Component::Transformer, FluxConfig::of, FluxConfig::check)?,
            vae: config(files, Component::Vae, VaeConfig::of, VaeConfig::check)?,
            t5: config(files, Component::T5, T5Config::of, T5Config::check)?,
            clip: config(files, Component::Clip, ClipConfig::of, ClipConfig::check)?,
        })
    }
}

/// The text encoders, in the dtype that they compute in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TextBytes {
    pub clip: u64,
    pub t5: LayerBytes,
}

/// A part whose layers need not all be in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct LayerBytes {
    /// What is outside of layers.
    pub fixed: u64,
    pub layers: Vec<u64>,
}

impl LayerBytes {
    /// `numbered` are the prefixes of layers in order, before their numbers.
    fn group(counted: &Counted, numbered: &[&str]) -> Self {
        let (mut fixed, mut layers) = (0, BTreeMap::new());
        for (name, bytes) in counted {
            let layer = numbered.iter().enumerate().find_map(|(kind, prefix)| {
                let number = name.strip_prefix(prefix)?.split('.').next()?;
                Some((kind, number.parse::<usize>().ok()?))
            });
            match layer {
                Some(layer) => *layers.entry(layer).or_default() += bytes,
                None => fixed += bytes,
            }
        }
        Self { fixed, layers: layers.into_values().collect() }
    }

    /// With the first `resident` layers.
    pub fn resident(&self, resident: usize) -> u64 {
        self.fixed + self.layers.iter().take(resident).sum::<u64>()
    }

    /// With the first `resident` layers, and the two that are there while the others are read.
    pub fn with(&self, resident: usize) -> u64 {
        let others = self.layers.get(resident..).unwrap_or_default();
        let ahead = others.windows(2).map(|two| two[0] + two[1]).max().or(others.first().copied());
        self.resident(resident) + ahead.unwrap_or(0)
    }

    /// What is read at each pass.
    pub fn read(&self, resident: usize) -> u64 {
        self.layers.iter().skip(resident).sum()
    }
}

impl ModelMemory {
    /// Of a model whose files are here, with the weights as they will be read; their headers are.
    pub(crate) fn of(
        files: &ModelFiles,
        precision: Precision,
        weights: impl Fn(Component) -> Result<Weights>,
    ) -> Result<Self> {
        Self::count(Configs::of(files)?, precision, weights)
    }

    /// Of a model that may not be here (nothing is downloaded), and the work of one edit with it at its usual size.
    ///
    /// With `target`, its transformer and its text encoders count as stored in that type; without, as in their files, or in
    /// bf16 where there are none.
    ///
    /// # Errors
    /// A model that is neither here nor a known one, and what is wrong with its files.
    pub fn find(source: &ModelSource, target: Option<Target>, precision: Precision) -> Result<(Self, Work)> {
        let dtype = precision.dtype();
        let files = ModelFiles::here(source)?;
        let weights = |component: Component| match (&files, source.file(component)) {
            (_, _) if target.is_some() && component != Component::Vae => assumed(component, target, dtype),
            (Some(files), _) => files.weights(component, dtype, &Device::Cpu),
            (None, Some(path)) => Ok(component.in_file(path, dtype, &Device::Cpu)?),
            (None, None) => assumed(component, target, dtype),
        };
        let (memory, defaults) = match &files {
            Some(files) => (Self::count(Configs::of(files)?, precision, weights)?, files.defaults.clone()),
            None => {
                let configs = Configs {
                    flux: FluxConfig::dev(),
                    vae: VaeConfig::flux(),
                    t5: T5Config::xxl(),
                    clip: ClipConfig::large(),
                };
                (Self::count(configs, precision, weights)?, defaults_for(source.base.as_deref().unwrap_or_default()))
            }
        };
        let work = memory.usual_work(&defaults)?;
        Ok((memory, work))
    }

    fn usual_work(&self, defaults: &ModelDefaults) -> Result<Work> {
        let rules = SizeRules { sizes: &defaults.sizes, multiple: self.size_multiple() as usize };
        let size = rules.output(OutputSize::Auto, None)?;
        Ok(Work {
            output: size,
            reference: Some(size),
            images: 1,
            prompts: 1,
            text_tokens: defaults.max_sequence_length,
            steps: defaults.steps,
            step_cache: false,
            text_loras: ByPlace::default(),
            transformer_loras: LoraBytes::default(),
            keep_loaded: KeepLoaded::No,
            encoders: None,
        })
    }

    fn count(configs: Configs, precision: Precision, weights: impl Fn(Component) -> Result<Weights>) -> Result<Self> {
        let Configs { flux, vae, t5, clip } = configs;
        let sum = |counted: Counted| counted.values().sum::<u64>();
        let fp8 = precision == Precision::Fp8;
        let transformer = weights(Component::Transformer)?;
        let transformer = if fp8 { transformer.in_fp8() } else { transformer };
        let hidden = flux.hidden();
        let modulation = match flux.num_layers {
            0 => 0,
            _ => sum(transformer.count(|w| Linear::load(&w.pp("double_blocks.0.img_mod.lin"), hidden, 6 * hidden))?),
        };
        let autoencoder = weights(Component::Vae)?;
        let (clip_weights, t5_weights) = (weights(Component::Clip)?, weights(Component::T5)?);
        let text = |dtype| -> Result<TextBytes> {
            let t5 = t5_weights.with_dtype(dtype).count(|w| T5Encoder::load(w, &t5))?;
            Ok(TextBytes {
                clip: sum(clip_weights.with_dtype(dtype).count(|w| ClipEncoder::load(w, &clip))?),
                t5: LayerBytes::group(&t5, &["encoder.block."]),
            })
        };
        Ok(Self {
            text: ByPlace { on_device: text(precision.dtype())?, on_cpu: text(DType::F32)? },
            transformer: LayerBytes::group(
                &transformer.count(|w| FluxTransformer::load(w, &flux))?,
                &["double_blocks.", "single_blocks."],
            ),
            modulation,
            vae_encoder: sum(autoencoder.count(|w| VaeEncoder::load(w, &vae))?),
            vae_decoder: sum(autoencoder.count(|w| VaeDecoder::load(w, &vae))?),
            flux,
            vae,
            t5,
            dtype: precision.dtype(),
            fp8,
        })
    }

    /// Bytes of a value that is computed with.
    pub(super) fn element(&self) -> u64 {
        self.dtype.size_in_bytes() as u64
    }

    /// Bytes of a value in the VAE, which is counted on the CPU and thus in f32.
    pub(super) fn vae_element(&self, kind: DeviceKind) -> u64 {
        let wide = kind == DeviceKind::Cpu || (self.dtype == DType::F16 && self.vae.force_upcast);
        if wide { 4 } else { self.element() }
    }

    /// Image sizes are multiples of this.
    pub(super) fn size_multiple(&self) -> u64 {
        2 * self.vae.spatial_factor() as u64
    }
}

/// A part that is not here.
fn assumed(component: Component, target: Option<Target>, dtype: DType) -> Result<Weights> {
    let target = match component {
        Component::Vae => Target::Bf16,
        _ => target.unwrap_or(Target::Bf16),
    };
    Ok(Weights::assumed(target, dtype)?)
}
