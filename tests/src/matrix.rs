//! What is shown on a guest of every kind: one list of checks for the tests, which fail with the first that does not hold, and for
//! the support matrix, which says of each whether it does.

use std::fmt;
use std::time::Duration;

use images::build::Cve;
use images::build::hand_written::Applied;
use images::guest::{Guest, GuestConfig, Ram};
use images::kernel::Kernel;

use crate::bed;
use crate::ftrace::Ftrace;
use crate::kit::{self, Modules};
use crate::monitor::Monitor;
use crate::probe::{Seen, see};
use crate::vmpatch::Vmpatch;

/// What all vCPUs do.
const IN_USER_MODE: &str = "while :; do :; done";
/// The zero device fills the buffer, so nearly all of it is one copy in the kernel after another.
const IN_THE_KERNEL: &str = "exec dd if=/dev/zero of=/dev/null bs=1M";
/// The function that the module `faults` brings along.
const NEW_FUNCTION: &str = "livepatch_sysinfo";
/// Under load the default of the command line may be short: each vCPU shares the host's processors with vmpatch.
const TIMEOUT_SECONDS: &str = "30";

/// Page-table isolation, which a kernel must be told on the emulated CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pti {
    /// `pti=on`.
    On,
    /// `pti=off`.
    Off,
}

/// Levels of page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// `no5lvl`.
    Four,
    /// What the emulated CPU can, where the kernel can, too.
    Five,
}

/// A kind of guest.
#[derive(Clone, Debug)]
pub struct Setting {
    /// Its kernel.
    pub kernel: Kernel,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Its page-table isolation.
    pub pti: Pti,
    /// Its page tables.
    pub levels: Levels,
    /// Where QEMU keeps its RAM.
    pub ram: Ram,
}

impl Setting {
    /// Names of the checks for which there is nothing to do: fixes are published for the kernels of 6.1 alone.
    fn without(&self) -> &'static [&'static str] {
        let has_fixes = [Kernel::CLOUD_6_1, Kernel::GENERIC_6_1, Kernel::RT_6_1].contains(&self.kernel);
        if has_fixes { &[] } else { &[PUBLISHED_FIXES] }
    }

    /// The guest to boot.
    pub fn config(&self) -> GuestConfig {
        let config = kit::guest(self.kernel.clone()).vcpus(self.vcpus).ram(self.ram);
        let config = config.append(if self.pti == Pti::On { "pti=on" } else { "pti=off" });
        match self.levels {
            Levels::Four => config.append("no5lvl"),
            Levels::Five => config,
        }
    }
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let vcpus = if self.vcpus == 1 { "vCPU" } else { "vCPUs" };
        let pti = if self.pti == Pti::On { "PTI" } else { "no PTI" };
        let levels = if self.levels == Levels::Four { 4 } else { 5 };
        let ram = if self.ram == Ram::Private { "private" } else { "shared" };
        write!(f, "{} {vcpus}, {pti}, {levels} levels, {ram} RAM", self.vcpus)
    }
}

/// A running guest with the modules for its kernel.
pub struct Stage<'a> {
    /// What it was to be.
    pub setting: &'a Setting,
    /// The guest.
    pub guest: &'a Guest,
    /// The modules.
    pub modules: &'a Modules,
}

/// What a check comes to where it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was made, and holds.
    Holds,
    /// There is nothing to be checked on this kernel.
    Nothing,
}

