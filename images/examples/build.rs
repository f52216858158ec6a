//! Builds the test programs, and every livepatch module for one kernel, and prints where they are.
//!
//! usage: cargo run -p images --example build -- RELEASE [HEADERS-VERSION]

use std::error::Error;

use images::build::hand_written::{Applied, Refused};
use images::build::{Cve, KernelTree, programs};
use images::cache::Cache;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let release = args.next().ok_or("usage: build RELEASE [HEADERS-VERSION]")?;
    let version = args.next();
    let cache = Cache::from_env()?;
    println!("{}", programs::build(&cache)?.display());
    let tree = KernelTree::fetch(&cache, &release, version.as_deref())?;
    for cve in Cve::ALL.into_iter().filter(|cve| cve.concerns(&release)) {
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
