//! Whether patches are built from what guests run, over many source files.
//!
//! usage: cargo run --release -p e2e --bin selfcheck [FILES [KERNEL]]

use std::process::ExitCode;

use e2e::kit;
use e2e::selfcheck::{Error, Source};
use e2e::session;
use images::guest::Guest;
use images::kernel::Kernel;

/// Files, unless the command line says otherwise.
const FILES_DEFAULT: usize = 300;

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("selfcheck: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<bool, Error> {
    let count = std::env::args().nth(1).map_or(Ok(FILES_DEFAULT), |text| text.parse())?;
    let kernel = std::env::args()
        .nth(2)
        .map_or(Kernel::CLOUD_6_1, |name| Kernel::named(&name));
    let source = Source::of(&kernel)?;
    let guest = Guest::boot(kit::guest(kernel).name(&format!("vmselfcheck-{}", std::process::id())))?;
    let session = session::open(&guest)?;
    let tally = source.check(&session.live(), &source.files(count), &|line| println!("{line}"))?;
    println!("{tally}");
    Ok(tally.is_clean())
}
