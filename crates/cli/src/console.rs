//! What is said to the user: results on standard output, all else on standard error.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use indicatif::{MultiProgress, ProgressDrawTarget};
use tracing::level_filters::LevelFilter;

use crate::{
    args::Verbosity,
    failure::{Failure, Result},
    output_failed,
};

/// The user's terminal, or what stands in its place.
#[derive(Clone)]
pub struct Console {
    /// Progress bars; hidden unless standard error is a terminal.
    pub bars: MultiProgress,
    quiet: bool,
    verbose: u8,
    interrupted: Arc<AtomicBool>,
}

impl Console {
    pub fn new(verbosity: &Verbosity) -> Self {
        let target = if verbosity.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let console = Self {
            bars: MultiProgress::with_draw_target(target),
            quiet: verbosity.quiet,
            verbose: verbosity.verbose,
            interrupted: Arc::default(),
        };
        let level = match (verbosity.quiet, verbosity.verbose) {
            (true, _) => LevelFilter::ERROR,
            (_, 0) => LevelFilter::WARN,
            (_, 1) => LevelFilter::INFO,
            _ => LevelFilter::DEBUG,
        };
        let bars = console.bars.clone();
        let log = tracing_subscriber::fmt()
            .with_max_level(level)
            .without_time()
            .with_writer(move || AboveBars(bars.clone()))
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()));
        // Fails only where a log is set already, which then serves as well.
        let _ = log.try_init();
        console
    }

    pub fn is_verbose(&self) -> bool {
        self.verbose > 0
    }

    /// Says something beside the result.
    pub fn note(&self, text: &str) {
        if !self.quiet {
            self.line(text);
        }
    }

    /// Reports why something did not succeed.
    pub fn failure(&self, failure: &Failure) {
        let Some(message) = failure.message() else { return };
        // Causes from below can bring a stack trace along.
        let sentence = message.lines().next().unwrap_or_default();
        self.line(&format!("error: {}", if self.verbose > 1 { message } else { sentence }));
    }

    fn line(&self, text: &str) {
        let text = printable(text);
        self.bars.suspend(|| {
            // Nothing can be said about a closed standard error.
            let _ = writeln!(io::stderr(), "{text}");
        });
    }

    /// Writes to standard output.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.bars.suspend(|| {
            let mut out = io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush()).map_err(output_failed)
        })
    }

    /// From now on Ctrl-C asks for a stop, which [`Self::interrupted`] tells; a second one ends the process at once.
    pub fn catch_interrupts(&self) -> Result<()> {
        let interrupted = self.interrupted.clone();
        let handler = move || {
            if interrupted.swap(true, Ordering::SeqCst) {
                std::process::exit(i32::from(Failure::Interrupted.exit_code()));
            }
        };
        ctrlc::set_handler(handler).map_err(|e| Failure::Failed(format!("Ctrl-C cannot be caught: {e}")))
    }

    pub fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
}

/// Without the control characters by which a name or a prompt out of a file could command the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// Standard error, written to without tearing the progress bars.
struct AboveBars(MultiProgress);

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.suspend(|| io::stderr().write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
