//! A storm on a guest of its own, from the boot to the last check.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use images::build::Cve;
use images::build::hand_written::Applied;
use images::channel::Running;
use images::guest::{Guest, GuestConfig};
use images::kernel::Kernel;

use super::cycles::{Cycle, Cycles, Length, Outcomes};
use super::work::{Rounds, Work};
use super::{Result, Scene, Storm};
use crate::ftrace::Ftrace;
use crate::health;
use crate::kit::{self, Modules};
use crate::probe::Calls;
use crate::report::states;
use crate::vmpatch::Vmpatch;

/// RAM of a guest, MiB.
const MEMORY_MIB: u32 = 384;
/// What `load` checks again and again, MiB.
const LOAD_MIB: &str = "4";
/// Tasks that do nothing but call the patched functions.
const CALLERS: &str = "1";
/// Bytes of the disk: as many as `load` writes.
const DISK: &str = "4M";
/// How long a program of the guest may take to start, and to end.
const PROGRAM_LIMIT: Duration = Duration::from_secs(120);
/// Commands of the guest that must not be what the kernel ends when memory runs out: all that the agent starts.
const PROTECT: &str = "echo -1000 >/proc/$PPID/oom_score_adj";

/// What a storm is run with.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The guest's kernel.
    pub kernel: Kernel,
    /// Its vCPUs.
    pub vcpus: u32,
    /// How long it lasts.
    pub length: Length,
    /// What a cycle is made of.
    pub cycle: Cycle,
    /// How long one apply or revert is tried.
    pub timeout: Duration,
    /// Where the console of a guest is kept that was not healthy.
    pub logs: PathBuf,
}

/// What came of a storm.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its name.
    pub storm: &'static str,
    /// The guest's kernel, by its short name.
    pub kernel: String,
    /// The guest's vCPUs.
    pub vcpus: u32,
    /// How long it lasted.
    pub took: Duration,
    /// What vmpatch came to.
    pub outcomes: Outcomes,
    /// The calls of the patched functions.
    pub calls: Calls,
    /// What the guest did meanwhile.
    pub work: Vec<(String, Rounds)>,
    /// All that was not as it must be, in words.
    pub wrong: Vec<String>,
}

impl Report {
    /// True where nothing was wrong, and the storm did take place.
    pub fn is_clean(&self) -> bool {
        self.wrong.is_empty()
    }
}

/// Runs a storm on a guest that is booted for it. `progress` is told after each cycle.
///
/// # Errors
///
/// If it could not even begin; all else is in the report.
pub fn run(storm: &dyn Storm, plan: &Plan, progress: &mut dyn FnMut(&Outcomes)) -> Result<Report> {
    let modules = Modules::of(&plan.kernel);
    let disk = Disk::new()?;
    let config = kit::guest(plan.kernel.clone()).vcpus(plan.vcpus).memory_mib(MEMORY_MIB);
    // With QEMU's HPET as clock, which sysinfo() asks, all vCPUs would nearly always stand in that one access.
    let config = config.append("tsc=reliable clocksource=tsc");
    let guest = Guest::boot(storm.fit(disk.fit(config), &modules))?;
    let scene = Scene {
        guest: &guest,
        modules: &modules,
    };
    let mut report = Report {
        storm: storm.name(),
        kernel: plan.kernel.label().to_owned(),
        vcpus: plan.vcpus,
        took: Duration::ZERO,
        outcomes: Outcomes::default(),
        calls: Calls::default(),
        work: Vec::new(),
        wrong: Vec::new(),
    };
    if let Err(error) = weather(storm, &scene, plan, progress, &mut report) {
        report.wrong.push(error.to_string());
    }
    check_guest(&scene, &mut report);
    if !report.is_clean() {
        report
            .wrong
            .push(format!("console: {}", keep_console(&scene, plan, &report)?.display()));
    }
    Ok(report)
}

