//! The FLUX.1 family: which parts a model of it has, how each is loaded, and what each is asked for.
//!
//! Parts are loaded when first needed and dropped after their stage, so that no two stages' weights are in memory
//! together, unless the engine is told to keep them. What of a part stays during its stage is as the [`MemoryPlan`] says.

use std::num::NonZeroUsize;

use candle_core::{DType, Device, Tensor};
use lru::LruCache;
use retouch_flow::{Conditioning, FluxConfig, FluxTransformer, ModulationTable, Reference, tokens};
use retouch_kernels::Kernels;
use retouch_sampler::Schedule;
use retouch_text_encoder::{ClipConfig, ClipEncoder, ClipTokenizer, T5Config, T5Encoder, T5Tokenizer};
use retouch_vae::{VaeConfig, VaeDecoder, VaeEncoder};
use retouch_weights::{Component, LoraBytes, Weights, convert::Target};
use tracing::debug;

use crate::{
    Control, Error, Event, Lora, MemoryPlan, Observer, Precision, Result, Stage, Trace,
    loras::Loras,
    memory::{ByPlace, Encoders, ModelMemory, Resident},
    source::{ModelFiles, config},
};

/// Tokens that CLIP sees, start and end included.
const CLIP_TOKENS: usize = 77;

/// Where and with what something is computed.
pub(crate) struct Place {
    pub device: Device,
    pub dtype: DType,
    pub kernels: &'static dyn Kernels,
}

pub(crate) struct Flux1 {
    files: ModelFiles,
    /// Of the text encoders; all other parts are on the device.
    places: ByPlace<Place>,
    precision: Precision,
    quantize: Option<Target>,
    keep_loaded: bool,
    recent: Option<Recent>,
    vae_config: VaeConfig,
    flux_config: FluxConfig,
    loras: Loras,
    text: Option<TextEncoders>,
    vae_encoder: Option<VaeEncoder>,
    transformer: Option<FluxTransformer>,
    vae_decoder: Option<VaeDecoder>,
}

struct TextEncoders {
    place: Encoders,
    resident: Resident,
    clip_tokenizer: ClipTokenizer,
    t5_tokenizer: T5Tokenizer,
    clip: ClipEncoder,
    t5: T5Encoder,
}

/// A prompt as the transformer takes it.
#[derive(Clone)]
pub(crate) struct Prompt {
    /// CLIP's pooled embedding `[1, pooled]`.
    pub pooled: Tensor,
    /// T5's embeddings `[1, tokens, d_model]`.
    pub embeds: Tensor,
    /// Its tokens, where there were more than T5 takes.
    cut: Option<usize>,
}

/// A source image by its pixels' hash, and the size at which the model saw it.
pub(crate) type ReferenceKey = (String, usize, usize);

/// What the last requests came to, for the next that have the same.
struct Recent {
    /// By the text, the longest that T5 sees of it, and where they were computed.
    prompts: LruCache<(String, usize, Encoders), Prompt>,
    references: LruCache<ReferenceKey, Tensor>,
}

impl Default for Recent {
    fn default() -> Self {
        // Of FLUX.1 at a megapixel in f32, 8 MB of embeddings and 1 MB of latents each.
        const KEPT: NonZeroUsize = NonZeroUsize::new(8).unwrap();
        Self { prompts: LruCache::new(KEPT), references: LruCache::new(KEPT) }
    }
}

impl Prompt {
    fn tell_if_cut(&self, kept: usize, observer: &mut dyn Observer) -> Result<()> {
        match self.cut {
            Some(tokens) => proceed(observer.on(Event::PromptCut { tokens, kept })),
            None => Ok(()),
        }
    }
}

/// What the steps of a request are.
pub(crate) struct Steps<'a> {
    /// Width and height of the result in pixels.
    pub output: (usize, usize),
    pub schedule: &'a Schedule,
    /// Of models that take one.
    pub guidance: Option<f64>,
}

impl Flux1 {
    pub fn new(
        files: ModelFiles,
        places: ByPlace<Place>,
        precision: Precision,
        quantize: Option<Target>,
        reuse: bool,
    ) -> Result<Self> {
        let vae_config = config(&files, Component::Vae, VaeConfig::of, VaeConfig::check)?;
        let flux_config = config(&files, Component::Transformer, FluxConfig::of, FluxConfig::check)?;
        Ok(Self {
            files,
            places,
            precision,
            quantize,
            keep_loaded: false,
            recent: reuse.then(Recent::default),
            vae_config,
            flux_config,
            loras: Loras::default(),
            text: None,
            vae_encoder: None,
            transformer: None,
            vae_decoder: None,
        })
    }

    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    fn device(&self) -> &Device {
        &self.places.on_device.device
    }

