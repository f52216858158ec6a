//! A vmpatch that is killed, or its supervisor, at a chosen moment; and what the guest must be like then.
//!
//! The module that is applied has two functions that see whether the other one is of their own age, so that a half patch shows.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use host_agent::hypervisor::Route;
use images::build::hand_written::Applied;
use images::kernel::Kernel;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::bed::{self, Lent};
use crate::cut::{self, Call, Side};
use crate::kit::{self, Modules};
use crate::monitor::Monitor;
use crate::probe::{Seen, see};
use crate::processes;
use crate::report::states;
use crate::vmpatch::{Answer, Vmpatch};

/// The program in the guest that tells old, new, and mixed.
pub const PROGRAM: &str = "pair";
/// How long a pause is waited for: longer than a command takes on a busy host.
const PAUSE_LIMIT: Duration = Duration::from_secs(20);
/// What exit 4 says where a pause took longer than is allowed. After one of a second, no other one fits into ten seconds.
const TOO_BUSY: &str = "the host is too busy";
/// Tries of a command that ends so.
const TRIES_MAX: u32 = 5;

/// What is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `apply` of the module.
    Apply,
    /// `revert --all`.
    Revert,
}

impl Command {
    /// What the guest shows once it is done.
    pub fn aim(self) -> Seen {
        match self {
            Self::Apply => Seen::Fixed,
            Self::Revert => Seen::Flawed,
        }
    }

    /// What the guest shows before.
    pub fn start(self) -> Seen {
        match self {
            Self::Apply => Seen::Flawed,
            Self::Revert => Seen::Fixed,
        }
    }
}

/// When it is cut off.
#[derive(Clone, Copy, Debug)]
pub enum When {
    /// So long after its start.
    After(Duration),
    /// So long after it has stopped the guest.
    InPause(Duration),
    /// On that side of its first such system call.
    At(Call, Side),
}

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// vmpatch, not its supervisor.
    Worker,
    /// As Ctrl-C on a terminal does it.
    ForegroundGroup,
    /// Its process that reads the guest.
    Reader,
    /// Its supervisor alone.
    Supervisor,
    /// All, by SIGTERM, as a service manager does it.
    Service,
    /// Both at once.
    Both,
}

/// A guest and what is used beside it.
pub struct Stage {
    /// The guest.
    pub guest: Lent,
    /// vmpatch on its first socket.
    pub vmpatch: Vmpatch,
    /// Its second socket.
    pub monitor: Monitor,
    module: String,
}

impl Stage {
    /// A guest of that kernel.
    ///
    /// # Panics
    ///
    /// If it does not boot; each method here, if something is not as it must be.
    pub fn new(kernel: Kernel) -> Self {
        let module = Modules::of(&kernel).applied(Applied::Pair);
        let guest = bed::lend(kit::guest(kernel));
        Self {
            vmpatch: Vmpatch::on(&guest),
            monitor: Monitor::second(&guest),
            guest,
            module,
        }
    }

    /// The words of the command line.
    pub fn args(&self, command: Command) -> [&str; 2] {
        match command {
            Command::Apply => ["apply", &self.module],
            Command::Revert => ["revert", "--all"],
        }
    }

    /// Runs the command, which must succeed; once more where the host was too busy for a pause.
    #[track_caller]
    pub fn run(&self, command: Command) -> Answer {
        for _ in 1..TRIES_MAX {
            let answer = self.vmpatch.run(&self.args(command));
            if answer.code != Some(4) || !answer.stderr.contains(TOO_BUSY) {
                return answer.expect(0);
            }
        }
        self.vmpatch.run(&self.args(command)).expect(0)
    }

    /// How long the command takes if nobody kills it; the guest is as before.
    pub fn measure(&self, command: Command) -> Duration {
        if command == Command::Revert {
            self.run(Command::Apply);
        }
        let took = self.run(command).took;
        if command == Command::Apply {
            self.run(Command::Revert);
        }
        took
    }

    /// Runs the command and kills it; returns when nothing of it is left.
    pub fn cut(&mut self, command: Command, when: When, victim: Victim) -> Answer {
        self.monitor.forget_events();
        let start = Instant::now();
        let child = self.vmpatch.start(&self.args(command));
        match when {
            When::After(delay) => sleep(delay.saturating_sub(start.elapsed())),
            When::InPause(delay) => {
                let is_paused = self.monitor.wait_for_event("STOP", PAUSE_LIMIT);
                assert!(is_paused, "{command:?} pauses the guest");
                spin(delay);
            }
            When::At(call, side) => cut::run_to(&child, call, 1, side),
        }
        kill(&child, &self.guest.qmp_path(), victim);
        if let (When::At(..), Victim::Supervisor) = (when, victim) {
            cut::let_go(&child);
        }
        // The supervisor has the same standard error, so this waits for its end, too.
        let answer = self.vmpatch.finish(&self.args(command), child);
        Answer {
            took: start.elapsed(),
            ..answer
        }
    }

