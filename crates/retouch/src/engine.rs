//! The whole edit, from request to pictures.

use std::{
    ops::ControlFlow,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use candle_core::{DType, Device, Tensor};
use image::RgbImage;
use retouch_flow::{
    StepCache,
    tokens::{pack, unpack},
};
use retouch_kernels::{Kernels, Profiled};
use retouch_sampler::{Schedule, TorchGenerator, denoise, guide};
use retouch_weights::{
    WeightsError,
    convert::Target,
    hub::{DownloadProgress, HubOptions},
};
use tracing::debug;

use crate::{
    Control, DeviceChoice, EditRequest, EditResult, EditedImage, Error, Event, ModelRules, ModelSource, Observer,
    Parameters, Precision, Profile, Result, Seeds, Settings, Stage, Timings, Trace,
    flux1::{Flux1, Place, Steps, proceed},
    image,
    memory::{Budget, ByPlace, Encoders, MemoryPlan, ModelMemory, Work, free_of, give_back},
    preview::Projection,
    profile::Recorder,
    source::ModelFiles,
};

/// How to run a model.
#[derive(Debug, Clone, Copy, Default)]
pub struct EngineOptions {
    pub device: DeviceChoice,
    /// `None` is bf16 on a GPU and f32 on the CPU.
    pub precision: Option<Precision>,
    /// Hold the large matrices of the transformer and of T5 in this type, where their files do not have them in fewer bits
    /// already; a type of fewer than 16 bits.
    pub quantize: Option<Target>,
    pub keep_loaded: KeepLoaded,
    /// Where the text encoders compute; `None` is where the [`MemoryPlan`] has them.
    pub encoders: Option<Encoders>,
    /// Other engines of this process: each leaves them their part of the computer's memory.
    pub beside: usize,
    /// Keep the embeddings of the last prompts and the latents of the last source images for requests that have them again.
    pub reuse: bool,
    /// Learn to show latents, for [`Event::Step`]'s previews.
    pub previews: bool,
    /// Bytes of the device's memory to stay within, instead of those that are free when the model is opened. On the CPU it is
    /// the memory of this program.
    pub vram_limit: Option<u64>,
    /// Measure where the time goes, for [`Engine::profile`]; on a GPU the whole then takes longer.
    pub profile: bool,
}

/// Whether all parts of the model stay in memory between edits, instead of one stage's at a time. Blocks of T5 for which there
/// is no room beside the others are read for each prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KeepLoaded {
    #[default]
    No,
    /// Edits for which they do not fit are refused.
    Yes,
    /// For edits for which they fit.
    WhereItFits,
}

impl From<bool> for KeepLoaded {
    fn from(keep: bool) -> Self {
        if keep { Self::Yes } else { Self::No }
    }
}

/// A model, ready to edit. Its weights are read when an edit needs them.
pub struct Engine {
    model: Flux1,
    device: Device,
    device_name: String,
    precision: Precision,
    quantize: Option<Target>,
    recorder: Option<Recorder>,
    memory: ModelMemory,
    budget: Budget,
    keep_loaded: KeepLoaded,
    encoders: Option<Encoders>,
    previews: Option<Projection>,
}

impl Engine {
    /// Finds the model's files, on disk or (downloading what is missing) on the hub; hub settings come from the
    /// environment.
    pub fn open(source: &ModelSource, options: EngineOptions, progress: &mut dyn DownloadProgress) -> Result<Self> {
        if let Some(target @ (Target::Bf16 | Target::F16)) = options.quantize {
            return Err(Error::BadRequest(format!(
                "{target} is not fewer bits; take q8_0, or choose {target} as the dtype"
            )));
        }
        let (device, choice) = options.device.open()?;
        let precision = options.precision.unwrap_or_else(|| Precision::default_for(&device));
        if precision == Precision::Fp8 {
            if let Some(target) = options.quantize {
                return Err(Error::BadRequest(format!(
                    "in the dtype fp8 weights are 8-bit floats, and not {target}; leave out one of the two"
                )));
            }
            retouch_kernels::check_fp8(&device)
                .map_err(|reason| Error::Device { device: choice.to_string(), reason })?;
        }
        let files = ModelFiles::find(source, &HubOptions::from_env(), progress)?;
        let profiled = options.profile.then(|| Profiled::for_device(&device));
        let kernels =
            profiled.map_or_else(|| retouch_kernels::for_device(&device), |profiled| profiled as &dyn Kernels);
        let on_device = Place { device: device.clone(), dtype: precision.dtype(), kernels };
        // Where the device is the CPU, they are computed and profiled as everything else.
        let cpu_kernels = if device.is_cpu() { kernels } else { retouch_kernels::for_device(&Device::Cpu) };
        let on_cpu = Place { device: Device::Cpu, dtype: DType::F32, kernels: cpu_kernels };
        let model = Flux1::new(files, ByPlace { on_device, on_cpu }, precision, options.quantize, options.reuse)?;
        let files = model.files();
        files
            .defaults
            .check(model.size_multiple())
            .map_err(|reason| WeightsError::Unsupported { what: format!("{}: retouch.json", files.name), reason })?;
        debug!(model = files.name, pipeline = ?files.pipeline, device = %choice, dtype = %precision, "model found");
        let recorder = match profiled {
            Some(profiled) => {
                Some(Recorder::new(profiled, profiled.peak_flops(precision.dtype(), precision == Precision::Fp8)?))
            }
            None => None,
        };
        let memory = model.memory()?;
        let EngineOptions { keep_loaded, encoders, quantize, .. } = options;
        // Now, before anything of the model is a part of what is taken.
        let budget = Budget::of(&device, options.vram_limit).beside(options.beside);
        let device_name = choice.to_string();
        let previews = options.previews.then(Projection::default);
        Ok(Self {
            model,
            device,
            device_name,
            precision,
            quantize,
            recorder,
            memory,
            budget,
            keep_loaded,
            encoders,
            previews,
        })
    }

