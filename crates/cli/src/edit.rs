//! The commands `edit` and `generate`: from arguments to files.

use std::path::{Path, PathBuf};

use retouch::{
    Control, EditRequest, EditResult, EditedImage, Engine, EngineOptions, Error, ModelSource, Observer, Parameters,
    Seeds, Timings,
    image::{RgbImage, read_parameters, sha256},
};
use serde::Serialize;

use crate::{
    args::{CommonArgs, EditArgs, GenerateArgs, RunArgs},
    batch,
    console::Console,
    failure::{Failure, Result},
    files::{self, Output, display},
    lora, profile,
    progress::{DownloadProgress, EditProgress},
    settings::SettingsArgs,
};

/// `retouch edit`.
pub fn edit(args: Box<EditArgs>, console: &Console) -> Result<()> {
    let EditArgs { image, prompt, from, batch, common } = *args;
    if let Some(list) = batch {
        return batch::run(&list, &common, console);
    }
    if let Some(from) = from {
        return repeat(&from, image, prompt, common, console);
    }
    // clap has made sure of both.
    let (Some(path), Some(prompt)) = (image, prompt) else { return Failure::usage("give an image and a prompt") };
    let request = common.settings.request(prompt)?;
    let source = Source { picture: files::read_picture(&path)?, path };
    run_one(request, Some(source), Stored::default(), common, console)
}

/// `retouch generate`.
pub fn generate(args: Box<GenerateArgs>, console: &Console) -> Result<()> {
    let GenerateArgs { prompt, common } = *args;
    let request = common.settings.request(prompt)?;
    run_one(request, None, Stored::default(), common, console)
}

/// `retouch edit --from`: what `from` was made by, with the flags that are given in place of stored parameters.
fn repeat(
    from: &Path,
    image: Option<PathBuf>,
    prompt: Option<String>,
    mut common: CommonArgs,
    console: &Console,
) -> Result<()> {
    let Some(stored) = read_parameters(&files::read(from)?, &display(from))? else {
        return Err(Failure::Failed(format!(
            "{}: no parameters are stored in it; only images that retouch wrote without --no-metadata have them",
            display(from)
        )));
    };
    if stored.version != env!("CARGO_PKG_VERSION") {
        let (then, now) = (&stored.version, env!("CARGO_PKG_VERSION"));
        console.note(&format!("note: {} was made by retouch {then}, this is {now}: results may differ", display(from)));
    }
    let source = match (image, &stored.source_sha256) {
        (Some(path), wanted) => {
            let picture = files::read_picture(&path)?;
            if wanted.as_ref().is_some_and(|wanted| *wanted != sha256(&picture)) {
                let (path, from) = (display(&path), display(from));
                console.note(&format!("note: {path} is not the image that {from} was made from: results differ"));
            }
            Some(Source { picture, path })
        }
        (None, Some(wanted)) => Some(find_source(from, &stored, wanted)?),
        (None, None) => None,
    };
    // The batch that the image was drawn in, unless other seeds are asked for.
    let batch = stored.batch.filter(|_| common.settings.seed.is_empty() && common.settings.num_images.is_none());
    let guidance = common.settings.guidance.is_none();
    if common.settings.lora.is_none() {
        lora::check_stored(from, &stored, console)?;
    }
    common.settings = common.settings.or(&SettingsArgs::from(&stored));
    common.run.device = common.run.device.or_else(|| stored.device.parse().ok());
    common.run.dtype = common.run.dtype.or_else(|| stored.dtype.parse().ok());
    common.run.encoders = common.run.encoders.or_else(|| stored.encoders.as_ref()?.parse().ok());
    common.run.quantize = common.run.quantize.or_else(|| stored.quantize.as_ref()?.parse().ok());
    let model = ModelSource::of(&stored);
    let mut request = common.settings.request(prompt.unwrap_or(stored.prompt))?;
    if let Some((_, images)) = batch {
        request.seeds = Seeds::Shared { seed: stored.seed, images };
        request.check()?;
    }
    let stored = Stored { model, image: batch.map(|(image, _)| image), guidance };
    run_one(request, source, stored, common, console)
}

