//! Storms: applies and reverts in a loop while the guest changes what vmpatch reads and writes; see `e2e::storm`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use e2e::consistency;
use e2e::storm::cycles::{Cycle, Length, Outcomes};
use e2e::storm::run::{self, Plan, Report};
use e2e::storm::{self, Storm, table};
use guest_core::commit::Model;
use images::kernel::Kernel;

/// Between two lines that say how far it is.
const SAID_EVERY: Duration = Duration::from_secs(10);

/// Applies and reverts patches in a loop while the guest does its worst, and prints a table of what came of it.
///
/// Each storm has a guest of its own for each kernel and number of vCPUs. It ends after --cycles, or --seconds, or as soon as the
/// guest's kernel complains. Exit 0: nothing was wrong in any of them.
#[derive(Parser)]
#[command(name = "storm", after_help = storms())]
struct Cli {
    /// Which storm, or `all` [may be given several times]
    #[arg(long, default_value = "all")]
    storm: Vec<String>,
    /// Kernel of the guest: a short name (see `vmpatch-images list`) or a package [may be given several times]
    #[arg(long, default_value = "6.1-cloud")]
    kernel: Vec<String>,
    /// vCPUs of the guest [may be given several times]
    #[arg(long, default_value = "2")]
    vcpus: Vec<u32>,
    /// What a cycle is made of; without vmpatch, to see what a guest does by itself
    #[arg(long, value_enum, default_value_t)]
    cycle: Cycle,
    /// Cycles in each storm
    #[arg(long, default_value_t = 100)]
    cycles: u64,
    /// The most seconds that each storm lasts
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
    /// How long each apply and revert looks for a safe moment, in seconds
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
    /// In place of storms, CYCLES applies and reverts by one process, in a guest whose vCPUs do nothing but call what is patched
    #[arg(long, value_name = "CYCLES", exclusive = true)]
    consistency: Option<u64>,
    /// Folder for the consoles of guests that were not healthy
    #[arg(long, default_value = "target/storms")]
    logs: PathBuf,
}

fn all() -> impl Iterator<Item = &'static dyn Storm> {
    storm::ALL.into_iter().chain([storm::MIXED])
}

fn storms() -> String {
    let lines = all().map(|storm| format!("  {:<16} {}\n", storm.name(), storm.what()));
    format!("Storms:\n{}", lines.collect::<String>())
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(cycles) = cli.consistency {
        consistency::run(cycles, Model::CleanCut);
        return ExitCode::SUCCESS;
    }
    let mut chosen: Vec<&dyn Storm> = Vec::new();
    for name in &cli.storm {
        match (name.as_str(), storm::named(name)) {
            ("all", _) => chosen.extend(all()),
            (_, Some(storm)) => chosen.push(storm),
            (_, None) => {
                eprintln!("storm: there is no storm {name}\n{}", storms());
                return ExitCode::from(2);
            }
        }
    }
    let (mut reports, mut begun) = (Vec::new(), true);
    for kernel in &cli.kernel {
        for vcpus in &cli.vcpus {
            let plan = Plan {
                kernel: Kernel::named(kernel),
                vcpus: *vcpus,
                length: Length {
                    cycles: cli.cycles,
                    time: Duration::from_secs(cli.seconds),
                },
                cycle: cli.cycle,
                timeout: Duration::from_secs_f64(cli.timeout),
                logs: cli.logs.clone(),
            };
            for storm in &chosen {
                println!("{} on {kernel}, {vcpus} vCPUs: {}", storm.name(), storm.what());
                match run::run(*storm, &plan, &mut said_at_times()) {
                    Ok(report) => {
                        say(&report);
                        reports.push(report);
                    }
                    Err(error) => {
                        begun = false;
                        println!("  did not begin: {error}");
                    }
                }
            }
        }
    }
    println!("\n{}", table::markdown(&reports));
    if begun && reports.iter().all(Report::is_clean) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Tells how far it is, not too often.
fn said_at_times() -> impl FnMut(&Outcomes) {
    let start = Instant::now();
    let mut last = start;
    move |outcomes| {
        if last.elapsed() >= SAID_EVERY {
            last = Instant::now();
            println!("  {:>4} s: {}", start.elapsed().as_secs(), counted(outcomes));
        }
    }
}

fn counted(outcomes: &Outcomes) -> String {
    format!(
        "{} cycles, {} applied, {} reverted, {} times exit 4, {} refused, {} failed",
        outcomes.cycles,
        outcomes.applied,
        outcomes.reverted,
        outcomes.not_safe_in_all(),
        outcomes.refused_in_all(),
        outcomes.failures.len()
    )
}

fn say(report: &Report) {
    println!("  after {:.0?}: {}", report.took, counted(&report.outcomes));
    for (said, times) in &report.outcomes.not_safe {
        println!("  exit 4 {times} times: {said}");
    }
    for (said, times) in &report.outcomes.refused {
        println!("  refused {times} times: {said}");
    }
    for (name, rounds) in &report.work {
        println!("  {name}: {} rounds", rounds.rounds);
    }
    println!("  {:?}", report.calls);
    for wrong in &report.wrong {
        println!("  WRONG: {wrong}");
    }
}
