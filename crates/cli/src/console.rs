//! What is said to the user: results on standard output, all else on standard error.

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use indicatif::{MultiProgress, ProgressDrawTarget};
use retouch::Control;
use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};
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
    stop: Arc<AtomicBool>,
    /// The number of the signal that set `stop`.
    signal: Arc<AtomicUsize>,
}

impl Console {
    pub fn new(verbosity: &Verbosity) -> Self {
        let target = if verbosity.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let console = Self {
            bars: MultiProgress::with_draw_target(target),
            quiet: verbosity.quiet,
            verbose: verbosity.verbose,
            stop: Arc::default(),
            signal: Arc::default(),
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

    /// Says how much memory this process has held at most, where that is asked for and known.
    pub fn note_peak_memory(&self) {
        if let Some(bytes) = peak_memory().filter(|_| self.is_verbose()) {
            self.note(&format!("peak memory {:.2} GiB", bytes as f64 / f64::from(1 << 30)));
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

    /// From now on Ctrl-C and a request to terminate ask for a stop; a second one ends the process at once.
    ///
    /// A hang-up is left alone: it ends the process at once, as it should, unless `nohup` says that it should not.
    pub fn catch_signals(&self) -> Result<()> {
        let catch = |signal: i32| {
            // In the order in which they act.
            flag::register_conditional_shutdown(signal, 128 + signal, self.stop.clone())?;
            flag::register_usize(signal, self.signal.clone(), signal as usize)?;
            flag::register(signal, self.stop.clone())
        };
        [SIGINT, SIGTERM].into_iter().try_for_each(|signal| {
            catch(signal).map(drop).map_err(|e| Failure::Failed(format!("signals cannot be caught: {e}")))
        })
    }

    /// Fails once a signal asked for a stop.
    pub fn check_stop(&self) -> Result<()> {
        if !self.stop.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Failure::Interrupted { signal: self.signal.load(Ordering::SeqCst) as u8 })
    }

    /// The same for who computes.
    pub fn control(&self) -> Control {
        if self.stop.load(Ordering::SeqCst) { Control::Cancel } else { Control::Continue }
    }

    /// The flag that a signal sets.
    pub fn stop_flag(&self) -> Arc<AtomicBool> {
        self.stop.clone()
    }
}

/// Without the control characters by which a name or a prompt out of a file could command the terminal.
pub fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}

/// In bytes. Not `getrusage` as on macOS: on Linux that can be the peak of the program that started this one.
#[cfg(target_os = "linux")]
fn peak_memory() -> Option<u64> {
    // See proc_pid_status(5).
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kibibytes * 1024)
}

#[cfg(target_os = "macos")]
fn peak_memory() -> Option<u64> {
    use nix::sys::resource::{UsageWho, getrusage};
    getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss().try_into().ok() // in bytes there
}

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
fn peak_memory() -> Option<u64> {
    None
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