    /// What its parameters take in memory.
    pub fn memory(&self) -> Result<ModelMemory> {
        let weights = |component| {
            Ok(self.quantised(component, self.files.weights(component, self.precision.dtype(), &Device::Cpu)?))
        };
        ModelMemory::of(&self.files, self.precision, weights)
    }

    /// Whether the distilled guidance scale is an input of the transformer (dev and Kontext: yes, schnell: no).
    pub fn takes_guidance(&self) -> bool {
        self.flux_config.guidance_embeds
    }

    /// Image sizes are multiples of this: the VAE's factor times a token's 2x2 patch.
    pub fn size_multiple(&self) -> usize {
        2 * self.vae_config.spatial_factor()
    }

    /// Shape of the latents of an image of `width` x `height` pixels.
    pub fn latent_shape(&self, (width, height): (usize, usize)) -> [usize; 4] {
        let factor = self.vae_config.spatial_factor();
        [1, self.vae_config.latent_channels, height / factor, width / factor]
    }

    /// Rows and columns of the tokens of an image of `width` x `height` pixels.
    fn token_grid(&self, (width, height): (usize, usize)) -> (usize, usize) {
        (height / self.size_multiple(), width / self.size_multiple())
    }

    /// Tokens of an image of that size.
    pub fn tokens(&self, size: (usize, usize)) -> usize {
        let (rows, columns) = self.token_grid(size);
        rows * columns
    }

    /// Says whether parts stay after their stage from now on; else those that are there go.
    pub fn set_keep_loaded(&mut self, keep_loaded: bool) {
        self.keep_loaded = keep_loaded;
        if !keep_loaded {
            (self.text, self.vae_encoder, self.transformer, self.vae_decoder) = (None, None, None, None);
        }
    }

    /// Takes these LoRAs from now on. Parts in memory that have other ones inside are dropped, to be read again.
    pub fn use_loras(&mut self, wanted: &[Lora], partial: bool) -> Result<()> {
        if self.loras.are(wanted, partial)? {
            return Ok(());
        }
        let loras = Loras::open(wanted, partial, &self.files)?;
        let touched = |component| self.loras.change(component) || loras.change(component);
        if touched(Component::Clip) || touched(Component::T5) {
            self.text = None;
            if let Some(recent) = &mut self.recent {
                recent.prompts.clear();
            }
        }
        if touched(Component::Transformer) {
            self.transformer = None;
        }
        self.loras = loras;
        Ok(())
    }

    pub fn loras(&self) -> &Loras {
        &self.loras
    }

    /// What the LoRAs take beside the text encoders and beside the transformer.
    pub fn lora_bytes(&self) -> Result<(ByPlace<LoraBytes>, LoraBytes)> {
        let text = |place: &Place| self.lora_bytes_beside(&[Component::Clip, Component::T5], place.dtype);
        let text = ByPlace { on_device: text(&self.places.on_device)?, on_cpu: text(&self.places.on_cpu)? };
        Ok((text, self.lora_bytes_beside(&[Component::Transformer], self.precision.dtype())?))
    }

    /// Beside parts that are there together.
    fn lora_bytes_beside(&self, components: &[Component], dtype: DType) -> Result<LoraBytes> {
        let mut bytes = LoraBytes::default();
        for &component in components {
            let Some(adapters) = self.loras.of(component) else { continue };
            let weights = self.files.weights(component, dtype, &Device::Cpu)?.with_adapters(adapters);
            let LoraBytes { resident, merging } = self.quantised(component, weights).lora_bytes()?;
            bytes.resident += resident;
            bytes.merging = bytes.merging.max(merging);
        }
        Ok(bytes)
    }

