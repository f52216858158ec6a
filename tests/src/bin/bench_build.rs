//! The other benchmark: how long an operator waits for a module. Each published fix is built twice by the optimised program, in a
//! cache of its own that has the packages but nothing made of them. Or this program beside another one, in turns: there a fix over four files
//! with their header, too, and what the cache takes on the disk.
//!
//! usage: cargo run --release -p e2e --bin bench_build [-- --against PROGRAM]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use e2e::builds::{Builder, Took, median};
use e2e::fixes::{FIXES, FROM, KERNEL, TO};
use e2e::rules::{self, KERNEL_6_1, PRIVATE_HEADER};
use e2e::vmpatch;
use patch_build::cache::Cache;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Measures how long building a module takes.
#[derive(Debug, Parser)]
struct Options {
    /// Another vmpatch to measure beside this one: the same builds, in turns, and how many times as long this one takes.
    #[arg(long, value_name = "PROGRAM")]
    against: Option<PathBuf>,
    /// How often each is measured then, each time from an empty cache.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench_build: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let program = vmpatch::program()?;
    let cache = Cache::from_env()?;
    let own = std::env::temp_dir().join(format!("vmpatch-bench-build-{}", std::process::id()));
    fs::create_dir(&own)?;
    let packages = cache.root().join("packages");
    let result = match &options.against {
        None => each_fix(program, &packages, &own),
        Some(other) => side_by_side(&[other, program], options.rounds, &packages, &own),
    };
    fs::remove_dir_all(&own)?;
    result
}

fn each_fix(program: &Path, packages: &Path, own: &Path) -> Result<()> {
    let output = own.join("livepatch-bench.ko").display().to_string();
    // Downloads what is missing, and is not counted.
    Builder::new(program, own.join("first"), packages)?.build(&FIXES[0].arguments(&output))?;
    fs::remove_dir_all(own.join("first"))?;
    let builder = Builder::new(program, own.join("cache"), packages)?;
    println!("{KERNEL}, fixes of {FROM} to {TO}; seconds\n");
    let everything = builder.build(&FIXES[0].arguments(&output))?.wall;
    println!(
        "unpacking the source, preparing, and {}: {everything:.1?}\n",
        FIXES[0].function
    );
    println!("{:<16} {:<52} {:>7} {:>7}", "", "function", "first", "again");
    for fix in FIXES.iter().skip(1) {
        let mut builds = (0..2).map(|_| builder.build(&fix.arguments(&output)));
        let mut next = || builds.next().transpose();
        let [first, again] = [next()?, next()?].map(|took| took.map_or(0.0, |took| took.wall.as_secs_f32()));
        println!("{:<16} {:<52} {first:>7.1} {again:>7.1}", fix.cve, fix.function);
    }
    Ok(())
}

/// What is measured, in the order of one round.
const STEPS: [&str; 5] = [
    "first build of a kernel",
    "first build of a fix",
    "the same fix again",
    "four files and a header",
    "the same fix again",
];

/// One round of a program.
struct Round {
    took: Vec<Took>,
    /// The most that the cache took after a step [bytes].
    peak: u64,
}

fn side_by_side(programs: &[&Path; 2], rounds: usize, packages: &Path, own: &Path) -> Result<()> {
    println!(
        "{KERNEL}: {} beside {}, in turns, median of {rounds}\n",
        programs[1].display(),
        programs[0].display()
    );
    let mut all: [Vec<Round>; 2] = [Vec::new(), Vec::new()];
    for number in 0..rounds {
        for (program, rounds) in programs.iter().zip(&mut all) {
            let done = round(program, packages, own)?;
            let seconds: Vec<String> = done
                .took
                .iter()
                .map(|took| format!("{:.2}", took.wall.as_secs_f64()))
                .collect();
            eprintln!("round {}, {}: {}", number + 1, program.display(), seconds.join(" "));
            rounds.push(done);
        }
    }
    println!(
        "{:<26} {:>8} {:>8} {:>6}   {:>8} {:>8} {:>6}",
        "", "clock", "", "ratio", "CPU", "", "ratio"
    );
    for (step, name) in STEPS.iter().enumerate() {
        let of = |rounds: &[Round], pick: fn(&Took) -> f64| {
            let values: Vec<f64> = rounds
                .iter()
                .filter_map(|round| round.took.get(step).map(pick))
                .collect();
            median(&values)
        };
        let wall = all.each_ref().map(|rounds| of(rounds, |took| took.wall.as_secs_f64()));
        let processor = all
            .each_ref()
            .map(|rounds| of(rounds, |took| took.processor.as_secs_f64()));
        println!("{name:<26} {}   {}", row(wall), row(processor));
    }
    let peaks = all.each_ref().map(|rounds| {
        let peaks: Vec<f64> = rounds.iter().map(|round| round.peak as f64 / 1e9).collect();
        median(&peaks)
    });
    println!("{:<26} {}", "the cache at most [GB]", row(peaks));
    Ok(())
}

fn row([old, new]: [f64; 2]) -> String {
    format!("{old:>8.2} {new:>8.2} {:>5.2}x", new / old)
}

fn round(program: &Path, packages: &Path, own: &Path) -> Result<Round> {
    let output = own.join("livepatch-bench.ko").display().to_string();
    let [kernel, fix] = [FIXES[0].arguments(&output), FIXES[1].arguments(&output)];
    let diff = rules::write_diff(KERNEL_6_1, PRIVATE_HEADER, own).display().to_string();
    let header = ["build", "--kernel", KERNEL, &diff, "-o", &output];
    let cache = own.join("cache");
    let builder = Builder::new(program, cache.clone(), packages)?;
    let mut round = Round {
        took: Vec::new(),
        peak: 0,
    };
    let steps: [&[&str]; STEPS.len()] = [&kernel, &fix, &fix, &header, &header];
    for arguments in steps {
        round.took.push(builder.build(arguments)?);
        round.peak = round.peak.max(builder.size()?);
    }
    fs::remove_dir_all(cache)?;
    Ok(round)
}
