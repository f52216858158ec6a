//! A vmpatch that is killed at any step of a move, a guest that its operator has paused, a disk that somebody else takes: the guest is
//! in exactly one process, as it was, and the next command says in which. Where it can go on in none, vmpatch says so, and lets none run it.
//!
//! The guest works all the while, and somebody talks to it: what was lost or done twice would show at the end.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::Child;
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::Duration;

use e2e::bed::assert_healthy;
use e2e::cut::{Call, Side, let_go, run_to};
use e2e::kit::{self, Modules};
use e2e::load::{Outfit, Talk};
use e2e::monitor::Monitor;
use e2e::moving::{INSTALLED, Keeper, processes_of, successors, temporary_names, wait_for};
use e2e::probe::{Seen, see};
use e2e::processes;
use e2e::report::states;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::Signal;
use serde_json::json;

static MODULE: LazyLock<String> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair));

/// The program in the guest that tells old, new, and mixed.
const PROGRAM: &str = "pair";
/// Memory that the guest writes again and again, in MiB.
const WRITTEN_MIB: u32 = 8;
/// By this its watcher knows that the guest is going to run in the new process.
const COMMITTING: Call = Call::Tell(b'c');
/// Where the guest is then.
const IN_OLD: &str = "the guest was not moved, and is in its old process as before";
const IN_NEW: &str = "the guest has moved, and is in its new process";
/// The byte of a disk image that says "nobody else may write", where anybody holds a lock on it (QEMU's `block/file-posix.c`,
/// `RAW_LOCK_SHARED_BASE` + the bit of `BLK_PERM_WRITE`; 2.10 to 10.0).
const NOBODY_ELSE_WRITES: i64 = 201;

/// A patched guest at work, which moves.
struct Stage {
    guest: Guest,
    #[expect(dead_code, reason = "it works by being dropped")]
    keeper: Keeper,
    vmpatch: Vmpatch,
    outfit: Outfit,
    talk: Talk,
}

impl Stage {
    fn new() -> Self {
        let outfit = Outfit::new();
        let mut config = kit::guest(Kernel::CLOUD_6_1);
        config.machine = "q35,aux-ram-share=on".to_owned();
        let guest = Guest::boot(outfit.fit(config)).unwrap_or_else(|error| panic!("{error}"));
        let (keeper, vmpatch) = (Keeper::of(&guest), Vmpatch::on(&guest));
        vmpatch.apply(&MODULE);
        outfit.start_work(&guest, WRITTEN_MIB);
        let talk = outfit.talk();
        Self {
            guest,
            keeper,
            vmpatch,
            outfit,
            talk,
        }
    }

    fn start(&self, options: &[&str]) -> Child {
        self.vmpatch
            .start(&[&["upgrade", "--qemu", INSTALLED], options].concat())
    }

    fn finish(&self, child: Child) -> Answer {
        self.vmpatch.finish(&["upgrade"], child)
    }

    fn watchers(&self) -> Vec<u32> {
        processes::with_arguments(&["watch-move", &self.guest.pid().to_string()])
    }

    /// Kills a vmpatch that has begun to move the guest, and whoever watches over it where `all` are to die. Gives what was said of
    /// where the guest is, by the watcher, or by the next command.
    fn kill(&self, worker: Child, all: bool) -> String {
        if all {
            let watchers = self.watchers();
            watchers
                .into_iter()
                .for_each(|pid| processes::kill(pid, Signal::SIGKILL));
        }
        processes::kill(worker.id(), Signal::SIGKILL);
        // The watcher has the same standard error, so this waits for its end, too.
        let answer = self.finish(worker);
        let next = self.vmpatch.run(&["status"]).expect(0);
        let before = if all { &next } else { &answer };
        before.stderr.clone()
    }

