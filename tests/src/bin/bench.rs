//! The benchmark: how long a guest is paused, and how long an operator waits. One run on one guest; every figure is beside
//! what it is compared with, taken in the same run, turn by turn: the pause beside a bare one for several numbers of tasks, and
//! that of modules with more to do beside that of a module with one function and little else.
//!
//! With `--against`, this vmpatch and another one, turn by turn, by their command lines alone: the pause beside a bare one, whole `vmpatch apply`
//! processes (cold), and what a further module takes in a process that has found the kernel (warm).
//!
//! usage: cargo run --release -p e2e --bin bench [CYCLES]
//!        cargo run --release -p e2e --bin bench -- --against PROGRAM [RUNS]

use guest_core::guest::Changed;
use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
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
use serde_json::{Value, json};

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
/// Modules of the bare command, of which the first one bears the cost of finding the kernel.
const WARM_MODULES: usize = 9;
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

/// A program that is compared, and what was measured of it.
struct Compared<'p> {
    name: &'static str,
    program: &'p Path,
    folders: &'p [Folder; 2],
    pauses: Vec<u64>,
    /// `apply` of one module.
    cold: Vec<u64>,
    /// The bare command, with one module and with several.
    bare: [Vec<u64>; 2],
    own_kib: u64,
    mapped_kib: u64,
}

/// A patch directory, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn of(modules: &[String]) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("vmpatch-bench-{}-{}", std::process::id(), modules.len()));
        fs::create_dir_all(&path)?;
        for (number, module) in modules.iter().enumerate() {
            fs::copy(module, path.join(format!("{number}.ko")))?;
        }
        Ok(Self(path))
    }

    fn path(&self) -> Result<&str> {
        Ok(self.0.to_str().ok_or("the temporary folder's name is not UTF-8")?)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Compared<'_> {
    /// A whole `apply`, then the bare command with one module and with several; each is reverted again.
    fn round(&mut self, module: &str) -> Result<()> {
        let whole = self.run(&["apply", module])?;
        self.cold.push(whole.us);
        self.own_kib = self.own_kib.max(whole.own_kib);
        self.mapped_kib = self.mapped_kib.max(whole.mapped_kib);
        for (index, folder) in self.folders.iter().enumerate() {
            let whole = self.run(&["--patches", folder.path()?])?;
            self.bare[index].push(whole.us);
        }
        Ok(())
    }

    fn run(&mut self, args: &[&str]) -> Result<Whole> {
        let (whole, pauses) = whole_process(self.program, args)?;
        self.pauses.extend(pauses);
        Ok(whole)
    }

    /// What a further module takes in a process that has found the kernel, by the medians.
    fn warm(&self) -> u64 {
        let [one, several] = [0, 1].map(|index| Figures::of(self.bare[index].clone()).p50);
        several.saturating_sub(one) / (WARM_MODULES as u64 - 1)
    }
}

/// This vmpatch and another one on one guest, turn by turn.
fn compare(other: &Path, runs: usize) -> Result<()> {
    let kernel = Kernel::CLOUD_6_1;
    let modules = Modules::of(&kernel);
    let module = modules.cve(Cve::Y2026N52928);
    let this = vmpatch::program()?;
    let guest = Guest::boot(kit::guest(kernel).name(NAME).memory_mib(MEMORY_MIB))?;
    let mut monitor = Monitor::second(&guest);
    let several = modules.one_each(&never_called(&guest)?[..WARM_MODULES]);
    let folders = [Folder::of(&several[..1])?, Folder::of(&several)?];
    println!("{}, 2 vCPUs, shared RAM, {runs} rounds", guest.kernel_release());
    println!(
        "  time: µs, p50 / p99 / max; memory at the most: KiB, its own and guest RAM\n  other: {}",
        other.display()
    );
    let mut firsts = None;
    for tasks in TASKS {
        let wanted = tasks.to_string();
        let sleepers = guest.spawn(&["/opt/tasks", &wanted])?;
        sleepers.wait_for_stdout("sleeping", START_LIMIT)?;
        let mut bare = Vec::new();
        let mut both = [("other", other), ("this", this)].map(|(name, program)| Compared {
            name,
            program,
            folders: &folders,
            pauses: Vec::new(),
            cold: Vec::new(),
            bare: Default::default(),
            own_kib: 0,
            mapped_kib: 0,
        });
        for _ in 0..runs {
            bare.push(stop_and_cont(&mut monitor)?);
            for compared in &mut both {
                compared.round(&module)?;
            }
        }
        println!("\n{tasks} tasks");
        tell(&both, Figures::of(bare), &mut firsts);
        sleepers.kill()?;
        sleepers.wait(START_LIMIT)?;
    }
    Ok(())
}

