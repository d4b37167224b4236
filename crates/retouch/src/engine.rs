//! The whole edit, from request to pictures.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use image::RgbImage;
use retouch_flow::{
    StepCache,
    tokens::{pack, unpack},
};
use retouch_kernels::{Kernels, Profiled};
use retouch_sampler::{Schedule, TorchGenerator, denoise, guide};
use retouch_weights::{
    Pipeline, WeightsError,
    convert::Target,
    hub::{DownloadProgress, HubOptions},
};
use tracing::debug;

use crate::{
    Control, DeviceChoice, EditRequest, EditResult, EditedImage, Error, Event, ModelSource, Observer, Parameters,
    Precision, Profile, Result, Seeds, Stage, StoredLora, Timings, Trace,
    flux1::{Flux1, Steps, proceed},
    image,
    memory::{Budget, MemoryPlan, ModelMemory, Work, give_back},
    profile::Recorder,
    sizes::{Size, SizeRules},
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
    /// Keep all parts of the model in memory between edits, instead of one stage's at a time.
    pub keep_loaded: bool,
    /// Bytes of the device's memory to stay within, instead of those that are free when the model is opened. On the CPU it is
    /// the memory of this program.
    pub vram_limit: Option<u64>,
    /// Measure where the time goes, for [`Engine::profile`]; on a GPU the whole then takes longer.
    pub profile: bool,
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
    keep_loaded: bool,
}

