//! The other benchmark: how long an operator waits for a module. Each published fix is built twice by the optimised program, in a
//! cache of its own that has the packages but nothing made of them.
//!
//! usage: cargo run --release -p e2e --bin bench_build

use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use e2e::fixes::{FIXES, FROM, Fix, KERNEL, TO};
use e2e::vmpatch;
use patch_build::cache::Cache;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench_build: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let program = vmpatch::program()?;
    let cache = Cache::from_env()?;
    let own = std::env::temp_dir().join(format!("vmpatch-bench-build-{}", std::process::id()));
    fs::create_dir(&own)?;
    let result = measure(program, cache.root(), &own);
    fs::remove_dir_all(&own)?;
    result
}

fn measure(program: &Path, cache: &Path, own: &Path) -> Result<()> {
    let output = own.join("livepatch-bench.ko");
    // Downloads what is missing, and is not counted.
    build(program, cache, &FIXES[0], &output)?;
    let scratch = own.join("cache");
    fs::create_dir(&scratch)?;
    symlink(cache.join("packages"), scratch.join("packages"))?;
    println!("{KERNEL}, fixes of {FROM} to {TO}; seconds\n");
    let everything = build(program, &scratch, &FIXES[0], &output)?;
    println!(
        "unpacking both sources, preparing, and {}: {everything:.1?}\n",
        FIXES[0].function
    );
    println!("{:<16} {:<52} {:>7} {:>7}", "", "function", "first", "again");
    for fix in &FIXES {
        forget_objects(&scratch, fix)?;
        let first = build(program, &scratch, fix, &output)?.as_secs_f32();
        let again = build(program, &scratch, fix, &output)?.as_secs_f32();
        println!("{:<16} {:<52} {first:>7.1} {again:>7.1}", fix.cve, fix.function);
    }
    Ok(())
}

fn build(program: &Path, cache: &Path, fix: &Fix, output: &Path) -> Result<Duration> {
    let start = Instant::now();
    let ended = Command::new(program)
        .args(fix.arguments(&output.display().to_string()))
        .env("VMPATCH_CACHE", cache)
        .output()?;
    if !ended.status.success() {
        return Err(format!("{}: {}", fix.cve, String::from_utf8_lossy(&ended.stderr)).into());
    }
    Ok(start.elapsed())
}

/// Takes the object of the fix's file, which an earlier build may have left, out of the prepared tree.
fn forget_objects(cache: &Path, fix: &Fix) -> Result<()> {
    let file = fix.function.split(':').next().unwrap_or_default();
    let object = Path::new(file).with_extension("o");
    for tree in fs::read_dir(cache.join("builds"))? {
        let path: PathBuf = tree?.path().join(&object);
        if path.exists() {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
