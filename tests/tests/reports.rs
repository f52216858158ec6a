//! What a command says it has done, and its exit code, are true: also where the report can't be written, one of several patches fails,
//! or the guest does not run again.

use std::fs::File;
use std::process::Stdio;
use std::sync::LazyLock;

use e2e::bed;
use e2e::cut::{Call, Side, let_go_unheard, run_to};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));
static PAIR: LazyLock<String> = LazyLock::new(|| MODULES.applied(Applied::Pair));
/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";

fn guest() -> bed::Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// A disk that has no room for a report.
fn full() -> File {
    File::options()
        .write(true)
        .open("/dev/full")
        .expect("the host has /dev/full")
}

/// A pipe whose reader has gone.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().expect("the host makes pipes");
    drop(reader);
    writer.into()
}

#[test]
fn a_report_that_nobody_gets_changes_neither_the_guest_nor_what_the_exit_code_says_of_it() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let (apply, revert) = (["apply", PAIR.as_str()], ["revert", "--all"]);
    // A reader that does not want to know is no failure.
    for json in [&["--json"][..], &[]] {
        vmpatch.run_into(&[&apply[..], json].concat(), closed_pipe()).expect(0);
        assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
        vmpatch.run_into(&[&revert[..], json].concat(), closed_pipe()).expect(0);
        assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
    }
    let answer = vmpatch.run_into(&apply, full()).expect(6);
    assert!(answer.stderr.contains("\nguest: the change is in force"), "{answer}");
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
    // Nothing was changed.
    vmpatch.run_into(&["status"], full()).expect(1);
    vmpatch.run_into(&revert, full()).expect(6);
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
}

#[test]
fn a_guest_that_does_not_run_again_is_resumed_by_the_supervisor_and_told_as_patched() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    for (args, seen) in [
        (["apply", "--json", PAIR.as_str()], Seen::Fixed),
        (["revert", "--json", "--all"], Seen::Flawed),
    ] {
        let child = vmpatch.start(&args);
        run_to(&child, Call::Resume, 1, Side::Before);
        assert_eq!(monitor.run_state(), "paused");
        let_go_unheard(&child);
        let answer = vmpatch.finish(&args, child).expect(6);
        assert_eq!(answer.json()["guest_state"], "in force", "{answer}");
        assert_eq!(monitor.run_state(), "running", "{answer}");
        assert_eq!(see(&guest, PROGRAM), seen, "{answer}");
    }
}
