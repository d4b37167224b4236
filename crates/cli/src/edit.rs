//! The commands `edit` and `generate`: from arguments to files.

use std::path::{Path, PathBuf};

use retouch::{
    EditRequest, EditResult, Engine, EngineOptions, ModelSource, Parameters, Seeds, Timings,
    image::{RgbImage, check_writable, read_parameters, sha256},
};
use serde::Serialize;

use crate::{
    args::{CommonArgs, EditArgs, GenerateArgs, RunArgs},
    batch,
    console::Console,
    failure::{Failure, Result},
    files::{self, Output, display},
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
    run_one(request, Some(source), None, common, console)
}

/// `retouch generate`.
pub fn generate(args: Box<GenerateArgs>, console: &Console) -> Result<()> {
    let GenerateArgs { prompt, common } = *args;
    let request = common.settings.request(prompt)?;
    run_one(request, None, None, common, console)
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
    // Single files are stored by name only, as folders are nobody's business: they have to be given again.
    let given = common.model.given();
    if let Some((option, file)) = stored.single_files.iter().find(|(option, _)| !given.contains(&option.as_str())) {
        return Failure::usage(format!("{} was made with {option} {file}; give that file again", display(from)));
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
    common.settings = common.settings.or(&SettingsArgs::from(&stored));
    common.run.device = common.run.device.or_else(|| stored.device.parse().ok());
    common.run.dtype = common.run.dtype.or_else(|| stored.dtype.parse().ok());
    let mut request = common.settings.request(prompt.unwrap_or(stored.prompt))?;
    if let Some((_, images)) = batch {
        request.seeds = Seeds::Shared { seed: stored.seed, images };
        request.check()?;
    }
    let stored = Stored { model: stored.model, image: batch.map(|(image, _)| image), guidance };
    run_one(request, source, Some(stored), common, console)
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
struct Stored {
    model: String,
    /// The one image of a batch to write.
    image: Option<usize>,
    /// Whether the guidance scale is the stored one, which another model may have no use for.
    guidance: bool,
}

/// Runs one request from engine to files.
fn run_one(
    request: EditRequest,
    source: Option<Source>,
    stored: Option<Stored>,
    common: CommonArgs,
    console: &Console,
) -> Result<()> {
    let CommonArgs { output, model, run, .. } = common;
    let only = stored.as_ref().and_then(|stored| stored.image);
    let images = if only.is_some() { 1 } else { request.seeds.images() };
    if run.keep_loaded && images == 1 {
        return Failure::usage("--keep-loaded acts only between several images; leave it out or ask for more");
    }
    if let Some(dump) = &output.dump {
        check_writable(dump, output.force)?;
    }
    let path = source.as_ref().map(|source| source.path.as_path());
    let place = Output::plan(&output, output.output.as_deref(), path, images)?;
    let mut job = Job::new(request, source, place, only)?;
    console.catch_interrupts()?;
    let mut engine = open(&model.source(stored.as_ref().map(|stored| stored.model.as_str())), &run, console)?;
    if stored.is_some_and(|stored| stored.guidance) && !engine.takes_guidance() {
        job.request.guidance = None;
    }
    let mut session = Session { engine: &mut engine, console, json: output.json, keep_loaded: run.keep_loaded };
    session.run(job, output.dump.as_deref())?;
    if console.is_verbose()
        && let Some(bytes) = peak_memory()
    {
        console.note(&format!("peak memory {:.2} GiB", bytes as f64 / f64::from(1 << 30)));
    }
    Ok(())
}

/// Opens the model, with progress if it has to be downloaded.
pub fn open(source: &ModelSource, run: &RunArgs, console: &Console) -> Result<Engine> {
    let options =
        EngineOptions { device: run.device.unwrap_or_default(), precision: run.dtype, keep_loaded: run.keep_loaded };
    let engine = Engine::open(source, options, &mut DownloadProgress::new(console));
    if console.interrupted() { Err(Failure::Interrupted) } else { Ok(engine?) }
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
        let Job { mut request, source_name, output, only } = job;
        // Loaded once, the model can as well make one image after the other; else one pass over its stages makes all.
        let parts = match &request.seeds {
            Seeds::Each(seeds) if self.keep_loaded => seeds.iter().map(|&seed| Seeds::Each(vec![seed])).collect(),
            all => vec![all.clone()],
        };
        let mut number = 0;
        for seeds in parts {
            request.seeds = seeds;
            let EditResult { images, timings } = self.compute(&request, dump)?;
            for (_, mut image) in images.into_iter().enumerate().filter(|(i, _)| only.is_none_or(|only| only == *i)) {
                number += 1;
                image.parameters.source_name = source_name.clone();
                let path = output.write(&image, number, self.console)?;
                self.report(path.as_deref(), &image.parameters, &timings)?;
            }
        }
        Ok(())
    }

    fn compute(&mut self, request: &EditRequest, dump: Option<&Path>) -> Result<EditResult> {
        let mut progress = EditProgress::new(self.console, request.seeds.images());
        let (result, trace) = match dump {
            None => (self.engine.edit(request, &mut progress), None),
            Some(_) => match self.engine.edit_traced(request, &mut progress) {
                Ok((result, trace)) => (Ok(result), Some(trace)),
                Err(error) => (Err(error), None),
            },
        };
        drop(progress);
        // Also where the last step was done by then: who interrupts wants no result.
        if self.console.interrupted() {
            return Err(Failure::Interrupted);
        }
        let result = result?;
        if let (Some(trace), Some(path)) = (trace, dump) {
            trace.write(path)?;
        }
        Ok(result)
    }

    /// Prints a result, and what is worth knowing about it.
    fn report(&self, path: Option<&Path>, made: &Parameters, timings: &Timings) -> Result<()> {
        let Timings { text_seconds, reference_seconds, load_seconds, steps_seconds, decode_seconds } = timings;
        let seconds = text_seconds + reference_seconds + load_seconds + steps_seconds + decode_seconds;
        let Parameters { seed, width, height, model, device, dtype, steps, .. } = made;
        if self.json {
            let path = path.map(|path| path.to_string_lossy());
            let line =
                Line { path: path.as_deref(), seed: *seed, width: *width, height: *height, model, seconds, timings };
            let mut line = serde_json::to_string(&line).map_err(|e| Failure::Failed(e.to_string()))?;
            line.push('\n');
            self.console.write(line.as_bytes())?;
        } else if let Some(path) = path {
            self.console.write(format!("{}\n", path.display()).as_bytes())?;
        }
        self.console.note(&format!("{width}x{height}, seed {seed}, {seconds:.1} s"));
        if self.console.is_verbose() {
            self.console.note(&format!("{model} on {device} in {dtype}, {steps} steps"));
            self.console.note(&format!(
                "text {text_seconds:.2} s, reference image {reference_seconds:.2} s, transformer loading \
                 {load_seconds:.2} s, steps {steps_seconds:.2} s, pixels {decode_seconds:.2} s"
            ));
        }
        Ok(())
    }
}

/// What `--json` prints for an image.
#[derive(Serialize)]
struct Line<'a> {
    /// Missing where the image went to standard output.
    path: Option<&'a str>,
    seed: u64,
    width: usize,
    height: usize,
    model: &'a str,
    /// Of the whole request, which makes all of its images.
    seconds: f64,
    timings: &'a Timings,
}

/// The most memory that this process has held so far, in bytes, where the system tells.
fn peak_memory() -> Option<u64> {
    // Linux; see proc_pid_status(5).
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}