/// The image that `from` was made from: of its stored name, and of the same pixels.
fn find_source(from: &Path, stored: &Parameters, sha: &str) -> Result<Source> {
    // A file can claim any name: only its last part is used.
    let name = stored.source_name.as_deref().and_then(|name| Path::new(name).file_name());
    let folders = [from.parent().unwrap_or(Path::new("")), Path::new("")];
    let candidates = name.into_iter().flat_map(|name| folders.map(|folder| folder.join(name)));
    let same = |path: PathBuf| {
        let picture = files::read_picture(&path).ok()?;
        (sha256(&picture) == sha).then_some(Source { picture, path })
    };
    candidates.filter(|path| path.is_file()).find_map(same).ok_or_else(|| {
        let called = name.map(|name| format!(" ({})", name.to_string_lossy())).unwrap_or_default();
        Failure::Failed(format!(
            "{from}: the image that it was made from{called} is neither beside it nor in the working directory; \
             give it: retouch edit --from {from} IMAGE",
            from = display(from)
        ))
    })
}

/// The picture to edit and its file.
pub struct Source {
    pub picture: RgbImage,
    pub path: PathBuf,
}

/// What a repeated edit takes from stored parameters that is no option of a request.
#[derive(Default)]
struct Stored {
    model: ModelSource,
    /// The one image of a batch to write.
    image: Option<usize>,
    /// Whether the guidance scale is the stored one, which another model may have no use for.
    guidance: bool,
}

/// Runs one request from engine to files.
fn run_one(
    request: EditRequest,
    source: Option<Source>,
    stored: Stored,
    common: CommonArgs,
    console: &Console,
) -> Result<()> {
    let CommonArgs { output, model, run, .. } = common;
    let images = if stored.image.is_some() { 1 } else { request.seeds.images() };
    if run.keep_loaded && images == 1 {
        return Failure::usage("--keep-loaded acts only between several images; leave it out or ask for more");
    }
    if request.lora_partial && request.loras.is_empty() {
        return Failure::usage("--lora-partial acts only with a LoRA; give one by --lora, or leave it out");
    }
    let path = source.as_ref().map(|source| source.path.as_path());
    let place = Output::plan(&output, output.output.as_deref(), path, images)?;
    let mut job = Job::new(request, source, place, stored.image)?;
    console.catch_signals()?;
    let mut engine = open(&model.source(stored.model), &run, console)?;
    if stored.guidance && !engine.rules().takes_guidance {
        job.request.guidance = None;
    }
    let mut session = Session { engine: &mut engine, console, json: output.json, keep_loaded: run.keep_loaded };
    session.run(job, output.dump.as_deref())?;
    note_profile(&engine, console);
    console.note_peak_memory();
    Ok(())
}

/// Opens the model, with progress if it has to be downloaded.
pub fn open(source: &ModelSource, run: &RunArgs, console: &Console) -> Result<Engine> {
    let options = EngineOptions {
        device: run.device.unwrap_or_default(),
        precision: run.dtype,
        quantize: run.quantize,
        keep_loaded: run.keep_loaded.into(),
        encoders: run.encoders,
        vram_limit: run.vram_limit.map(|limit| limit.0),
        profile: run.profile,
        ..Default::default()
    };
    let engine = Engine::open(source, options, &mut DownloadProgress::new(console));
    console.check_stop()?;
    Ok(engine?)
}

/// Prints where the time went, if that was asked for.
pub fn note_profile(engine: &Engine, console: &Console) {
    for line in engine.profile().iter().flat_map(profile::table) {
        console.note(&line);
    }
}

/// A request and the place of its results.
pub struct Job {
    request: EditRequest,
    source_name: Option<String>,
    output: Output,
    /// The one image to write, where not all.
    only: Option<usize>,
}

impl Job {
    pub fn new(mut request: EditRequest, source: Option<Source>, output: Output, only: Option<usize>) -> Result<Self> {
        let Some(Source { picture, path }) = source else {
            if request.reference_size != Default::default() {
                return Failure::usage("a reference size needs an image to edit; leave it out");
            }
            return Ok(Self { request, source_name: None, output, only });
        };
        request.image = Some(picture);
        let source_name = (!files::is_stdio(&path)).then(|| path.file_name()).flatten();
        Ok(Self { request, source_name: source_name.map(|name| name.to_string_lossy().into_owned()), output, only })
    }
}

