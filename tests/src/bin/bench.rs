//! The benchmark: how long a guest is paused, and how long an operator waits. One run on one guest; every figure stands beside
//! what it is compared with, taken in the same run, turn by turn: the pause beside a bare one for several numbers of tasks, and
//! that of modules with more to do beside that of a module with one function and little else.
//!
//! With `--against`, only whole `vmpatch apply` processes: this vmpatch and another one, turn by turn.
//!
//! usage: cargo run --release -p e2e --bin bench [CYCLES]
//!        cargo run --release -p e2e --bin bench -- --against PROGRAM [RUNS]

use guest_core::guest::Changed;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use e2e::figures::{Figures, micros, ratio};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::session;
use e2e::vmpatch;
use guest_core::commit::Committed;
use images::build::Cve;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use serde_json::json;

/// The guest's name.
const NAME: &str = "vmbench";
/// Tasks that sleep in the guest, beside its own.
const TASKS: [usize; 3] = [100, 1_000, 5_000];
/// Apply/revert cycles for each number of tasks, unless the command line says otherwise.
const CYCLES_DEFAULT: usize = 200;
/// The same for each kind of module at the most: one of 300 functions takes its time.
const KIND_CYCLES_MAX: usize = 100;
/// Whole `vmpatch` processes for each number of tasks.
const PROCESSES: usize = 11;
/// The same of each of two programs that are compared, unless the command line says otherwise.
const COMPARED_RUNS_DEFAULT: usize = 25;
/// Functions of the big module.
const MANY: usize = 300;
/// For each apply and revert.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Memory for 5,000 tasks' stacks and all else, MiB.
const MEMORY_MIB: u32 = 1024;
/// How long the guest may take to start its tasks.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How often a running process is looked at for its memory.
const SAMPLE: Duration = Duration::from_millis(1);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        [] => measure(CYCLES_DEFAULT),
        ["--against", other] => compare(Path::new(other), COMPARED_RUNS_DEFAULT),
        ["--against", other, runs] => compare(Path::new(other), runs.parse()?),
        [cycles] => measure(cycles.parse()?),
        _ => Err("usage: bench [CYCLES], or bench --against PROGRAM [RUNS]".into()),
    }
}

/// Whole processes of this vmpatch and of another one on one guest, turn by turn.
fn compare(other: &Path, runs: usize) -> Result<()> {
    let kernel = Kernel::CLOUD_6_1;
    let module = Modules::of(&kernel).cve(Cve::Y2026N52928);
    let programs = [other, vmpatch::program()?];
    let guest = Guest::boot(kit::guest(kernel).name(NAME).memory_mib(MEMORY_MIB))?;
    println!(
        "{}, 2 vCPUs, shared RAM; `vmpatch apply`, whole process, {runs} runs each in turn",
        guest.kernel_release()
    );
    println!(
        "  time: µs, p50 / p99 / max; memory at the most: KiB, its own and guest RAM\n  other: {}",
        other.display()
    );
    let mut firsts = None;
    for tasks in TASKS {
        let wanted = tasks.to_string();
        let sleepers = guest.spawn(&["/opt/tasks", &wanted])?;
        sleepers.wait_for_stdout("sleeping", START_LIMIT)?;
        let mut times = [const { Vec::new() }; 2];
        let mut memory = [(0, 0); 2];
        for _ in 0..runs {
            for ((program, times), memory) in programs.iter().zip(&mut times).zip(&mut memory) {
                let whole = whole_process(program, &module)?;
                times.push(whole.us);
                *memory = (memory.0.max(whole.own_kib), memory.1.max(whole.mapped_kib));
            }
        }
        let [other, this] = times.map(Figures::of);
        let [(other_own, other_mapped), (this_own, this_mapped)] = memory;
        let &mut (other_first, this_first) = firsts.get_or_insert((other.p50, this.p50));
        println!("\n{tasks} tasks");
        let row = |name: &str, figures: Figures, first: u64, own: u64, mapped: u64| {
            let growth = ratio(figures.p50, first);
            println!(
                "  {name:<8}{figures}   {growth:.2} × {} tasks; {own} and {mapped} KiB",
                TASKS[0]
            );
        };
        row("other", other, other_first, other_own, other_mapped);
        row("this", this, this_first, this_own, this_mapped);
        println!(
            "  this / other: time {:.2} ×, own memory {:.2} ×, with guest RAM {:.2} ×",
            ratio(this.p50, other.p50),
            ratio(this_own, other_own),
            ratio(this_own + this_mapped, other_own + other_mapped)
        );
        sleepers.kill()?;
        sleepers.wait(START_LIMIT)?;
    }
    Ok(())
}

