//! Progress of downloads, conversions and edits, drawn as bars on a terminal, and their interruption.

use std::{
    ops::ControlFlow,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use indicatif::{FormattedDuration, HumanBytes, ProgressBar, ProgressStyle};
use retouch::{Control, Event, Observer, Stage, weights::hub};

use crate::console::Console;

/// Follows an edit.
pub struct EditProgress<'a> {
    console: &'a Console,
    bar: Option<ProgressBar>,
    images: usize,
    /// Time of all steps so far.
    spent: Duration,
}

impl<'a> EditProgress<'a> {
    /// `images` is how many images share the bar.
    pub fn new(console: &'a Console, images: usize) -> Self {
        Self { console, bar: None, images, spent: Duration::ZERO }
    }

    fn spin(&mut self, text: String) {
        self.clear();
        let bar = self.console.bars.add(ProgressBar::new_spinner().with_message(text));
        bar.enable_steady_tick(Duration::from_millis(120));
        self.bar = Some(bar);
    }

    fn step(&mut self, done: usize, total: usize, took: Duration) {
        if done == 1 {
            self.clear();
            let bar = self.console.bars.add(ProgressBar::new(total as u64));
            bar.set_style(style("editing [{bar:30}] {pos}/{len} steps, {msg}"));
            self.bar = Some(bar);
        }
        self.spent += took;
        if let Some(bar) = &self.bar {
            let left = self.spent.mul_f64(total.saturating_sub(done) as f64 / done as f64);
            bar.set_message(format!("{:.2} s/step, {} left", took.as_secs_f64(), FormattedDuration(left)));
            bar.set_position(done as u64);
        }
    }

    /// Takes the bar away.
    pub fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            self.console.bars.remove(&bar);
        }
    }
}

impl Observer for EditProgress<'_> {
    fn on(&mut self, event: Event<'_>) -> Control {
        match event {
            Event::Planned { memory } => {
                if self.console.is_verbose() {
                    self.console.note(&format!("memory: {memory}"));
                }
            }
            Event::Loading { stage, bytes } => {
                let what = match stage {
                    Stage::TextEncoders => "text encoders",
                    Stage::VaeEncoder => "image encoder",
                    Stage::Transformer => "transformer",
                    Stage::VaeDecoder => "image decoder",
                };
                self.spin(format!("loading the {what} ({})", HumanBytes(bytes as u64)));
            }
            Event::Computing { stage } => self.spin(
                match stage {
                    Stage::TextEncoders => "reading the prompt",
                    Stage::VaeEncoder => "reading the image",
                    Stage::Transformer => "making the first step",
                    Stage::VaeDecoder => "making the pixels",
                }
                .to_string(),
            ),
            Event::PromptCut { tokens, kept } => self.console.note(&format!(
                "note: the prompt has {tokens} tokens, of which the model reads the first {kept}; the rest is cut off"
            )),
            Event::Step { image, step, steps, took, .. } => {
                self.step(image * steps + step + 1, steps * self.images, took);
            }
        }
        self.console.control()
    }

    fn cancel_flag(&self) -> Option<Arc<AtomicBool>> {
        Some(self.console.stop_flag())
    }
}

/// Follows a download.
pub struct DownloadProgress<'a> {
    console: &'a Console,
    bar: Option<ProgressBar>,
    /// The file being fetched, and how much of it is there.
    current: (String, u64),
    /// Bytes of the files before it.
    before: u64,
}

impl<'a> DownloadProgress<'a> {
    pub fn new(console: &'a Console) -> Self {
        Self { console, bar: None, current: Default::default(), before: 0 }
    }
}

impl hub::DownloadProgress for DownloadProgress<'_> {
    fn begin(&mut self, _files: usize, bytes: u64) {
        self.finish();
        let bar = self.console.bars.add(ProgressBar::new(bytes));
        bar.set_style(style("{msg} [{bar:30}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left"));
        bar.set_message("downloading");
        self.bar = Some(bar);
        (self.current, self.before) = Default::default();
    }

    fn on(&mut self, file: &str, done: u64, _total: u64) -> ControlFlow<()> {
        if self.current.0 != file {
            self.before += self.current.1;
            self.current.0 = file.to_string();
        }
        self.current.1 = done;
        if let Some(bar) = &self.bar {
            bar.set_position(self.before + done);
        }
        match self.console.control() {
            Control::Continue => ControlFlow::Continue(()),
            Control::Cancel => ControlFlow::Break(()),
        }
    }
}

impl DownloadProgress<'_> {
    fn finish(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
            self.console.bars.remove(&bar);
        }
    }
}

impl Drop for DownloadProgress<'_> {
    fn drop(&mut self) {
        self.finish();
    }
}

impl Drop for EditProgress<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A file that grows.
pub struct BytesProgress<'a> {
    console: &'a Console,
    bar: ProgressBar,
}

impl<'a> BytesProgress<'a> {
    pub fn new(console: &'a Console, what: &'static str) -> Self {
        let bar = console.bars.add(ProgressBar::new(0));
        bar.set_style(style("{msg} [{bar:30}] {bytes}/{total_bytes}, {bytes_per_sec}, {eta} left"));
        bar.set_message(what);
        Self { console, bar }
    }

    pub fn show(&mut self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }
}

impl Drop for BytesProgress<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        self.console.bars.remove(&self.bar);
    }
}

/// The templates are ours: one that does not parse shows as a plain bar.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
