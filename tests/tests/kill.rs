//! vmpatch killed at any instant: the guest runs on, wholly old or wholly new, and the next command works.
//!
//! The module has two functions that see whether the other one is of their own age, so that a half patch shows.

use std::path::Path;
use std::process::Child;
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use e2e::bed::{self, Lent, assert_healthy};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::processes;
use e2e::ram::{KernelPlace, Ram};
use e2e::report::states;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::Applied;
use images::kernel::Kernel;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

static MODULE: LazyLock<String> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair));

/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";
/// Kills spread evenly over the time of one command.
const SPREAD: u32 = 18;
/// Kills within the pause of one command: after the guest has stopped, in microseconds.
const IN_PAUSE_US: [u64; 7] = [0, 50, 100, 200, 400, 800, 1600];
/// How long a pause is waited for: longer than a command takes on a busy host.
const PAUSE_LIMIT: Duration = Duration::from_secs(20);
fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// What is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Apply,
    Revert,
}

impl Command {
    fn args(self) -> [&'static str; 2] {
        match self {
            Self::Apply => ["apply", MODULE.as_str()],
            Self::Revert => ["revert", "--all"],
        }
    }

    /// What the guest shows once it is done.
    fn aim(self) -> Seen {
        match self {
            Self::Apply => Seen::Fixed,
            Self::Revert => Seen::Flawed,
        }
    }
}

/// When it is cut off.
#[derive(Clone, Copy, Debug)]
enum When {
    /// So long after its start.
    After(Duration),
    /// So long after it has stopped the guest.
    InPause(Duration),
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Worker,
    /// As Ctrl-C on a terminal does it.
    ForegroundGroup,
    Supervisor,
    /// All, by SIGTERM, as a service manager does it.
    Service,
    Both,
}

/// A guest and what is used beside it.
struct Stage {
    guest: Lent,
    vmpatch: Vmpatch,
    monitor: Monitor,
}

impl Stage {
    fn new() -> Self {
        let guest = guest();
        Self {
            vmpatch: Vmpatch::on(&guest),
            monitor: Monitor::second(&guest),
            guest,
        }
    }

    /// How long the command takes if nobody kills it; the guest is as before.
    fn measure(&mut self, command: Command) -> Duration {
        if command == Command::Revert {
            self.vmpatch.run(&Command::Apply.args()).expect(0);
        }
        let took = self.vmpatch.run(&command.args()).expect(0).took;
        if command == Command::Apply {
            self.vmpatch.run(&Command::Revert.args()).expect(0);
        }
        took
    }

    /// Runs the command and kills it; returns when nothing of it is left.
    fn cut(&mut self, command: Command, when: When, victim: Victim) -> Answer {
        self.monitor.forget_events();
        let start = Instant::now();
        let child = self.vmpatch.start(&command.args());
        match when {
            When::After(delay) => sleep(delay.saturating_sub(start.elapsed())),
            When::InPause(delay) => {
                assert!(
                    self.monitor.wait_for_event("STOP", PAUSE_LIMIT),
                    "{command:?} pauses the guest"
                );
                spin(delay);
            }
        }
        kill(&child, &self.guest.qmp_path(), victim);
        // The supervisor has the same standard error, so this waits for its end, too.
        self.vmpatch.finish(&command.args(), child)
    }

    /// What the guest is like now: it runs, is wholly old or wholly new, and vmpatch sees the same.
    fn look(&mut self, context: &str) -> Seen {
        assert_eq!(self.monitor.run_state(), "running", "{context}");
        let seen = see(&self.guest, PROGRAM);
        let status = self.vmpatch.status();
        match &states(&status)[..] {
            [] => assert_eq!(seen, Seen::Flawed, "{context}: {status}"),
            [(_, "applied", functions)] => {
                assert_eq!(functions[..], ["patched"; 2], "{context}: {status}");
                assert_eq!(seen, Seen::Fixed, "{context}: {status}");
            }
            [(_, "being laid" | "reverted", functions)] => {
                assert!(
                    functions.iter().all(|function| *function == "original"),
                    "{context}: {status}"
                );
                assert_eq!(seen, Seen::Flawed, "{context}: {status}");
            }
            _ => panic!("{context}: {status}"),
        }
        seen
    }

