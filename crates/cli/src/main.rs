//! The binary `retouch`.

use std::process::ExitCode;

fn main() -> ExitCode {
    retouch_cli::main()
}