/// The storm itself, with what checks the guest beside it.
fn weather(
    storm: &dyn Storm,
    scene: &Scene<'_>,
    plan: &Plan,
    progress: &mut dyn FnMut(&Outcomes),
    report: &mut Report,
) -> Result<()> {
    scene.guest.text(&["sh", "-c", PROTECT])?;
    let start_program = |args: &[&str]| -> Result<Running> {
        let running = scene.guest.spawn(args)?;
        running.wait_for_stdout("started", PROGRAM_LIMIT)?;
        Ok(running)
    };
    let callers = start_program(&["/opt/pair", "load", "0", CALLERS])?;
    let load = start_program(&["/opt/load", LOAD_MIB, "/dev/vda", "0"])?;
    let work = storm.start(scene)?;
    let patches = patches(&plan.kernel, scene.modules);
    let cycles = Cycles::new(storm, *scene, &patches, plan.cycle, plan.timeout)?;
    let start = Instant::now();
    report.outcomes = cycles.run(plan.length, progress);
    report.took = start.elapsed();
    let failures = report.outcomes.failures.iter();
    report
        .wrong
        .extend(failures.map(|failure| format!("vmpatch: {failure}")));
    for work in work {
        let name = work.name().to_owned();
        match end_work(work, scene) {
            Ok(rounds) => report.work.push((name, rounds)),
            Err(error) => report.wrong.push(error.to_string()),
        }
    }
    report.calls = Calls::of(&end_program(scene, &callers)?).ok_or("pair does not say what it counted")?;
    let calls = report.calls;
    if calls.mixed != 0 || calls.lost != 0 || calls.old == 0 || (report.outcomes.applied > 0 && calls.new == 0) {
        report.wrong.push(format!("calls of the patched functions: {calls:?}"));
    }
    end_program(scene, &load)?;
    Ok(())
}

fn end_work(work: Work, scene: &Scene<'_>) -> Result<Rounds> {
    let name = work.name().to_owned();
    let rounds = work.end(scene)?;
    if rounds.wrong != 0 || rounds.rounds == 0 {
        return Err(format!("{name}: {rounds:?}").into());
    }
    Ok(rounds)
}

/// Ends a program by SIGTERM; one that found anything wrong is an error.
fn end_program(scene: &Scene<'_>, running: &Running) -> Result<String> {
    scene.guest.text(&["kill", "-TERM", &running.pid().to_string()])?;
    let output = running.wait(PROGRAM_LIMIT)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        Ok(text)
    } else {
        Err(format!("{}: {text}", output.status).into())
    }
}

/// What a storm applies, turn by turn: two functions that change together, a module with work for every part of the loader, and
/// a branch on a static key of the kernel. The pair comes twice, for it is what is counted.
fn patches(kernel: &Kernel, modules: &Modules) -> Vec<String> {
    let own = [Applied::Pair, Applied::Sections, Applied::Pair, Applied::StaticKeyToo];
    let own = own.map(|module| modules.applied(module));
    let fixes = Cve::ALL
        .into_iter()
        .filter(|cve| cve.concerns(kernel.package().trim_start_matches("linux-image-")));
    own.into_iter().chain(fixes.map(|cve| modules.cve(cve))).collect()
}

/// Whether the guest is as it was before: no patch, ftrace at work, no complaint.
fn check_guest(scene: &Scene<'_>, report: &mut Report) {
    let status = Vmpatch::on(scene.guest).run(&["status", "--json"]);
    let patches: serde_json::Value = serde_json::from_str(&status.stdout).unwrap_or_default();
    // The module with work for every part of the loader hands out addresses of its own, so its code is kept.
    let is_reverted = states(&patches)
        .iter()
        .all(|(_, state, _)| *state == "reverted, code kept");
    if status.code != Some(0) || !is_reverted {
        report.wrong.push(format!("a patch is left: {status}"));
    }
    let console = scene.guest.console().unwrap_or_default();
    let complaints: Vec<String> = health::complaints(&console).into_iter().map(str::to_owned).collect();
    if complaints.is_empty() && scene.guest.is_running() {
        let tracing = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| Ftrace::of(scene.guest).assert_alive()));
        if tracing.is_err() {
            report.wrong.push("ftrace does not see a function any more".to_owned());
        }
    }
    report.wrong.extend(complaints);
}

fn keep_console(scene: &Scene<'_>, plan: &Plan, report: &Report) -> Result<PathBuf> {
    fs::create_dir_all(&plan.logs)?;
    let name = format!(
        "{}-{}-{}-{}.log",
        report.storm,
        report.kernel,
        report.vcpus,
        std::process::id()
    );
    let path = plan.logs.join(name);
    let text = format!("{}\nQEMU: {}\n", scene.guest.console()?, scene.guest.qemu_log()?);
    fs::write(&path, text)?;
    Ok(path)
}

/// An image of a disk, gone when it is dropped.
struct Disk(PathBuf);

impl Disk {
    fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vmpatch-storm-{}-{number}.qcow2", std::process::id());
        let path = std::env::temp_dir().join(name);
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&path)
            .arg(DISK)
            .output()?;
        if made.status.success() {
            Ok(Self(path))
        } else {
            Err(format!("qemu-img: {made:?}").into())
        }
    }

    fn fit(&self, config: GuestConfig) -> GuestConfig {
        let path: &Path = &self.0;
        config
            .module("virtio_blk")
            .qemu_arg("-drive")
            .qemu_arg(&format!("file={},if=none,id=disk0,format=qcow2", path.display()))
            .qemu_arg("-device")
            .qemu_arg("virtio-blk-pci,drive=disk0,id=block0")
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}