fn measure(cycles: usize) -> Result<()> {
    let kernel = Kernel::CLOUD_6_1;
    let modules = Modules::of(&kernel);
    let module = modules.cve(Cve::Y2026N52928);
    let program = vmpatch::program()?;
    let guest = Guest::boot(kit::guest(kernel).name(NAME).memory_mib(MEMORY_MIB))?;
    let mut monitor = Monitor::second(&guest);
    let is_kvm = monitor.call("query-kvm", json!({}))?["enabled"].as_bool() == Some(true);
    let (release, accelerator) = (guest.kernel_release(), if is_kvm { "KVM" } else { "TCG" });
    println!("{release}, 2 vCPUs, shared RAM, {accelerator}; {cycles} apply/revert cycles each; µs: p50 / p99 / max");
    let many = modules.many(&never_called(&guest)?);
    let kinds = [
        ("one function", modules.applied(Applied::Pause)),
        ("one with all duties", modules.applied(Applied::Sections)),
        ("300 functions", many),
    ];
    beside_one_function(&guest, &mut monitor, &kinds, cycles.min(KIND_CYCLES_MAX))?;
    for tasks in TASKS {
        let wanted = tasks.to_string();
        let sleepers = guest.spawn(&["/opt/tasks", &wanted])?;
        sleepers.wait_for_stdout("sleeping", START_LIMIT)?;
        println!("\n{tasks} tasks");
        pauses(&guest, &mut monitor, Path::new(&module), cycles)?;
        processes(program, &module)?;
        sleepers.kill()?;
        sleepers.wait(START_LIMIT)?;
    }
    Ok(())
}