    /// Embeds the prompts. `prefix` tells them apart in the trace.
    pub fn encode_prompts(
        &mut self,
        prompts: &[(&str, &str)],
        max_tokens: usize,
        memory: &MemoryPlan,
        observer: &mut dyn Observer,
        trace: &mut Option<Trace>,
    ) -> Result<Vec<Prompt>> {
        // Those that keep fewer blocks than there is room for serve as well.
        let fit = |text: &TextEncoders| text.place == memory.encoders && text.resident.layers <= memory.text.layers;
        self.text = self.text.take().filter(fit);
        let key = |text: &str| (text.to_string(), max_tokens, memory.encoders);
        if let Some(known) = self.recent_prompts(prompts, key).filter(|_| trace.is_none()) {
            for prompt in &known {
                prompt.tell_if_cut(max_tokens, observer)?;
            }
            return Ok(known);
        }
        let text = match self.text.take() {
            Some(text) => text,
            None => self.load_text_encoders(memory, observer)?,
        };
        let place = self.places.at(memory.encoders);
        let mut encoded = Vec::with_capacity(prompts.len());
        for (prefix, text_prompt) in prompts {
            proceed(observer.on(Event::Computing { stage: Stage::TextEncoders }))?;
            let clip_ids = text.clip_tokenizer.encode(text_prompt, CLIP_TOKENS)?;
            let t5_ids = text.t5_tokenizer.encode(text_prompt, max_tokens)?;
            let cut = t5_ids.cut;
            let row = |ids: &[u32]| Tensor::new(ids, &place.device)?.unsqueeze(0);
            let (clip_ids, t5_ids) = (row(&clip_ids.ids)?, row(&t5_ids.ids)?);
            let to_device = |x: Tensor| x.to_dtype(self.precision.dtype())?.to_device(self.device());
            let pooled = to_device(text.clip.pooled(&clip_ids)?)?;
            let prompt = Prompt { pooled, embeds: to_device(text.t5.embed(&t5_ids)?)?, cut };
            prompt.tell_if_cut(max_tokens, observer)?;
            debug!(pooled = ?prompt.pooled.dims(), embeds = ?prompt.embeds.dims(), "{prefix}prompt encoded");
            if let Some(trace) = trace {
                trace.record(format!("{prefix}clip_ids"), &clip_ids);
                trace.record(format!("{prefix}t5_ids"), &t5_ids);
                trace.record(format!("{prefix}clip_pooled"), &prompt.pooled);
                trace.record(format!("{prefix}t5_embeds"), &prompt.embeds);
            }
            if let Some(recent) = &mut self.recent {
                recent.prompts.put(key(text_prompt), prompt.clone());
            }
            encoded.push(prompt);
        }
        self.text = self.keep_loaded.then_some(text);
        Ok(encoded)
    }

    /// The embeddings of these prompts, if those of all are still there.
    fn recent_prompts(
        &mut self,
        prompts: &[(&str, &str)],
        key: impl Fn(&str) -> (String, usize, Encoders),
    ) -> Option<Vec<Prompt>> {
        let recent = &mut self.recent.as_mut()?.prompts;
        prompts.iter().map(|(_, text)| recent.get(&key(text)).cloned()).collect()
    }

    fn load_text_encoders(&self, memory: &MemoryPlan, observer: &mut dyn Observer) -> Result<TextEncoders> {
        let place = self.places.at(memory.encoders);
        let clip_weights = self.weights_at(place, Component::Clip, observer)?;
        let t5_weights = self.weights_at(place, Component::T5, observer)?;
        let bytes = clip_weights.store().total_bytes() + t5_weights.store().total_bytes();
        proceed(observer.on(Event::Loading { stage: Stage::TextEncoders, bytes }))?;
        let clip_config = config(&self.files, Component::Clip, ClipConfig::of, ClipConfig::check)?;
        let t5_config = config(&self.files, Component::T5, T5Config::of, T5Config::check)?;
        Ok(TextEncoders {
            place: memory.encoders,
            resident: memory.text,
            clip_tokenizer: ClipTokenizer::open(&self.files.clip_tokenizer)?,
            t5_tokenizer: T5Tokenizer::open(&self.files.t5_tokenizer)?,
            clip: ClipEncoder::load(&clip_weights, &clip_config)?,
            t5: T5Encoder::load_resident(&t5_weights, &t5_config, memory.text.limit())?,
        })
    }

    /// The latents `[1, channels, height / 8, width / 8]` of pixels `[1, 3, height, width]` in [-1, 1]; the key stands for
    /// them in what is reused.
    pub fn encode_image(
        &mut self,
        pixels: &Tensor,
        key: Option<ReferenceKey>,
        memory: &MemoryPlan,
        observer: &mut dyn Observer,
    ) -> Result<Tensor> {
        if let (Some(recent), Some(key)) = (&mut self.recent, &key)
            && let Some(latents) = recent.references.get(key)
        {
            return Ok(latents.clone());
        }
        let encoder = match self.vae_encoder.take() {
            Some(encoder) => encoder,
            None => {
                let weights = self.weights(Component::Vae, observer)?;
                let bytes = weights.store().total_bytes() / 2; // the encoder is about half of the file
                proceed(observer.on(Event::Loading { stage: Stage::VaeEncoder, bytes }))?;
                VaeEncoder::load(&weights, &self.vae_config)?
            }
        };
        proceed(observer.on(Event::Computing { stage: Stage::VaeEncoder }))?;
        let encoder = encoder.with_tiling(memory.encode.unwrap_or(memory.decode).tiling(self.device()));
        let latents = encoder.encode(pixels)?;
        debug!(pixels = ?pixels.dims(), latents = ?latents.dims(), "reference image encoded");
        self.vae_encoder = self.keep_loaded.then_some(encoder);
        if let (Some(recent), Some(key)) = (&mut self.recent, key) {
            recent.references.put(key, latents.clone());
        }
        Ok(latents)
    }