    /// Kills an apply, looks, has the next command work, then the same with a revert. The guest is as before.
    fn cut_both_ways(&mut self, when: [When; 2], victim: Victim) -> [Answer; 2] {
        [(Command::Apply, when[0]), (Command::Revert, when[1])].map(|(command, when)| {
            let answer = self.cut(command, when, victim);
            let context = format!("{command:?} {when:?} {victim:?}: {answer}");
            let seen = self.look(&context);
            if let Some(code) = answer.code {
                let expected = if code == 0 { command.aim() } else { other(command.aim()) };
                assert_eq!(seen, expected, "{context}");
            }
            if seen != command.aim() {
                self.vmpatch.run(&command.args()).expect(0);
                assert_eq!(self.look(&context), command.aim(), "{context}: once more");
            }
            answer
        })
    }
}

fn other(seen: Seen) -> Seen {
    match seen {
        Seen::Fixed => Seen::Flawed,
        Seen::Flawed => Seen::Fixed,
    }
}

/// Waits more exactly than the scheduler's sleep does.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

fn kill(worker: &Child, socket: &Path, victim: Victim) {
    let supervisor = || processes::with_arguments(&["supervise", &socket.display().to_string()]);
    match victim {
        Victim::Worker => processes::kill(worker.id(), Signal::SIGKILL),
        Victim::ForegroundGroup => processes::kill_group(worker.id(), Signal::SIGINT),
        Victim::Supervisor => supervisor()
            .into_iter()
            .for_each(|pid| processes::kill(pid, Signal::SIGKILL)),
        Victim::Service => {
            let all = [vec![worker.id()], supervisor()].concat();
            all.into_iter().for_each(|pid| processes::kill(pid, Signal::SIGTERM));
        }
        Victim::Both => {
            // The worker first: it must not see the supervisor's end.
            let supervisor = supervisor();
            processes::kill(worker.id(), Signal::SIGKILL);
            supervisor
                .into_iter()
                .for_each(|pid| processes::kill(pid, Signal::SIGKILL));
        }
    }
}

/// What vmpatch must leave as it was in the guest: text and read-only data, page tables, ftrace records.
type Traces = (Vec<u8>, std::collections::BTreeMap<u64, Vec<u64>>, Vec<u8>);

impl Stage {
    fn traces(&mut self, place: &KernelPlace) -> Traces {
        self.monitor.stop();
        let ram = Ram::save(&self.guest, &mut self.monitor).expect("QEMU saves the guest's memory");
        self.monitor.cont();
        (place.image(&ram), place.page_tables(&ram), place.ftrace_records(&ram))
    }

    /// Does all that is given; afterwards there is no trace of it, in the guest, in QEMU, and on the host.
    fn without_a_trace(mut self, work: impl FnOnce(&mut Self)) {
        assert_eq!(see(&self.guest, PROGRAM), Seen::Flawed);
        let place = KernelPlace::of(&self.guest, &self.vmpatch.inspect());
        let before = self.traces(&place);
        work(&mut self);
        self.vmpatch.revert_all();
        assert_eq!(self.look("at the end"), Seen::Flawed);
        assert_eq!(self.vmpatch.inspect()["registry"], Value::Null);
        let after = self.traces(&place);
        assert!(
            before.0 == after.0,
            "the kernel's text and read-only data are as before"
        );
        assert!(before.1 == after.1, "its page tables are as before");
        assert!(before.2 == after.2, "its ftrace records are as before");
        let devices = self
            .monitor
            .call("query-chardev", json!({}))
            .expect("QEMU lists its devices");
        assert!(!devices.to_string().contains("vmpatch-gdb"), "{devices}");
        let socket = self.guest.qmp_path().display().to_string();
        assert_eq!(processes::with_arguments(&["supervise", &socket]), [0; 0]);
        assert_healthy(&self.guest);
    }
}

