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
use e2e::sleeper::Sleeper;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::{Applied, Refused};
use images::kernel::Kernel;
use serde_json::Value;

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

#[test]
fn of_several_patches_those_that_were_done_are_reported_with_the_failure() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let states = |answer: &Answer, code: i32| {
        let report = answer.json();
        assert_eq!(report["exit_code"], code, "{answer}");
        assert_eq!(report["guest_state"], "partly done", "{answer}");
        assert!(report["error"].is_string(), "{answer}");
        let patches = report["patches"].as_array().unwrap().iter();
        let state = |patch: &Value| patch["state"].as_str().unwrap().to_owned();
        patches.map(state).collect::<Vec<_>>()
    };
    let refused = MODULES.refused(Refused::Callbacks);
    let third = MODULES.applied(Applied::Kstrtoint);
    let apply = ["apply", PAIR.as_str(), &refused, &third];
    let answer = vmpatch.run(&[&apply[..], &["--json"]].concat()).expect(3);
    assert_eq!(
        states(&answer, 3),
        ["applied", "not applied", "not applied"],
        "{answer}"
    );
    assert_eq!(see(&guest, PROGRAM), Seen::Fixed);
    vmpatch.revert_all();
    let answer = vmpatch.run(&apply).expect(3);
    assert!(answer.stdout.starts_with("test_pair: applied\n"), "{answer}");
    assert!(answer.stdout.contains(": not applied: not tried\n"), "{answer}");

    // A task sleeps inside the second one's code.
    vmpatch.apply(&MODULES.applied(Applied::Pause));
    let sleeper = Sleeper::start(&guest);
    let revert = ["revert", "--json", "--timeout", "0.2", "test_pair", "test_pause"];
    let answer = vmpatch.run(&revert).expect(4);
    assert_eq!(states(&answer, 4), ["reverted", "not reverted"], "{answer}");
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
    sleeper.wake(&guest);
}

#[test]
fn the_very_same_patch_applied_twice_is_done_and_another_one_of_its_name_is_refused() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&PAIR);
    let report = vmpatch.apply(&PAIR);
    let patch = &report["patches"][0];
    assert_eq!(patch["state"], "already applied", "{report}");
    assert_eq!(patch["functions"][0]["state"], "patched", "{report}");
    let answer = vmpatch.run(&["apply", &PAIR]).expect(0);
    assert!(answer.stdout.starts_with("test_pair: already applied\n"), "{answer}");
    let checked = vmpatch.run(&["check", "--json", &PAIR]).expect(0).json();
    assert_eq!(checked["patches"][0]["state"], "already applied", "{checked}");
    // The same code in another file: what the loader does not look at makes the digest another one.
    let other = std::env::temp_dir().join(format!("vmpatch-reports-{}.ko", std::process::id()));
    let bytes = [std::fs::read(PAIR.as_str()).unwrap(), b"more".to_vec()].concat();
    std::fs::write(&other, bytes).unwrap();
    let answer = vmpatch.run(&["apply", &other.display().to_string()]).expect(3);
    std::fs::remove_file(&other).unwrap();
    assert!(answer.complaint().contains("SHA-256"), "{answer}");
    assert!(answer.complaint().contains("revert test_pair"), "{answer}");
}

#[test]
fn a_host_without_a_place_for_locks_is_told_and_its_guests_can_still_be_looked_at() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let folder = "mkdir -p /run/vmpatch && mount -t tmpfs";
    // Two inodes are those of the folder and of another file.
    let full = format!("{folder} -o mode=700,nr_inodes=2 none /run/vmpatch && touch /run/vmpatch/other");
    let read_only = format!("{folder} -o mode=700,ro none /run/vmpatch");
    for line in [full, read_only] {
        for args in [
            &["status", "--json"][..],
            &["check", "--json", PAIR.as_str()],
            &["inspect", "--json"],
        ] {
            let answer = vmpatch.run_behind(&line, args).expect(0);
            assert_eq!(answer.json()["guest"]["domain"], guest.name(), "{answer}");
            assert!(answer.stderr.starts_with("warning: without a lock: "), "{answer}");
        }
        let answer = vmpatch.run_behind(&line, &["apply", PAIR.as_str()]).expect(5);
        assert!(answer.complaint().contains("/run/vmpatch"), "{answer}");
    }
    assert_eq!(see(&guest, PROGRAM), Seen::Flawed);
}
