//! The command line of retouch: arguments, progress, files. No model code.
//!
//! Standard output carries results alone (paths, JSON or an image); everything said meanwhile goes to standard error.
//! Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (Ctrl-C), 143 terminated.

mod args;
mod batch;
mod console;
mod convert;
mod edit;
mod failure;
mod files;
mod info;
mod lora;
mod models;
mod plan;
mod profile;
mod progress;
mod serve;
mod settings;

use std::{io, panic, process::ExitCode};

use clap::CommandFactory;

use args::{Cli, Command, Verbosity};
use console::Console;
use failure::{Failure, Result};

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let cli = match args::parse() {
        Ok(cli) => cli,
        Err(failure) => {
            Console::new(&Verbosity::default()).failure(&failure);
            return ExitCode::from(failure.exit_code());
        }
    };
    let console = Console::new(&cli.verbosity);
    // A panic is a bug: one sentence instead of a trace, and an ordinary failure for whoever waits for the result.
    panic::set_hook(Box::new(|info| {
        let place = info.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
        let payload = info.payload();
        let what = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let what = what.unwrap_or("it gave no reason");
        eprintln!("error: this is a bug in retouch{place} ({what}); please report it with the command that you ran");
    }));
    match panic::catch_unwind(|| run(cli.command, &console)) {
        Ok(Ok(())) => ExitCode::SUCCESS,
        Ok(Err(failure)) => {
            console.failure(&failure);
            ExitCode::from(failure.exit_code())
        }
        Err(_) => ExitCode::from(1),
    }
}

fn run(command: Command, console: &Console) -> Result<()> {
    match command {
        Command::Edit(args) => edit::edit(args, console),
        Command::Generate(args) => edit::generate(args, console),
        Command::Info(args) => info::run(&args, console),
        Command::Convert(args) => convert::run(&args, console),
        Command::Plan(args) => plan::run(&args, console),
        Command::Models(args) => models::run(&args, console),
        Command::Serve(args) => serve::run(args, console),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "retouch", &mut script);
            console.write(&script)
        }
    }
}

/// Standard output is gone, e.g. closed by `head`.
fn output_failed(reason: io::Error) -> Failure {
    Failure::Failed(format!("standard output cannot be written: {reason}"))
}