/// An engine at work on one job or several.
pub struct Session<'a> {
    pub engine: &'a mut Engine,
    pub console: &'a Console,
    pub json: bool,
    pub keep_loaded: bool,
}

impl Session<'_> {
    pub fn run(&mut self, job: Job, dump: Option<&Path>) -> Result<()> {
        let Self { engine, console, json, keep_loaded } = self;
        let Job { mut request, source_name, output, only } = job;
        // Loaded once, the model can as well make one image after the other; else one pass over its stages makes all.
        let parts = match &request.seeds {
            Seeds::Each(seeds) if *keep_loaded => seeds.iter().map(|&seed| Seeds::Each(vec![seed])).collect(),
            all => vec![all.clone()],
        };
        let mut number = 0;
        for seeds in parts {
            request.seeds = seeds;
            let (mut place, mut delivered) = (0.., Ok(()));
            let mut each = |mut image: EditedImage, timings: &Timings| {
                if only.is_some() && place.next() != only {
                    return Control::Continue;
                }
                number += 1;
                image.parameters.source_name = source_name.clone();
                // Also where the last step was done by then: who interrupts wants no result.
                delivered = console.check_stop().and_then(|()| {
                    let path = output.write(&image, number, console)?;
                    report(path.as_deref(), &image, timings, *json, console)
                });
                if delivered.is_ok() { Control::Continue } else { Control::Cancel }
            };
            let mut progress = EditProgress::new(console, request.seeds.images());
            let made = match dump {
                None => engine.edit_each(&request, &mut progress, each).map(drop).map_err(Failure::from),
                Some(dump) => edit_and_dump(engine, &request, &mut progress, &mut each, dump),
            };
            drop(progress);
            delivered?;
            if made.is_err() {
                console.check_stop()?;
            }
            made?;
        }
        Ok(())
    }
}

/// As [`Engine::edit_each`], with the intermediates, of which all images are a part, in a file afterwards.
fn edit_and_dump(
    engine: &mut Engine,
    request: &EditRequest,
    observer: &mut dyn Observer,
    each: &mut dyn FnMut(EditedImage, &Timings) -> Control,
    dump: &Path,
) -> Result<()> {
    let (EditResult { images, timings }, trace) = engine.edit_traced(request, observer)?;
    for image in images {
        if each(image, &timings) == Control::Cancel {
            return Err(Error::Cancelled.into());
        }
    }
    Ok(trace.write(dump)?)
}

/// Prints a result, and what is worth knowing about it.
fn report(path: Option<&Path>, image: &EditedImage, timings: &Timings, json: bool, console: &Console) -> Result<()> {
    let Timings { text_seconds, reference_seconds, load_seconds, first_step_seconds, steps_seconds, decode_seconds } =
        timings;
    let seconds = text_seconds + reference_seconds + load_seconds + steps_seconds + decode_seconds;
    let Parameters { seed, width, height, model, device, dtype, steps, .. } = &image.parameters;
    // What went to standard output has no path.
    if let Some(path) = path {
        let mut line = path.display().to_string();
        if json {
            let made = Line { path: &line, seed: *seed, width: *width, height: *height, model, seconds, timings };
            line = serde_json::to_string(&made).map_err(|e| Failure::Failed(e.to_string()))?;
        }
        console.write(format!("{line}\n").as_bytes())?;
    }
    console.note(&format!("{width}x{height}, seed {seed}, {seconds:.1} s"));
    if console.is_verbose() {
        console.note(&format!("{model} on {device} in {dtype}, {steps} steps"));
        if image.parameters.cache.is_some() {
            console.note(&format!("passes through the transformer saved by the step cache: {}", image.reused_passes));
        }
        console.note(&format!(
            "text {text_seconds:.2} s, reference image {reference_seconds:.2} s, transformer loading \
             {load_seconds:.2} s, steps {steps_seconds:.2} s (the first done after {first_step_seconds:.2} s), \
             pixels {decode_seconds:.2} s"
        ));
    }
    Ok(())
}

/// What `--json` prints for an image.
#[derive(Serialize)]
struct Line<'a> {
    path: &'a str,
    seed: u64,
    width: usize,
    height: usize,
    model: &'a str,
    /// Of the whole request up to this image: what comes before the pixels is done for all of its images together.
    seconds: f64,
    timings: &'a Timings,
}