/// Cycles in one process that has found the kernel once, each beside a bare stop and cont.
fn pauses(guest: &Guest, monitor: &mut Monitor, module: &Path, cycles: usize) -> Result<()> {
    let options = session::options(TIMEOUT);
    let mut session = session::open(guest)?;
    let bytes = fs::read(module)?;
    let (mut bare, mut warm, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..cycles {
        bare.push(stop_and_cont(monitor)?);
        let start = Instant::now();
        let Changed {
            record,
            committed: applied,
            ..
        } = session.apply(module, &bytes, &options)?;
        warm.push(micros(start.elapsed()));
        let Changed {
            committed: reverted, ..
        } = session.revert(&record.id, &options)?;
        all.extend([applied, reverted]);
    }
    let bare = Figures::of(bare);
    let row = |name: &str, figures: Figures| {
        println!("  {name:<36}{figures}   {:.2} × bare", ratio(figures.p50, bare.p50));
    };
    let pick = |pick: fn(&Committed) -> u64| Figures::of(all.iter().map(pick).collect());
    println!("  {:<36}{bare}", "bare QMP stop + cont");
    row("pause", pick(|c| c.pause_us_max));
    row("  stop", pick(|c| c.pause.stop_us));
    row("  registers", pick(|c| c.pause.registers_us));
    row("  locks and stacks", pick(|c| c.pause.check_us));
    row("  write and read back", pick(|c| c.pause.write_us));
    row("  resume", pick(|c| c.pause.resume_us));
    let tries: u32 = all.iter().map(|committed| committed.tries).sum();
    println!(
        "  {:<36}{:.2}",
        "looks for a safe moment a commit",
        ratio(tries.into(), all.len() as u64)
    );
    println!("  {:<36}{}", "apply, kernel found before (warm)", Figures::of(warm));
    Ok(())
}

/// Functions of the kernel that nobody calls in a guest whose programs are all of 64 bits: its system calls for 32-bit ones.
fn never_called(guest: &Guest) -> Result<Vec<String>> {
    let listed = guest.text(&["grep", "-E", " [tT] __ia32_(compat_)?sys_", "/proc/kallsyms"])?;
    let mut functions = BTreeMap::new();
    for line in listed.lines() {
        let mut words = line.split(' ');
        if let (Some(at), Some(name)) = (words.next(), words.nth(1)) {
            functions.insert(at.to_owned(), name.to_owned());
        }
    }
    let functions: Vec<_> = functions.into_values().take(MANY).collect();
    if functions.len() == MANY {
        return Ok(functions);
    }
    Err(format!(
        "the guest has only {} system calls for 32-bit programs",
        functions.len()
    )
    .into())
}

/// Modules of several kinds, turn by turn in one process; each kind beside the first.
fn beside_one_function(guest: &Guest, monitor: &mut Monitor, kinds: &[(&str, String)], cycles: usize) -> Result<()> {
    let options = session::options(TIMEOUT);
    let mut session = session::open(guest)?;
    let mut bare = Vec::new();
    let mut all: Vec<[Vec<Committed>; 2]> = vec![Default::default(); kinds.len()];
    for _ in 0..cycles {
        bare.push(stop_and_cont(monitor)?);
        for ((_, file), [applied, reverted]) in kinds.iter().zip(&mut all) {
            let Changed {
                record,
                committed: there,
                ..
            } = session.apply(Path::new(file), &fs::read(file)?, &options)?;
            let Changed { committed: back, .. } = session.revert(&record.id, &options)?;
            applied.push(there);
            reverted.push(back);
        }
    }
    let bare = Figures::of(bare);
    println!("\nmodules with more to do\n  {:<36}{bare}", "bare QMP stop + cont");
    let mut first = None;
    for ((name, _), [applied, reverted]) in kinds.iter().zip(all) {
        for (what, commits) in [("apply", applied), ("revert", reverted)] {
            let pick = |pick: fn(&Committed) -> u64| Figures::of(commits.iter().map(pick).collect());
            let figures = pick(|c| c.pause_us_max);
            let (check, write) = (pick(|c| c.pause.check_us).p50, pick(|c| c.pause.write_us).p50);
            let beside: u64 = *first.get_or_insert(figures.p50);
            let (bare, one) = (ratio(figures.p50, bare.p50), ratio(figures.p50, beside));
            println!(
                "  {:<36}{figures}   {bare:.2} × bare, {one:.2} × one; check {check}, write {write}",
                format!("{name}: {what}")
            );
        }
    }
    Ok(())
}

/// How long a guest stands that is stopped and let go again at once.
fn stop_and_cont(monitor: &mut Monitor) -> Result<u64> {
    let start = Instant::now();
    monitor.call("stop", json!({}))?;
    monitor.call("cont", json!({}))?;
    Ok(micros(start.elapsed()))
}

/// Whole processes, as an operator starts them.
fn processes(program: &Path, module: &str) -> Result<()> {
    let (mut cold, mut own_kib, mut mapped_kib) = (Vec::new(), 0, 0);
    for _ in 0..PROCESSES {
        let whole = whole_process(program, module)?;
        cold.push(whole.us);
        own_kib = own_kib.max(whole.own_kib);
        mapped_kib = mapped_kib.max(whole.mapped_kib);
    }
    println!("  {:<36}{}", "vmpatch apply, whole process (cold)", Figures::of(cold));
    println!(
        "  {:<36}{own_kib} KiB, and {mapped_kib} KiB of guest RAM",
        "its memory at the most"
    );
    Ok(())
}

/// A whole `vmpatch apply`, and its memory at the most.
struct Whole {
    us: u64,
    own_kib: u64,
    mapped_kib: u64,
}

/// Applies the module, and reverts it again.
fn whole_process(program: &Path, module: &str) -> Result<Whole> {
    let (mut own_kib, mut mapped_kib) = (0, 0);
    let start = Instant::now();
    let mut child = command(program, &["apply", module]).spawn()?;
    while child.try_wait()?.is_none() {
        let (own, mapped) = resident_kib(child.id());
        own_kib = own_kib.max(own);
        mapped_kib = mapped_kib.max(mapped);
        std::thread::sleep(SAMPLE);
    }
    let us = micros(start.elapsed());
    let reverted = command(program, &["revert", "--all"]).status()?;
    if !child.wait()?.success() || !reverted.success() {
        return Err(format!("{} failed", program.display()).into());
    }
    Ok(Whole {
        us,
        own_kib,
        mapped_kib,
    })
}

fn command(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(["--domain", NAME])
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Resident memory of a process: its own (anonymous and files), and shared, which is the guest's RAM.
fn resident_kib(pid: u32) -> (u64, u64) {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
            .unwrap_or(0)
    };
    (field("RssAnon:") + field("RssFile:"), field("RssShmem:"))
}
