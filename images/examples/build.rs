//! Builds the test programs, and every livepatch module for one kernel, and prints where they are.
//!
//! usage: cargo run -p images --example build -- KERNEL
//!
//! KERNEL is a short name (see `vmpatch-images list`) or the name of a kernel's package.

use std::error::Error;

use images::build::hand_written::{Applied, Refused};
use images::build::{Cve, programs};
use images::cache::Cache;
use images::kernel::Kernel;

fn main() -> Result<(), Box<dyn Error>> {
    let name = std::env::args().nth(1).ok_or("usage: build KERNEL")?;
    println!("{}", programs::build(&Cache::from_env()?)?.display());
    let tree = Kernel::named(&name).headers()?;
    for cve in Cve::ALL.into_iter().filter(|cve| cve.concerns(tree.release())) {
        println!("{}", cve.module(&tree)?.display());
    }
    for module in Applied::ALL {
        println!("{}", module.build(&tree)?.display());
    }
    for module in Refused::ALL {
        println!("{}", module.build(&tree)?.display());
    }
    Ok(())
}
