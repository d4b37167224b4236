//! `retouch convert`: weights in fewer bits, as a file of their own.

use std::ops::ControlFlow;

use indicatif::DecimalBytes;
use retouch::{Control, convert};

use crate::{args::ConvertArgs, console::Console, failure::Result, progress::BytesProgress};

pub fn run(args: &ConvertArgs, console: &Console) -> Result<()> {
    console.catch_signals()?;
    let mut bar = BytesProgress::new(console, "converting");
    let converted = convert(&args.input, &args.output, args.kind, &args.keep, args.force, |done, total| {
        bar.show(done as u64, total as u64);
        match console.control() {
            Control::Continue => ControlFlow::Continue(()),
            Control::Cancel => ControlFlow::Break(()),
        }
    });
    drop(bar);
    console.check_stop()?;
    let converted = converted?;
    console.note(&format!("{} in {}, {}", converted.component, args.kind, DecimalBytes(converted.bytes as u64)));
    console.note_peak_memory();
    console.write(format!("{}\n", args.output.display()).as_bytes())
}