    /// The guest is in one process, in that state and patched, and all its names lead there.
    fn is_in_one_process(&mut self, state: &str, context: &str) {
        let status = self.vmpatch.status();
        let pid = u32::try_from(status["guest"]["pid"].as_u64().unwrap()).unwrap();
        wait_for(|| (processes_of(self.guest.name()) == [pid]).then_some(()));
        let patches = [("test_pair", "applied", vec!["patched"; 2])];
        assert_eq!(states(&status), patches, "{context}");
        assert_eq!(temporary_names(&self.guest), [""; 0], "{context}");
        let mut second = Monitor::second(&self.guest);
        assert_eq!(second.run_state(), state, "{context}");
        if state != "running" {
            second.cont();
        }
        drop(second);
        if pid != self.guest.pid() {
            self.guest.follow(pid).unwrap();
        }
        assert_eq!(see(&self.guest, PROGRAM), Seen::Fixed, "{context}");
        self.outfit.assert_reached(context);
    }

    fn end(self) {
        let silence = self.talk.end();
        println!("an echo took {:?} at the most of {}", silence.longest, silence.echoes);
        println!(
            "rounds of memory, wrong, blocks of the disk, wrong: {:?}",
            self.outfit.end_work(&self.guest)
        );
        self.vmpatch.revert_all();
        assert_eq!(see(&self.guest, PROGRAM), Seen::Flawed);
        assert_healthy(&self.guest);
    }
}

#[test]
fn a_vmpatch_that_is_killed_at_any_step_leaves_the_guest_in_one_process() {
    let mut stage = Stage::new();
    // All has been sent, and nobody knows; its watcher knows; the guest runs there; a name has been taken over; all have.
    let steps = [
        (COMMITTING, 1, Side::Before, IN_OLD),
        (COMMITTING, 1, Side::Behind, IN_OLD),
        (Call::Rename, 1, Side::Before, IN_NEW),
        (Call::Rename, 2, Side::Before, IN_NEW),
        (Call::Kill, 1, Side::Before, IN_NEW),
    ];
    for (index, (call, nth, side, outcome)) in steps.into_iter().enumerate() {
        for all in [false, true] {
            let way = if all == (index % 2 == 0) {
                "cpr-transfer"
            } else {
                "precopy"
            };
            let context = format!("{side:?} {call:?} {nth}, all: {all}, {way}");
            let old = stage.guest.pid();
            let child = stage.start(&["--method", way]);
            run_to(&child, call, nth, side);
            let said = stage.kill(child, all);
            assert!(said.contains(outcome), "{context}: {said}");
            stage.is_in_one_process("running", &context);
            assert_eq!(stage.guest.pid() != old, outcome == IN_NEW, "{context}");
        }
    }
    // Killed before anything was sent, in a process whose own arrival is what `query-migrate` tells as "completed".
    for all in [false, true] {
        let context = format!("at the start, all: {all}");
        let (old, child) = (stage.guest.pid(), stage.start(&["--method", "cpr-transfer"]));
        wait_for(|| (processes_of(stage.guest.name()).len() == 2).then_some(()));
        let said = stage.kill(child, all);
        assert!(said.contains(IN_OLD), "{context}: {said}");
        stage.is_in_one_process("running", &context);
        assert_eq!(stage.guest.pid(), old, "{context}");
    }
    stage.end();
}

#[test]
fn a_guest_that_was_paused_stays_so_and_one_whose_disk_is_taken_waits_for_it() {
    let mut stage = Stage::new();
    for way in ["cpr-transfer", "precopy"] {
        let old = stage.guest.pid();
        Monitor::second(&stage.guest).stop();
        let answer = stage
            .vmpatch
            .run(&["upgrade", "--qemu", INSTALLED, "--method", way])
            .expect(0);
        stage.is_in_one_process("paused", &answer.to_string());
        assert_ne!(stage.guest.pid(), old, "{way}");

        Monitor::second(&stage.guest).stop();
        let child = stage.start(&["--method", way]);
        run_to(&child, COMMITTING, 1, Side::Behind);
        let said = stage.kill(child, way == "precopy");
        assert!(said.contains(IN_OLD), "{said}");
        // Paused as it was; QEMU says in its own word that all had been sent.
        stage.is_in_one_process("postmigrate", &said);
    }

    let old = stage.guest.pid();
    let lock = hold_disk(&stage.outfit.disk());
    let child = stage.start(&["--method", "precopy"]);
    // The old process has let the disk go, the new one could not have it, and was ended: the guest is paused.
    let mut monitor = Monitor::second(&stage.guest);
    wait_for(|| (monitor.run_state() == "postmigrate").then_some(()));
    wait_for(|| (processes_of(stage.guest.name()) == [old]).then_some(()));
    sleep(Duration::from_millis(300));
    assert_eq!(monitor.run_state(), "postmigrate");
    drop(monitor);
    drop(lock);
    let answer = stage.finish(child).expect(1);
    assert!(answer.complaint().contains("Failed to get"), "{answer}");
    stage.is_in_one_process("running", &answer.to_string());
    assert_eq!(stage.guest.pid(), old);
    stage.end();
}