/// A request with all choices made.
struct Plan {
    reference: Option<(RgbImage, Size)>,
    output: Size,
    steps: usize,
    /// `None` where the model takes none.
    guidance: Option<f64>,
    true_cfg: f64,
    max_sequence_length: usize,
    source_sha256: Option<String>,
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
        let files = ModelFiles::find(source, &HubOptions::from_env(), progress)?;
        let profiled = options.profile.then(|| Profiled::for_device(&device));
        let kernels =
            profiled.map_or_else(|| retouch_kernels::for_device(&device), |profiled| profiled as &dyn Kernels);
        let model = Flux1::new(files, &device, kernels, precision.dtype(), options.quantize, options.keep_loaded)?;
        let files = model.files();
        files
            .defaults
            .check(model.size_multiple())
            .map_err(|reason| WeightsError::Unsupported { what: format!("{}: retouch.json", files.name), reason })?;
        debug!(model = files.name, pipeline = ?files.pipeline, device = %choice, dtype = %precision, "model found");
        let recorder = match profiled {
            Some(profiled) => Some(Recorder::new(profiled, profiled.peak_flops(precision.dtype())?)),
            None => None,
        };
        let (memory, keep_loaded, quantize) = (model.memory()?, options.keep_loaded, options.quantize);
        // Now, before anything of the model is a part of what is taken.
        let budget = Budget::of(&device, options.vram_limit);
        let device_name = choice.to_string();
        Ok(Self { model, device, device_name, precision, quantize, recorder, memory, budget, keep_loaded })
    }

    /// Whether a request to this model can have a guidance scale.
    pub fn takes_guidance(&self) -> bool {
        self.model.takes_guidance()
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
        self.run(request, observer, &mut None, &mut each)
    }

    /// Edits, and keeps every intermediate.
    pub fn edit_traced(&mut self, request: &EditRequest, observer: &mut dyn Observer) -> Result<(EditResult, Trace)> {
        let mut trace = Some(Trace::default());
        let mut images = Vec::with_capacity(request.seeds.images());
        let timings = self.run(request, observer, &mut trace, &mut |image, _| {
            images.push(image);
            Control::Continue
        })?;
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
        let plan = self.plan(request)?;
        self.model.use_loras(&request.loras, request.lora_partial)?;
        let memory = MemoryPlan::fastest(&self.memory, &self.work(request, &plan), self.budget)?;
        proceed(observer.on(Event::Planned { memory: &memory }))?;
        let mut timings = Timings::default();
        let mut clock = Clock::start(self.recorder.as_ref());

        // prompt -> token ids -> embeddings
        let mut prompts = vec![("", request.prompt.as_str())];
        prompts.extend(request.negative_prompt.as_deref().map(|negative| ("negative_", negative)));
        let prompts = self.model.encode_prompts(&prompts, plan.max_sequence_length, &memory, observer, trace)?;
        timings.text_seconds = clock.lap("text");

        // image -> pixels in [-1, 1] -> reference latents
        let reference = match &plan.reference {
            Some((pixels, _)) => {
                Some(self.model.encode_image(&image::to_tensor(pixels, &self.device)?, &memory, observer)?)
            }
            None => None,
        };
        timings.reference_seconds = clock.lap("reference image");

        // seeds -> noise; size -> schedule
        let shape = self.model.latent_shape(plan.output);
        let noise = draw_noise(&request.seeds, shape, &self.device)?;
        let schedule = Schedule::new(&self.model.files().scheduler, plan.steps, self.model.tokens(plan.output));
        debug!(noise = ?shape, images = noise.len(), sigmas = ?schedule.sigmas(), "noise drawn");
        record_inputs(trace, reference.as_ref(), &noise, &schedule)?;
        let reference = reference.as_ref();
        let steps = Steps { output: plan.output, schedule: &schedule, guidance: plan.guidance };
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
                        guide(&velocity, &negative, plan.true_cfg)
                    }
                    None => Ok(velocity),
                }
            };
            let after = |step: retouch_sampler::Step<'_>| {
                if let Some(trace) = trace {
                    trace.record(format!("velocity.{}", step.index), step.velocity);
                }
                let event = Event::Step {
                    image,
                    step: step.index,
                    steps: plan.steps,
                    sigma: step.sigma,
                    took: step.took,
                    latents: &|| Ok(unpack(step.latents, height, width)?),
                };
                match observer.on(event) {
                    Control::Continue => ControlFlow::Continue(()),
                    Control::Cancel => ControlFlow::Break(()),
                }
            };
            let tokens = denoise(pack(noise)?, &schedule, velocity, after)?.ok_or(Error::Cancelled)?;
            latents.push((unpack(&tokens, height, width)?, caches.iter().map(StepCache::reused).sum()));
        }
        drop(conditionings);
        self.model.finish_steps(transformer);
        timings.steps_seconds = clock.lap("steps");

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
            timings.decode_seconds += clock.lap("pixels");
            let image = EditedImage { pixels, parameters: self.parameters(request, &plan, i), reused_passes };
            proceed(each(image, &timings))?;
            clock.skip(); // what is done with an image is not a part of making it
        }
        self.model.finish_decoding(decoder);
        Ok(timings)
    }

    /// Fills in the model's defaults and settles the sizes.
    fn plan(&self, request: &EditRequest) -> Result<Plan> {
        request.check()?;
        if self.model.files().pipeline == Pipeline::Flux && request.image.is_some() {
            return Err(Error::BadRequest(format!(
                "{} makes images from words alone and cannot edit one; leave the image out, or use a Kontext model",
                self.model.files().name
            )));
        }
        let defaults = &self.model.files().defaults;
        let guidance = match request.guidance {
            Some(_) if !self.takes_guidance() => {
                let name = &self.model.files().name;
                return Err(Error::BadRequest(format!("{name} takes no guidance scale; leave the guidance out")));
            }
            given => self.takes_guidance().then(|| given.unwrap_or(defaults.guidance)),
        };
        let rules = SizeRules { sizes: &defaults.sizes, multiple: self.model.size_multiple() };
        let reference = match &request.image {
            Some(picture) => {
                let size = (picture.width() as usize, picture.height() as usize);
                let size = rules.reference(request.reference_size, size)?;
                Some((image::resize(picture, size.0 as u32, size.1 as u32), size))
            }
            None => None,
        };
        let max_sequence_length = request.max_sequence_length.unwrap_or(defaults.max_sequence_length);
        if !(1..=MAX_T5_TOKENS).contains(&max_sequence_length) {
            return Err(Error::BadRequest(format!(
                "the longest prompt is {max_sequence_length} tokens; give 1 to {MAX_T5_TOKENS}"
            )));
        }
        let output = rules.output(request.size, reference.as_ref().map(|(_, size)| *size))?;
        debug!(
            source = ?request.image.as_ref().map(RgbImage::dimensions),
            reference = ?reference.as_ref().map(|(_, size)| size),
            ?output,
            ?guidance,
            max_sequence_length,
            "request planned"
        );
        Ok(Plan {
            output,
            steps: request.steps.unwrap_or(defaults.steps),
            guidance,
            true_cfg: request.true_cfg.unwrap_or(1.0),
            max_sequence_length,
            source_sha256: request.image.as_ref().map(image::sha256),
            reference,
        })
    }

    /// What decides how much memory the request takes.
    fn work(&self, request: &EditRequest, plan: &Plan) -> Work {
        Work {
            output: plan.output,
            reference: plan.reference.as_ref().map(|(_, size)| *size),
            images: request.seeds.images(),
            prompts: 1 + usize::from(request.negative_prompt.is_some()),
            text_tokens: plan.max_sequence_length,
            steps: plan.steps,
            step_cache: request.cache.is_some(),
            loras: request.loras.iter().filter_map(|lora| lora.file.metadata().ok()).map(|file| file.len()).sum(),
            keep_loaded: self.keep_loaded,
        }
    }

    fn parameters(&self, request: &EditRequest, plan: &Plan, image: usize) -> Parameters {
        let (seed, batch) = match &request.seeds {
            Seeds::Each(seeds) => (seeds[image], None),
            Seeds::Shared { seed, images } => (*seed, Some((image, *images))),
        };
        Parameters {
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone(),
            true_cfg: plan.true_cfg,
            seed,
            batch,
            model: self.model.files().name.clone(),
            single_files: self.model.files().single_files(),
            steps: plan.steps,
            guidance: plan.guidance,
            cache: request.cache,
            max_sequence_length: plan.max_sequence_length,
            width: plan.output.0,
            height: plan.output.1,
            size: request.size,
            reference_size: request.reference_size,
            reference: plan.reference.as_ref().map(|(_, size)| *size),
            source_sha256: plan.source_sha256.clone(),
            source_name: None,
            dtype: self.precision.to_string(),
            quantize: self.quantize.map(|target| target.to_string()),
            device: self.device_name.clone(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            loras: request.loras.iter().map(StoredLora::from).collect(),
            lora_partial: request.lora_partial,
        }
    }
}

/// What the T5 encoder of FLUX.1 was trained with.
const MAX_T5_TOKENS: usize = 512;

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
    last: Instant,
    recorder: Option<&'a Recorder>,
}

impl<'a> Clock<'a> {
    fn start(recorder: Option<&'a Recorder>) -> Self {
        Self { last: Instant::now(), recorder }
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