/// Instants that are spread evenly over both commands, and those in their pauses.
fn instants(times: [Duration; 2], spread: u32, in_pause_us: &[u64]) -> Vec<[When; 2]> {
    let even = (0..spread).map(|step| times.map(|time| When::After(time * step / spread)));
    let paused = in_pause_us
        .iter()
        .map(|us| [When::InPause(Duration::from_micros(*us)); 2]);
    even.chain(paused).collect()
}

/// Kills at all these instants, and gives how many commands did not end by themselves.
fn kill_at(stage: &mut Stage, instants: &[[When; 2]], victim: Victim) -> usize {
    let mut killed = 0;
    for when in instants {
        let answers = stage.cut_both_ways(*when, victim);
        killed += answers.iter().filter(|answer| answer.code.is_none()).count();
    }
    killed
}

#[test]
fn a_vmpatch_killed_at_any_of_fifty_instants_leaves_the_guest_running_and_wholly_old_or_wholly_new() {
    Stage::new().without_a_trace(|stage| {
        let times = [Command::Apply, Command::Revert].map(|command| stage.measure(command));
        let instants = instants(times, SPREAD, &IN_PAUSE_US);
        assert_eq!(2 * instants.len(), 50);
        let killed = kill_at(stage, &instants, Victim::Worker);
        println!("apply and revert take {times:?}; {killed} of 50 were killed before their end");
        assert!(killed >= 25, "most kills must hit: {killed}");
    });
}

#[test]
fn ctrl_c_reaches_the_supervisor_as_little_as_it_harms_the_guest() {
    Stage::new().without_a_trace(|stage| {
        let times = [Command::Apply, Command::Revert].map(|command| stage.measure(command));
        let killed = kill_at(stage, &instants(times, 4, &[0, 300]), Victim::ForegroundGroup);
        assert!(killed >= 4, "{killed}");
    });
}

#[test]
fn a_vmpatch_whose_supervisor_is_killed_says_what_the_guest_is_like() {
    Stage::new().without_a_trace(|stage| {
        let times = [Command::Apply, Command::Revert].map(|command| stage.measure(command));
        let killed = kill_at(stage, &instants(times, 6, &[0, 300]), Victim::Supervisor);
        assert_eq!(killed, 0, "the worker itself is not killed");
    });
}

#[test]
fn a_supervisor_outlives_the_signals_that_end_a_whole_service() {
    Stage::new().without_a_trace(|stage| {
        let in_pause = |us| [When::InPause(Duration::from_micros(us)); 2];
        let killed = kill_at(stage, &[in_pause(0), in_pause(300)], Victim::Service);
        assert_eq!(killed, 4);
    });
}

/// Nobody is left to let the guest run, and nobody can tell such a pause from an operator's; but nothing is lost.
#[test]
fn both_killed_in_the_pause_may_leave_the_guest_paused_and_the_next_command_works_as_it_does_in_a_paused_guest() {
    Stage::new().without_a_trace(|stage| {
        let mut paused = 0;
        for us in [0, 50, 100, 200, 300, 400, 600, 1000] {
            for command in [Command::Apply, Command::Revert] {
                let when = When::InPause(Duration::from_micros(us));
                let answer = stage.cut(command, when, Victim::Both);
                let context = format!("{command:?} {when:?}: {answer}");
                let before = stage.monitor.run_state();
                let next = stage.vmpatch.run(&command.args());
                assert!(
                    next.code == Some(0) || next.stderr.contains("already applied"),
                    "{context}: {next}"
                );
                assert_eq!(stage.monitor.run_state(), before, "{context}: {next}");
                if before == "paused" {
                    paused += 1;
                    stage.monitor.cont();
                }
                assert_eq!(stage.look(&context), command.aim(), "{context}: {next}");
            }
        }
        println!("paused after {paused} of 16");
        assert!(paused > 0, "no pause was hit");
    });
}