    /// What the guest is like now: it runs, is wholly old or wholly new, and vmpatch sees the same.
    pub fn look(&mut self, context: &str) -> Seen {
        assert_eq!(self.monitor.run_state(), "running", "{context}");
        let looked = catch_unwind(AssertUnwindSafe(|| see(&self.guest, PROGRAM)));
        let seen = looked.unwrap_or_else(|panic| {
            eprintln!("{context}");
            self.tell_where_the_guest_is();
            resume_unwind(panic)
        });
        let status = self.vmpatch.status();
        match &states(&status)[..] {
            [] => assert_eq!(seen, Seen::Flawed, "{context}: {status}"),
            [(_, "applied", functions)] => {
                assert_eq!(functions[..], ["patched"; 2], "{context}: {status}");
                assert_eq!(seen, Seen::Fixed, "{context}: {status}");
            }
            [(_, "staging" | "reverted" | "half applied" | "half reverted", functions)] => {
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

    /// Where the vCPUs of a guest are that does not answer: three times, with the code there.
    fn tell_where_the_guest_is(&mut self) {
        for _ in 0..3 {
            for line in ["info status", "info registers -a"] {
                let told = self
                    .monitor
                    .call("human-monitor-command", json!({ "command-line": line }));
                let told = told.map_or_else(|error| error, |text| text.as_str().unwrap_or_default().to_owned());
                let is_of_interest = |line: &&str| {
                    ["VM", "CPU", "RIP", "RAX", "RSP"]
                        .iter()
                        .any(|word| line.contains(word))
                };
                told.lines().filter(is_of_interest).for_each(|line| eprintln!("{line}"));
            }
            sleep(Duration::from_secs(1));
        }
        let code = self
            .monitor
            .call("human-monitor-command", json!({ "command-line": "x/40xb $pc-16" }));
        eprintln!("{code:?}");
    }

    /// Kills the command, looks, and has the next one of the same kind work. Gives what the guest was like in between.
    pub fn cut_and_repeat(&mut self, command: Command, when: When, victim: Victim) -> (Answer, Seen) {
        let answer = self.cut(command, when, victim);
        let context = format!("{command:?} {when:?} {victim:?}: {answer}");
        let seen = self.look(&context);
        if let Some(code) = answer.code {
            let expected = if code == 0 { command.aim() } else { command.start() };
            assert_eq!(seen, expected, "{context}");
        }
        if seen != command.aim() {
            self.run(command);
            assert_eq!(self.look(&context), command.aim(), "{context}: once more");
        }
        (answer, seen)
    }

    /// The same for an apply, then for a revert: the guest is as before.
    pub fn cut_both_ways(&mut self, when: [When; 2], victim: Victim) -> [Answer; 2] {
        let [apply, revert] = when;
        [(Command::Apply, apply), (Command::Revert, revert)]
            .map(|(command, when)| self.cut_and_repeat(command, when, victim).0)
    }
}

/// Waits more exactly than the scheduler's sleep does.
fn spin(time: Duration) {
    let start = Instant::now();
    while start.elapsed() < time {
        std::hint::spin_loop();
    }
}

/// The supervisors of a guest's changes, by its QMP socket.
pub fn supervisors(socket: &Path) -> Vec<u32> {
    let route = Route::qmp(socket.to_owned());
    processes::with_arguments(&["supervise", &route.to_argument()])
}

/// The processes that read the guest for a vmpatch that was started: its children of the same command line.
pub fn readers(vmpatch: &Child) -> Vec<u32> {
    let line = |pid: u32| std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let own = line(vmpatch.id());
    let children = processes::children(vmpatch.id());
    children.into_iter().filter(|pid| line(*pid) == own).collect()
}

fn kill(worker: &Child, socket: &Path, victim: Victim) {
    let supervisor = || supervisors(socket);
    match victim {
        Victim::Worker => processes::kill(worker.id(), Signal::SIGKILL),
        Victim::ForegroundGroup => processes::kill_group(worker.id(), Signal::SIGINT),
        Victim::Reader => readers(worker)
            .into_iter()
            .for_each(|pid| processes::kill(pid, Signal::SIGKILL)),
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