    /// What the model takes.
    pub fn rules(&self) -> ModelRules {
        let ModelFiles { name, defaults, pipeline, .. } = self.model.files();
        ModelRules {
            name: name.clone(),
            defaults: defaults.clone(),
            takes_guidance: self.model.takes_guidance(),
            size_multiple: self.model.size_multiple(),
            pipeline: *pipeline,
        }
    }

    /// The device that computes, as [`DeviceChoice`] reads it.
    pub fn device(&self) -> &str {
        &self.device_name
    }

    /// Bytes of the device's memory that are free now, where that is known.
    pub fn free_memory(&self) -> Option<u64> {
        free_of(&self.device)
    }

    /// Where the time of the edits since the last call went; `None` unless [`EngineOptions::profile`] is set.
    pub fn profile(&self) -> Option<Profile> {
        self.recorder.as_ref().map(Recorder::take)
    }

    /// Edits an image, or makes one if the request has none.
    pub fn edit(&mut self, request: &EditRequest, observer: &mut dyn Observer) -> Result<EditResult> {
        let mut images = Vec::with_capacity(request.seeds.images());
        let timings = self.edit_each(request, observer, |image, _| {
            images.push(image);
            Control::Continue
        })?;
        Ok(EditResult { images, timings })
    }

    /// The same, but each image goes to `each` as soon as it is decoded, with the times up to then: all of a long
    /// request are never in memory together. `Cancel` ends the edit there.
    pub fn edit_each(
        &mut self,
        request: &EditRequest,
        observer: &mut dyn Observer,
        mut each: impl FnMut(EditedImage, &Timings) -> Control,
    ) -> Result<Timings> {
        let done = self.run(request, observer, &mut None, &mut each);
        done.map_err(|error| or_cancelled(error, observer))
    }

    /// Edits, and keeps every intermediate.
    pub fn edit_traced(&mut self, request: &EditRequest, observer: &mut dyn Observer) -> Result<(EditResult, Trace)> {
        let mut trace = Some(Trace::default());
        let mut images = Vec::with_capacity(request.seeds.images());
        let done = self.run(request, observer, &mut trace, &mut |image, _| {
            images.push(image);
            Control::Continue
        });
        let timings = done.map_err(|error| or_cancelled(error, observer))?;
        Ok((EditResult { images, timings }, trace.unwrap_or_default()))
    }

