//! A QEMU that is silent for longer than vmpatch waits, as where its storage hangs, in the middle of a commit; and a vmpatch that is to be
//! silent, as its operator presses Ctrl-Z.

use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use e2e::cut::{Call, Side, let_go, run_to};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::vmpatch::{Answer, Vmpatch};
use e2e::{bed, processes};
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use nix::sys::signal::Signal;

static MODULE: LazyLock<String> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair));
/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";
/// How long vmpatch waits for each answer here, in seconds, so that the test need not wait for the default.
const REPLY_TIMEOUT_S: &str = "2";
/// Longer than vmpatch waits for the answers to its writes; it then tries to connect anew, three times, for as long.
const BACK_FOR_ROLLBACK: Duration = Duration::from_secs(3);
/// So long that the writes can't be rolled back in the pause.
const BACK_LATER: Duration = Duration::from_secs(11);

/// Runs vmpatch with a QEMU that is silent for that long from when it is to write code.
fn run_silenced(guest: &Guest, args: &[&str], silence: Duration) -> Answer {
    let vmpatch = Vmpatch::on(guest);
    let args = &[args, &["--reply-timeout", REPLY_TIMEOUT_S]].concat();
    let child = vmpatch.start(args);
    run_to(&child, Call::WriteMemory, 1, Side::Before);
    let start = Instant::now();
    processes::kill(guest.pid(), Signal::SIGSTOP);
    let_go(&child);
    sleep(silence.saturating_sub(start.elapsed()));
    processes::kill(guest.pid(), Signal::SIGCONT);
    let answer = vmpatch.finish(args, child);
    println!("{answer}");
    assert!(answer.stderr.contains("warning: QEMU does not answer"), "{answer}");
    answer
}

/// How long a guest that is paused may take to run again on a busy host.
const RUNS_WITHIN: Duration = Duration::from_secs(20);

/// A terminal's stop, which comes as the guest has just been paused, takes effect when the guest runs.
#[test]
fn ctrl_z_in_the_pause_does_not_leave_the_guest_paused() {
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    let mut monitor = Monitor::second(&guest);
    let vmpatch = Vmpatch::on(&guest);
    let args = ["apply", MODULE.as_str()];
    let child = vmpatch.start(&args);
    run_to(&child, Call::Pause, 1, Side::Behind);
    processes::kill(child.id(), Signal::SIGTSTP);
    let_go(&child);
    let start = Instant::now();
    while !(processes::is_stopped(child.id()) && monitor.run_state() == "running") {
        assert!(start.elapsed() < RUNS_WITHIN, "the guest is {}", monitor.run_state());
        sleep(Duration::from_millis(20));
    }
    processes::kill(child.id(), Signal::SIGCONT);
    vmpatch.finish(&args, child).expect(0);
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
    vmpatch.revert_all();
}

#[test]
fn a_qemu_that_falls_silent_in_the_commit_has_its_guest_wholly_old_or_wholly_new_and_running() {
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    let mut monitor = Monitor::second(&guest);
    let vmpatch = Vmpatch::on(&guest);
    let mut look = |seen: Seen, patches: usize| {
        assert_eq!(monitor.run_state(), "running");
        assert_eq!(see(&guest, PROGRAM), seen);
        assert_eq!(vmpatch.status()["patches"].as_array().unwrap().len(), patches);
    };
    let apply = ["apply", MODULE.as_str()];
    for silence in [BACK_FOR_ROLLBACK, BACK_LATER] {
        let answer = run_silenced(&guest, &apply, silence).expect(1);
        let is_later = answer.to_string().contains("what had been written was taken back");
        assert_eq!(is_later, silence == BACK_LATER, "{answer}");
        look(Seen::Flawed, 0);
    }
    vmpatch.apply(&MODULE);
    look(Seen::Fixed, 1);
    run_silenced(&guest, &["revert", "--all"], BACK_LATER).expect(0);
    look(Seen::Flawed, 0);
}