/// Something to be shown on a guest. It panics where that can't be shown.
#[derive(Clone, Copy)]
pub struct Check {
    /// What is shown, in a few words.
    pub name: &'static str,
    /// Shows it.
    pub run: fn(&Stage<'_>) -> Outcome,
}

/// The check that is made on kernels with published fixes only.
const PUBLISHED_FIXES: &str = "published fixes";

/// All checks. Each leaves the guest as it was.
pub const CHECKS: [Check; 10] = [
    check("find, inspect", is_the_guest_that_was_asked_for),
    check("in the ftrace site", |stage| changes(stage, Applied::Sections)),
    check("behind it", |stage| changes(stage, Applied::Kstrtoint)),
    check("static call", |stage| changes(stage, Applied::StaticCall)),
    check("symbols not exported", resolves_symbols),
    check("two functions at once", |stage| changes(stage, Applied::Pair)),
    check("known to the guest", is_known_to_the_guest),
    check(PUBLISHED_FIXES, fixes_published_flaws),
    check("busy", is_patched_while_busy),
    check("paused", stays_paused),
];

const fn check(name: &'static str, run: fn(&Stage<'_>) -> Outcome) -> Check {
    Check { name, run }
}

/// Boots such a guest and makes all checks on it.
///
/// # Panics
///
/// If one does not hold, or had nothing to do on a kernel where it has, or the guest is not healthy afterwards.
pub fn demand(setting: &Setting) {
    let modules = Modules::of(&setting.kernel);
    let guest = bed::lend(setting.config());
    let stage = Stage {
        setting,
        guest: &guest,
        modules: &modules,
    };
    let outcomes = CHECKS.map(|check| (check.name, (check.run)(&stage)));
    guest.discard();
    let nothing: Vec<_> = outcomes
        .iter()
        .filter(|(_, outcome)| *outcome == Outcome::Nothing)
        .collect();
    let nothing: Vec<_> = nothing.into_iter().map(|(name, _)| *name).collect();
    assert_eq!(nothing, setting.without(), "checks that had nothing to do");
}

fn is_the_guest_that_was_asked_for(stage: &Stage<'_>) -> Outcome {
    let found = Vmpatch::on(stage.guest).inspect();
    let vcpus = found.get("vcpus").and_then(serde_json::Value::as_u64);
    assert_eq!(vcpus, Some(stage.setting.vcpus.into()));
    let flags = stage.guest.text(&["grep", "-m1", "^flags", "/proc/cpuinfo"]);
    let flags = flags.expect("the guest runs a program");
    let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
    // Not every kernel that is told so can have five levels; the flag says whether this one has.
    let levels = if has("la57") && stage.setting.levels == Levels::Five {
        5
    } else {
        4
    };
    let found_levels = found.get("page_table_levels").and_then(serde_json::Value::as_u64);
    assert_eq!(found_levels, Some(levels));
    assert_eq!(has("pti"), stage.setting.pti == Pti::On, "{flags}");
    let words = stage.guest.text(&["cat", "/proc/cmdline"]);
    assert!(!words.expect("the guest runs a program").contains("nokaslr"));
    Outcome::Holds
}

fn changes(stage: &Stage<'_>, module: Applied) -> Outcome {
    changes_and_changes_back(stage, module.program(), &stage.modules.applied(module))
}

fn changes_and_changes_back(stage: &Stage<'_>, program: &str, module: &str) -> Outcome {
    let vmpatch = Vmpatch::on(stage.guest);
    assert_eq!(see(stage.guest, program), Seen::Flawed);
    vmpatch.run(&["apply", "--timeout", TIMEOUT_SECONDS, module]).expect(0);
    assert_eq!(see(stage.guest, program), Seen::Fixed);
    vmpatch
        .run(&["revert", "--all", "--timeout", TIMEOUT_SECONDS])
        .expect(0);
    assert_eq!(see(stage.guest, program), Seen::Flawed);
    Outcome::Holds
}

/// The program compares with /proc/kallsyms, which tells addresses to root alone.
fn resolves_symbols(stage: &Stage<'_>) -> Outcome {
    let vmpatch = Vmpatch::on(stage.guest);
    vmpatch.apply(&stage.modules.applied(Applied::Symbols));
    let compared = stage.guest.run(&["/opt/symbols"]).expect("the guest runs a program");
    assert!(
        compared.status.success(),
        "{}",
        String::from_utf8_lossy(&compared.stdout)
    );
    vmpatch.revert_all();
    Outcome::Holds
}

