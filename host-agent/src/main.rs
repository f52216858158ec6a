//! The `vmpatch` program.

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod program;

use std::process::ExitCode;

fn main() -> ExitCode {
    program::run()
}