/// Prints what was measured of both, and the ratios. `firsts` is the time of a whole `apply` of each with the fewest tasks.
fn tell(both: &[Compared<'_>; 2], bare: Figures, firsts: &mut Option<[u64; 2]>) {
    let cold = both.each_ref().map(|compared| Figures::of(compared.cold.clone()));
    let pause = both.each_ref().map(|compared| Figures::of(compared.pauses.clone()));
    let firsts = firsts.get_or_insert(cold.map(|figures| figures.p50));
    println!("  {:<28}{bare}", "bare QMP stop + cont");
    for (compared, pause) in both.iter().zip(pause) {
        let beside = ratio(pause.p50, bare.p50);
        println!(
            "  {:<28}{pause}   {beside:.2} × bare",
            format!("pause: {}", compared.name)
        );
    }
    for ((compared, cold), first) in both.iter().zip(cold).zip(*firsts) {
        let growth = ratio(cold.p50, first);
        let (own, mapped) = (compared.own_kib, compared.mapped_kib);
        println!(
            "  {:<28}{cold}   {growth:.2} × {} tasks; {own} and {mapped} KiB",
            format!("whole apply (cold): {}", compared.name),
            TASKS[0]
        );
    }
    for compared in both {
        println!(
            "  {:<28}{:>7}",
            format!("a further module (warm): {}", compared.name),
            compared.warm()
        );
    }
    let [other, this] = both;
    println!(
        "  this / other: pause {:.2} ×, cold {:.2} ×, warm {:.2} ×, own memory {:.2} ×, with guest RAM {:.2} ×",
        ratio(pause[1].p50, pause[0].p50),
        ratio(cold[1].p50, cold[0].p50),
        ratio(this.warm(), other.warm()),
        ratio(this.own_kib, other.own_kib),
        ratio(this.own_kib + this.mapped_kib, other.own_kib + other.mapped_kib)
    );
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

/// How long a guest is paused that is stopped and resumed at once.
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
        let (whole, _) = whole_process(program, &["apply", module])?;
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

/// Runs vmpatch, and reverts what it has applied. Gives the lengths of the pauses of both, too.
fn whole_process(program: &Path, args: &[&str]) -> Result<(Whole, Vec<u64>)> {
    let (mut own_kib, mut mapped_kib) = (0, 0);
    let start = Instant::now();
    // The report is shorter than what a pipe holds.
    let mut child = command(program, args).spawn()?;
    while child.try_wait()?.is_none() {
        let (own, mapped) = resident_kib(child.id());
        own_kib = own_kib.max(own);
        mapped_kib = mapped_kib.max(mapped);
        std::thread::sleep(SAMPLE);
    }
    let us = micros(start.elapsed());
    let applied = child.wait_with_output()?;
    let reverted = command(program, &["revert", "--all"]).output()?;
    if !applied.status.success() || !reverted.status.success() {
        let said = String::from_utf8_lossy(&applied.stdout);
        return Err(format!("{} {args:?} failed: {said}", program.display()).into());
    }
    let whole = Whole {
        us,
        own_kib,
        mapped_kib,
    };
    Ok((
        whole,
        [pauses_of(&applied.stdout)?, pauses_of(&reverted.stdout)?].concat(),
    ))
}

/// The lengths of the pauses that a report in JSON tells of.
fn pauses_of(report: &[u8]) -> Result<Vec<u64>> {
    let report: Value = serde_json::from_slice(report)?;
    let patches = report["patches"].as_array().ok_or("a report without patches")?;
    let pause = |patch: &Value| patch["pause"]["pause_us_max"].as_u64();
    Ok(patches.iter().filter_map(pause).collect())
}

fn command(program: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(["--json", "--domain", NAME])
        .args(args)
        .stdout(Stdio::piped())
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
