//! Builds the test programs, and every livepatch module for one kernel, and prints where they are.
//!
//! usage: cargo run -p images --example build -- RELEASE [HEADERS-VERSION]

use std::error::Error;

use images::build::{Cve, KernelTree, programs};
use images::cache::Cache;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let release = args.next().ok_or("usage: build RELEASE [HEADERS-VERSION]")?;
    let version = args.next();
    let cache = Cache::from_env()?;
    println!("{}", programs::build(&cache)?.display());
    let tree = KernelTree::fetch(&cache, &release, version.as_deref())?;
    for cve in Cve::ALL {
        println!("{}", cve.module(&tree)?.display());
    }
    Ok(())
}