    /// The way of an edit: text, reference image, noise, steps, pixels.
    fn run(
        &mut self,
        request: &EditRequest,
        observer: &mut dyn Observer,
        trace: &mut Option<Trace>,
        each: &mut dyn FnMut(EditedImage, &Timings) -> Control,
    ) -> Result<Timings> {
        let settings = self.rules().settle(request)?;
        let source_sha256 = request.image.as_ref().map(image::sha256);
        debug!(source = ?request.image.as_ref().map(RgbImage::dimensions), ?settings, "request settled");
        self.model.use_loras(&request.loras, request.lora_partial)?;
        let memory = self.plan(request, &settings)?;
        self.model.set_keep_loaded(memory.keep_loaded);
        proceed(observer.on(Event::Planned { memory: &memory }))?;
        let mut timings = Timings::default();
        let mut clock = Clock::start(self.recorder.as_ref());

        // prompt -> token ids -> embeddings
        let mut prompts = vec![("", request.prompt.as_str())];
        prompts.extend(request.negative_prompt.as_deref().map(|negative| ("negative_", negative)));
        let prompts = self.model.encode_prompts(&prompts, settings.max_sequence_length, &memory, observer, trace)?;
        timings.text_seconds = clock.lap("text");

        // image -> pixels in [-1, 1] -> reference latents
        let reference = match request.image.as_ref().zip(settings.reference) {
            Some((picture, (width, height))) => {
                let key = source_sha256.clone().map(|sha256| (sha256, width, height));
                let picture = image::resize(picture, width as u32, height as u32);
                let pixels = image::to_tensor(&picture, &self.device)?;
                let latents = self.model.encode_image(&pixels, key, &memory, observer)?;
                if let Some(previews) = &mut self.previews {
                    previews.learn(&latents, &picture)?;
                }
                Some(latents)
            }
            None => None,
        };
        timings.reference_seconds = clock.lap("reference image");

        // seeds -> noise; size -> schedule
        let shape = self.model.latent_shape(settings.output);
        let noise = draw_noise(&request.seeds, shape, &self.device)?;
        let schedule = Schedule::new(&self.model.files().scheduler, settings.steps, self.model.tokens(settings.output));
        debug!(noise = ?shape, images = noise.len(), sigmas = ?schedule.sigmas(), "noise drawn");
        record_inputs(trace, reference.as_ref(), &noise, &schedule)?;
        let reference = reference.as_ref();
        let steps = Steps { output: settings.output, schedule: &schedule, guidance: settings.guidance };
        let (transformer, conditionings) = self.model.prepare(&prompts, reference, steps, &memory, observer)?;
        timings.load_seconds = clock.lap("transformer loading");

        // noise -> latents, an image at a time
        let [_, _, height, width] = shape;
        let mut latents = Vec::with_capacity(noise.len());
        for (image, noise) in noise.iter().enumerate() {
            let mut caches = [StepCache::new(request.cache), StepCache::new(request.cache)];
            let velocity = |x: &Tensor, step: usize| {
                let [cache, negative_cache] = &mut caches;
                let velocity = transformer.velocity_cached(x, &conditionings[0], step, cache)?;
                match conditionings.get(1) {
                    Some(negative) => {
                        let negative = transformer.velocity_cached(x, negative, step, negative_cache)?;
                        guide(&velocity, &negative, settings.true_cfg)
                    }
                    None => Ok(velocity),
                }
            };
            let after = |step: retouch_sampler::Step<'_>| {
                if (image, step.index) == (0, 0) {
                    timings.first_step_seconds = clock.since_start().as_secs_f64();
                }
                if let Some(trace) = trace {
                    trace.record(format!("velocity.{}", step.index), step.velocity);
                }
                let event = Event::Step {
                    image,
                    step: step.index,
                    steps: settings.steps,
                    sigma: step.sigma,
                    took: step.took,
                    latents: &|| Ok(unpack(step.latents, height, width)?),
                    preview: &|| match &self.previews {
                        Some(previews) => previews.picture(&unpack(&step.denoised()?, height, width)?),
                        None => Ok(None),
                    },
                };
                match observer.on(event) {
                    Control::Continue => ControlFlow::Continue(()),
                    Control::Cancel => ControlFlow::Break(()),
                }
            };
            let Some(tokens) = denoise(pack(noise)?, &schedule, velocity, after)? else {
                self.model.finish_steps(transformer); // for the next edit
                return Err(Error::Cancelled);
            };
            latents.push((unpack(&tokens, height, width)?, caches.iter().map(StepCache::reused).sum()));
        }
        timings.steps_seconds = clock.lap("steps");
        drop(conditionings);
        self.model.finish_steps(transformer);