/// The new process could not have the disk, and the old one does not get it again within the time that vmpatch waits.
#[test]
fn a_guest_whose_disk_stays_taken_is_told_as_paused_and_goes_on_once_the_disk_is_free() {
    let mut stage = Stage::new();
    let old = stage.guest.pid();
    let lock = hold_disk(&stage.outfit.disk());
    let line = ["upgrade", "--qemu", INSTALLED, "--method", "precopy", "--json"];
    let answer = stage.vmpatch.run(&line).expect(6);
    let report = answer.json();
    assert_eq!(report["guest_state"], "paused", "{answer}");
    let complaint = report["error"].as_str().unwrap();
    let words = format!("the guest is paused in the old process (pid {old}), and has never run in the new one");
    assert!(complaint.starts_with(&words), "{answer}");
    assert!(
        answer.stderr.contains("hint: ") && answer.stderr.contains("QMP `cont`"),
        "{answer}"
    );
    wait_for(|| (processes_of(stage.guest.name()) == [old]).then_some(()));
    let mut monitor = Monitor::second(&stage.guest);
    assert!(monitor.call("cont", json!({})).is_err(), "the disk is taken");
    drop(lock);
    monitor.cont();
    drop(monitor);
    stage.is_in_one_process("running", &answer.to_string());
    assert_eq!(stage.guest.pid(), old);
    stage.end();
}

/// The disks have changed since, so the old process must not run the guest.
#[test]
fn a_guest_whose_new_process_has_run_it_and_ends_is_told_as_lost_and_is_not_run_again() {
    let stage = Stage::new();
    let line = ["--method", "precopy", "--json"];
    let child = stage.start(&line);
    run_to(&child, COMMITTING, 1, Side::Behind);
    let new = successors(stage.guest.name());
    let [new] = new[..] else { panic!("{new:?}") };
    let second = stage.guest.qmp_paths()[1].display().to_string();
    Monitor::connect(Path::new(&format!("{second}~vmpatch")))
        .unwrap()
        .cont();
    processes::kill(new, Signal::SIGKILL);
    let_go(&child);
    let answer = stage.finish(child).expect(6);
    let report = answer.json();
    assert_eq!(report["guest_state"], "lost", "{answer}");
    let complaint = report["error"].as_str().unwrap();
    assert!(
        complaint.contains("must not go on, as its disks have changed"),
        "{answer}"
    );
    assert!(!answer.stderr.contains("`cont` lets it go on"), "{answer}");
    // The watcher has ended, too, as it has the same standard error.
    assert_eq!(processes_of(stage.guest.name()), [stage.guest.pid()], "{answer}");
    assert_eq!(temporary_names(&stage.guest), [""; 0], "{answer}");
    for line in [&["upgrade", "--qemu", INSTALLED][..], &["revert", "--all"]] {
        stage.vmpatch.run(line).expect(3);
    }
    assert_eq!(Monitor::second(&stage.guest).run_state(), "postmigrate", "{answer}");
}

/// Holds the image as somebody who reads it and wants it to stay as it is, for as long as the result is there.
fn hold_disk(image: &str) -> File {
    let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
    let lock = libc::flock {
        l_type: i16::try_from(libc::F_RDLCK).unwrap(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap(),
        l_start: NOBODY_ELSE_WRITES,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    file
}