    /// Between latents and pixels in [-1, 1]: the inverse of [`Self::encode_image`].
    pub fn decoder(&mut self, memory: &MemoryPlan, observer: &mut dyn Observer) -> Result<VaeDecoder> {
        let decoder = match self.vae_decoder.take() {
            Some(decoder) => decoder,
            None => {
                let weights = self.weights(Component::Vae, observer)?;
                let bytes = weights.store().total_bytes() / 2;
                proceed(observer.on(Event::Loading { stage: Stage::VaeDecoder, bytes }))?;
                VaeDecoder::load(&weights, &self.vae_config)?
            }
        };
        Ok(decoder.with_tiling(memory.decode.tiling(self.device())))
    }

    /// Takes the decoder back after the last image.
    pub fn finish_decoding(&mut self, decoder: VaeDecoder) {
        self.vae_decoder = self.keep_loaded.then_some(decoder);
    }

    /// The transformer and, for each prompt, all that stays the same over the steps.
    ///
    /// The modulation vectors are computed first, so that their weights are gone when the blocks are read.
    pub fn prepare(
        &mut self,
        prompts: &[Prompt],
        reference: Option<&Tensor>,
        Steps { output, schedule, guidance }: Steps<'_>,
        memory: &MemoryPlan,
        observer: &mut dyn Observer,
    ) -> Result<(FluxTransformer, Vec<Conditioning>)> {
        let weights = self.weights(Component::Transformer, observer)?;
        proceed(observer.on(Event::Loading { stage: Stage::Transformer, bytes: weights.store().total_bytes() }))?;
        let timesteps = schedule.timesteps();
        let guidance = guidance.unwrap_or_default(); // not looked at where the model takes none
        let modulation = |prompt: &Prompt| {
            let pooled = prompt.pooled.to_dtype(self.precision.dtype())?;
            Ok(ModulationTable::compute(&weights, &self.flux_config, &timesteps, guidance, &pooled)?)
        };
        let tables = prompts.iter().map(modulation).collect::<Result<Vec<_>>>()?;
        let transformer = match self.transformer.take() {
            Some(transformer) => transformer.with_mlp_tokens(memory.mlp_tokens),
            None => FluxTransformer::load_saving(&weights, &self.flux_config, memory.saving())?,
        };
        proceed(observer.on(Event::Computing { stage: Stage::Transformer }))?;
        let reference =
            reference.map(|latents| Ok::<_, Error>((tokens::pack(latents)?, latents.dims4()?))).transpose()?;
        let mut conditionings = Vec::with_capacity(prompts.len());
        for (prompt, table) in prompts.iter().zip(tables) {
            let reference = reference.as_ref().map(|(tokens, (_, _, height, width))| Reference {
                tokens,
                rows: height / 2,
                columns: width / 2,
            });
            conditionings.push(transformer.condition(&prompt.embeds, reference, self.token_grid(output), table)?);
        }
        Ok((transformer, conditionings))
    }

    /// Takes the transformer back after the loop.
    pub fn finish_steps(&mut self, transformer: FluxTransformer) {
        self.transformer = self.keep_loaded.then_some(transformer);
    }

    fn quantised(&self, component: Component, weights: Weights) -> Weights {
        match (self.quantize, component) {
            (Some(target), Component::Transformer | Component::T5) => weights.quantised(component, target),
            (None, Component::Transformer) if self.precision == Precision::Fp8 => weights.in_fp8(),
            _ => weights,
        }
    }

    fn weights(&self, component: Component, observer: &dyn Observer) -> Result<Weights> {
        self.weights_at(&self.places.on_device, component, observer)
    }

    fn weights_at(&self, place: &Place, component: Component, observer: &dyn Observer) -> Result<Weights> {
        let weights = self.files.weights(component, place.dtype, &place.device)?.with_kernels(place.kernels);
        let weights = match self.loras.of(component) {
            Some(adapters) => weights.with_adapters(adapters),
            None => weights,
        };
        let (file, bytes) = (weights.store().describe(), weights.store().total_bytes());
        debug!(file, bytes, dtype = ?place.dtype, device = ?place.device.location(), "{component} opened");
        let weights = self.quantised(component, weights);
        Ok(match observer.cancel_flag() {
            Some(flag) => weights.with_cancel(flag),
            None => weights,
        })
    }
}

/// Turns an observer's wish into the flow of control.
pub(crate) fn proceed(control: Control) -> Result<()> {
    match control {
        Control::Continue => Ok(()),
        Control::Cancel => Err(Error::Cancelled),
    }
}