        // latents -> pixels -> pictures, an image at a time
        let decoder = self.model.decoder(&memory, observer)?;
        for (i, (latents, reused_passes)) in latents.into_iter().enumerate() {
            proceed(observer.on(Event::Computing { stage: Stage::VaeDecoder }))?;
            let unit = image::to_unit(&decoder.decode(&latents)?)?;
            if let Some(trace) = trace {
                trace.record("latents", &latents);
                trace.record("image", &unit);
            }
            let pixels = image::from_tensor(&unit)?;
            if let Some(previews) = &mut self.previews {
                previews.learn(&latents, &pixels)?;
            }
            timings.decode_seconds += clock.lap("pixels");
            let image = EditedImage {
                pixels,
                parameters: self.parameters(request, &settings, &source_sha256, memory.encoders, i),
                reused_passes,
            };
            proceed(each(image, &timings))?;
            clock.skip(); // what is done with an image is not a part of making it
        }
        self.model.finish_decoding(decoder);
        Ok(timings)
    }

    /// What stays in memory in each stage.
    fn plan(&self, request: &EditRequest, settings: &Settings) -> Result<MemoryPlan> {
        let (text_loras, transformer_loras) = self.model.lora_bytes()?;
        let work = Work {
            output: settings.output,
            reference: settings.reference,
            images: request.seeds.images(),
            prompts: 1 + usize::from(request.negative_prompt.is_some()),
            text_tokens: settings.max_sequence_length,
            steps: settings.steps,
            step_cache: request.cache.is_some(),
            text_loras,
            transformer_loras,
            keep_loaded: self.keep_loaded,
            encoders: self.encoders,
        };
        MemoryPlan::fastest(&self.memory, &work, self.budget)
    }

    fn parameters(
        &self,
        request: &EditRequest,
        settings: &Settings,
        source_sha256: &Option<String>,
        encoders: Encoders,
        image: usize,
    ) -> Parameters {
        let (seed, batch) = match &request.seeds {
            Seeds::Each(seeds) => (seeds[image], None),
            Seeds::Shared { seed, images } => (*seed, Some((image, *images))),
        };
        Parameters {
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone(),
            true_cfg: settings.true_cfg,
            seed,
            batch,
            model: self.model.files().name.clone(),
            single_files: self.model.files().single_files(),
            steps: settings.steps,
            guidance: settings.guidance,
            cache: request.cache,
            max_sequence_length: settings.max_sequence_length,
            width: settings.output.0,
            height: settings.output.1,
            size: request.size,
            reference_size: request.reference_size,
            reference: settings.reference,
            source_sha256: source_sha256.clone(),
            source_name: None,
            dtype: self.precision.to_string(),
            quantize: self.quantize.map(|target| target.to_string()),
            device: self.device_name.clone(),
            encoders: (encoders == Encoders::Cpu).then(|| encoders.to_string()),
            version: env!("CARGO_PKG_VERSION").to_string(),
            loras: self.model.loras().stored().to_vec(),
            lora_partial: request.lora_partial,
        }
    }
}

/// The end that an observer's flag has brought about: layers that are not read any more are a tensor's error to candle.
fn or_cancelled(error: Error, observer: &dyn Observer) -> Error {
    let cancelled = observer.cancel_flag().is_some_and(|flag| flag.load(Ordering::Relaxed));
    if cancelled && matches!(error, Error::Tensor(_)) { Error::Cancelled } else { error }
}

/// The initial noise of each image, unpacked, f32, with the bits of PyTorch's CPU generator.
fn draw_noise(seeds: &Seeds, shape: [usize; 4], device: &Device) -> Result<Vec<Tensor>> {
    let n = shape.iter().product();
    let tensor = |values: &[f32]| Ok(Tensor::from_slice(values, &shape, device)?);
    match seeds {
        Seeds::Each(seeds) => seeds.iter().map(|&seed| tensor(&TorchGenerator::new(seed).normal(n))).collect(),
        Seeds::Shared { seed, images } => {
            TorchGenerator::new(*seed).normal(n * images).chunks_exact(n).map(tensor).collect()
        }
    }
}

fn record_inputs(
    trace: &mut Option<Trace>,
    reference: Option<&Tensor>,
    noise: &[Tensor],
    schedule: &Schedule,
) -> Result<()> {
    if let Some(trace) = trace {
        if let Some(reference) = reference {
            trace.record("ref_latents", reference);
        }
        for noise in noise {
            trace.record("noise", noise);
        }
        trace.record("sigmas", &Tensor::new(schedule.sigmas(), &Device::Cpu)?);
    }
    Ok(())
}

/// Times between the ends of stages.
struct Clock<'a> {
    started: Instant,
    last: Instant,
    recorder: Option<&'a Recorder>,
}

impl<'a> Clock<'a> {
    fn start(recorder: Option<&'a Recorder>) -> Self {
        let started = Instant::now();
        Self { started, last: started, recorder }
    }

    fn since_start(&self) -> Duration {
        self.started.elapsed()
    }

    /// Ends a stage; its seconds.
    fn lap(&mut self, stage: &'static str) -> f64 {
        give_back();
        let took = self.skip();
        if let Some(recorder) = self.recorder {
            recorder.end(stage, took);
        }
        took.as_secs_f64()
    }

    /// Goes on from now; the time since the last stage's end.
    fn skip(&mut self) -> Duration {
        let took = self.last.elapsed();
        self.last += took;
        took
    }
}
