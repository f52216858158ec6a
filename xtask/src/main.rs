//! Everyday commands for work on vmpatch: `cargo xtask COMMAND`. Its tests check the repository's own text.

#[cfg(test)]
mod dependencies;
#[cfg(test)]
mod modules;
#[cfg(test)]
mod paths;
#[cfg(test)]
mod repository;
mod times;
#[cfg(test)]
mod words;

use std::env;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::Instant;
use times::Times;

const USAGE: &str = "usage: cargo xtask COMMAND [ARGUMENT…]

  test       unit tests alone: no guest, no QEMU, no network
  check      format and clippy, as CI does it
  e2e NAME…  end-to-end tests of these modules in tests/tests/e2e/ (needs images/setup.sh); without a name, all of them
  storm …    storms of applies and reverts: arguments of tests/src/bin/storm.rs, see --help
  bench …    the benchmark of the pause: arguments of tests/src/bin/bench.rs, see --help
  deny       bans, licences and sources of all dependencies (needs cargo-deny)";

/// Crates all of whose tests run without QEMU.
const WITHOUT_QEMU: [&str; 5] = ["guest-core", "process", "kvm", "patch-build", "xtask"];
/// Crates that have unit tests, and in `tests/` those that need QEMU.
const WITH_QEMU: [&str; 4] = ["qmp", "host-agent", "images", "e2e"];

/// True for a name by which end-to-end tests are chosen: of one that does not exist, all zero tests would pass.
fn is_e2e_module(name: &str) -> bool {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/tests/e2e");
    name != "main" && folder.join(format!("{name}.rs")).is_file()
}

/// The cargo commands of one of ours: all of them must succeed.
fn commands(name: &str, arguments: &[String]) -> Option<Vec<Vec<String>>> {
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let packages = |names: &[&str]| {
        names
            .iter()
            .flat_map(|name| words(&format!("--package {name}")))
            .collect()
    };
    let all = |parts: [Vec<String>; 2]| parts.concat();
    let bin = |name: &str| {
        all([
            words(&format!("run --release --package e2e --bin {name} --")),
            arguments.to_vec(),
        ])
    };
    let commands = match name {
        "test" => vec![
            all([words("test"), packages(&WITHOUT_QEMU)]),
            all([words("test --lib --bins"), packages(&WITH_QEMU)]),
        ],
        "check" => vec![
            words("fmt --check"),
            words("clippy --workspace --all-targets -- -D warnings"),
            words("clippy --package host-agent --no-default-features --all-targets -- -D warnings"),
        ],
        "e2e" if !arguments.iter().all(|name| is_e2e_module(name)) => return None,
        "e2e" => vec![
            words("build --release --package host-agent --bin vmpatch"),
            words("test --package e2e --test e2e --no-run"),
            all([
                words("test --package e2e --test e2e --"),
                arguments.iter().map(|name| format!("{name}::")).collect(),
            ]),
        ],
        "storm" | "bench" => vec![bin(name)],
        "deny" => vec![words("deny check bans licenses sources")],
        _ => return None,
    };
    Some(commands)
}

fn main() -> ExitCode {
    let mut arguments = env::args().skip(1);
    let name = arguments.next().unwrap_or_default();
    let Some(commands) = commands(&name, &arguments.collect::<Vec<_>>()) else {
        eprintln!("{USAGE}");
        return ExitCode::from(if matches!(name.as_str(), "" | "help" | "--help" | "-h") {
            0
        } else {
            2
        });
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let is_timed = |command: &[String]| name == "e2e" && command.iter().any(|word| word == "--");
    for command in commands {
        eprintln!("cargo {}", command.join(" "));
        let succeeded = match is_timed(&command) {
            true => timed(&cargo, &command),
            false => Command::new(&cargo)
                .args(&command)
                .status()
                .map(|status| status.success()),
        };
        match succeeded {
            Ok(true) => {}
            Ok(false) => return ExitCode::FAILURE,
            Err(error) => {
                eprintln!("can't run cargo: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

/// Runs `cargo test … -- …`, passes on what it prints, and prints how long each module took. True where all passed.
fn timed(cargo: &OsStr, command: &[String]) -> io::Result<bool> {
    let run = |more: &[&str]| {
        let mut run = Command::new(cargo);
        run.args(command).args(more).stdout(Stdio::piped());
        run
    };
    // That this run began is not printed: `tests/run.sh` counts those.
    let list = run(&["--list"]).output()?;
    if !list.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&list.stderr));
        return Ok(false);
    }
    // As the harness chooses by itself.
    let chosen = env::var("RUST_TEST_THREADS").ok().and_then(|text| text.parse().ok());
    let threads = chosen.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
    let mut times = Times::new(&String::from_utf8_lossy(&list.stdout), threads);
    let mut child = run(&["--test-threads", &threads.to_string()]).spawn()?;
    let start = Instant::now();
    for line in BufReader::new(child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        times.line(&line, start.elapsed());
    }
    let status = child.wait()?;
    println!("{}", times.table());
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::{USAGE, WITH_QEMU, WITHOUT_QEMU, commands};
    use crate::repository;

    #[test]
    fn every_command_of_the_usage_is_one_and_no_other_is() {
        let listed = USAGE
            .lines()
            .filter_map(|line| line.strip_prefix("  ")?.split_whitespace().next());
        for name in listed {
            assert!(commands(name, &[]).is_some(), "{name}");
        }
        assert!(commands("tset", &[]).is_none());
    }

    #[test]
    fn a_named_test_is_the_only_one_that_runs() {
        let lines = commands("e2e", &["cve".to_owned()]).unwrap();
        assert_eq!(lines[2].join(" "), "test --package e2e --test e2e -- cve::");
        assert!(commands("e2e", &["cve".to_owned(), "vce".to_owned()]).is_none());
    }

    /// The test harness chooses by a part of a test's name, which begins with its module's.
    #[test]
    fn no_end_to_end_module_is_chosen_along_with_another() {
        let modules: Vec<String> = repository::entries()
            .iter()
            .filter_map(|path| Some(path.strip_prefix("tests/tests/e2e/")?.strip_suffix(".rs")?.to_owned()))
            .collect();
        assert!(modules.len() > 40, "{modules:?}");
        for module in &modules {
            let along = modules
                .iter()
                .find(|other| other.ends_with(module.as_str()) && other != &module);
            assert_eq!(along, None, "{module}");
        }
    }

    #[test]
    fn each_crate_is_tested_with_or_without_qemu() {
        let manifest = repository::text("Cargo.toml");
        let members = manifest
            .lines()
            .find_map(|line| line.strip_prefix("members = "))
            .unwrap();
        let count = members.split(',').count();
        assert_eq!(WITHOUT_QEMU.len() + WITH_QEMU.len(), count, "{members}");
    }
}