/// Listed as a module, and faults of its code on a user's address are fixed up: the guest has found the module, and its table of
/// exceptions, by the code's address. Its new function is traced.
fn is_known_to_the_guest(stage: &Stage<'_>) -> Outcome {
    let (program, vmpatch) = (Applied::Faults.program(), Vmpatch::on(stage.guest));
    assert_eq!(see(stage.guest, program), Seen::Flawed);
    vmpatch.apply(&stage.modules.applied(Applied::Faults));
    let listed = stage.guest.text(&["cat", "/proc/modules"]);
    let listed = listed.expect("the guest runs a program");
    assert!(
        listed.starts_with("test_faults "),
        "not the first of the modules: {listed}"
    );
    assert_eq!(see(stage.guest, program), Seen::Fixed);
    let tracing = Ftrace::of(stage.guest);
    tracing.set("set_ftrace_filter", NEW_FUNCTION);
    tracing.start("function");
    assert_eq!(see(stage.guest, program), Seen::Fixed);
    let trace = tracing.trace();
    assert!(trace.contains(NEW_FUNCTION), "{trace}");
    tracing.reset();
    vmpatch.revert_all();
    tracing.assert_alive();
    assert_eq!(see(stage.guest, program), Seen::Flawed);
    Outcome::Holds
}

fn fixes_published_flaws(stage: &Stage<'_>) -> Outcome {
    let concerns = |cve: &Cve| cve.concerns(stage.guest.kernel_release());
    let mut outcome = Outcome::Nothing;
    for cve in Cve::ALL.into_iter().filter(concerns) {
        outcome = changes_and_changes_back(stage, cve.program(), &stage.modules.cve(cve));
    }
    outcome
}

fn is_patched_while_busy(stage: &Stage<'_>) -> Outcome {
    for work in [IN_USER_MODE, IN_THE_KERNEL] {
        let busy: Vec<_> = (0..stage.setting.vcpus)
            .map(|_| {
                stage
                    .guest
                    .spawn(&["sh", "-c", work])
                    .expect("the guest starts a program")
            })
            .collect();
        changes(stage, Applied::Sections);
        for task in &busy {
            let status = task.status().expect("the guest can be asked");
            assert_eq!(status, None, "{work:?} has ended by itself");
            task.kill().expect("it can be ended");
        }
    }
    Outcome::Holds
}

/// How often a guest is stopped until it does not hold a lock just then.
const PAUSES_MAX: usize = 8;

fn stays_paused(stage: &Stage<'_>) -> Outcome {
    let (program, module) = (Applied::Sections.program(), stage.modules.applied(Applied::Sections));
    let vmpatch = Vmpatch::on(stage.guest);
    let mut monitor = Monitor::second(stage.guest);
    let mut while_paused = |args: &[&str], seen| {
        for tries in 1.. {
            monitor.stop();
            let answer = vmpatch.run(args);
            std::thread::sleep(Duration::from_millis(50));
            assert_eq!(monitor.run_state(), "paused");
            monitor.cont();
            // A guest that was paused while it held a lock, or in its entry code, stays there.
            let reasons = ["_lock", "_mutex", "entry code"];
            let is_stuck = answer.code != Some(0) && reasons.iter().any(|reason| answer.stderr.contains(reason));
            if !is_stuck || tries == PAUSES_MAX {
                answer.expect(0);
                break;
            }
        }
        assert_eq!(see(stage.guest, program), seen);
    };
    while_paused(&["apply", &module], Seen::Fixed);
    while_paused(&["revert", "--all"], Seen::Flawed);
    Outcome::Holds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_said_in_a_line() {
        let setting = Setting {
            kernel: Kernel::CLOUD_6_1,
            vcpus: 1,
            pti: Pti::On,
            levels: Levels::Four,
            ram: Ram::Private,
        };
        assert_eq!(setting.to_string(), "1 vCPU, PTI, 4 levels, private RAM");
        assert_eq!(setting.config().append, ["pti=on", "no5lvl"]);
    }
}
