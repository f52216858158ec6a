//! Patches that are applied and reverted task by task, where a task sleeps inside a function.

use std::time::{Duration, Instant};

use e2e::bed::{self, Lent, assert_healthy};
use e2e::cut::{Call, Side, run_to};
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::moving::{INSTALLED, Keeper};
use e2e::own_livepatch::{OwnLivepatch, insert};
use e2e::probe::{Seen, see};
use e2e::processes;
use e2e::report::states;
use e2e::sleeper::Sleeper;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use nix::sys::signal::Signal;
use serde_json::Value;

const APPLY: [&str; 6] = ["--json", "--model", "hybrid", "--timeout", "1", "apply"];
const REVERT: [&str; 7] = ["--json", "--model", "hybrid", "--timeout", "1", "revert", "--all"];
const FINISH: [&str; 4] = ["--json", "--timeout", "30", "finish"];
/// How long a program in the guest may take to get somewhere; the host may be busy with other guests.
const DAEMON_LIMIT: Duration = Duration::from_secs(60);

fn guest(kernel: Kernel) -> (Lent, Modules) {
    let modules = Modules::of(&kernel);
    (bed::lend(kit::guest(kernel)), modules)
}

fn names(report: &Value) -> Vec<(&str, &str)> {
    states(report).into_iter().map(|(id, state, _)| (id, state)).collect()
}

/// The answer to an apply or a revert that ends in a transition.
#[track_caller]
fn in_transition(answer: Answer) {
    let answer = answer.expect(6);
    let report = answer.json();
    assert_eq!(report["guest_state"], "in transition", "{report}");
    assert_eq!(names(&report), [("test_pause", "in transition")]);
}

/// What `status` says of the tasks that have not moved over.
fn marked_tasks(vmpatch: &Vmpatch) -> String {
    let status = vmpatch.status();
    assert_eq!(names(&status), [("test_pause", "in transition")]);
    status["patches"][0]["warnings"].to_string()
}

/// A task that sleeps in the old function for ever: it goes on there, everybody else runs the new one, and the transition ends when it leaves.
fn a_sleeper_keeps_the_old_code_and_all_others_get_the_new(guest: &Guest, modules: &Modules) {
    let vmpatch = Vmpatch::on(guest);
    let module = modules.applied(Applied::Pause);
    let sleeper = Sleeper::start(guest);
    in_transition(vmpatch.run(&[&APPLY[..], &[&module]].concat()));
    assert_eq!(see(guest, "pause"), Seen::Fixed);
    let said = marked_tasks(&vmpatch);
    let inside = format!("pause (pid {}) runs the old code inside __x64_sys_pause", sleeper.pid());
    assert!(said.contains("1 of ") && said.contains(&inside), "{said}");
    // It still does, and says so.
    let answer = vmpatch.run(&["--json", "--timeout", "1", "finish"]).expect(6).json();
    assert_eq!(answer["guest_state"], "in transition", "{answer}");
    assert_eq!(sleeper.wake(guest), Seen::Flawed);
    let finished = vmpatch.run(&FINISH).expect(0).json();
    assert_eq!(names(&finished), [("test_pause", "applied")]);
    assert_eq!(names(&vmpatch.status()), [("test_pause", "applied")]);
    assert_eq!(see(guest, "pause"), Seen::Fixed);
    assert_eq!(names(&vmpatch.run(&FINISH).expect(0).json()), []);
    vmpatch.revert_all();
    assert_eq!(see(guest, "pause"), Seen::Flawed);
    assert_eq!(vmpatch.inspect()["registry"], Value::Null);
}

/// A task that sleeps in the new function for ever: a revert leaves it there, everybody else runs the old one, and the code goes when it has left.
fn a_sleeper_in_the_new_code_stays_there_and_all_others_get_the_old(guest: &Guest, modules: &Modules) {
    let vmpatch = Vmpatch::on(guest);
    vmpatch.apply(&modules.applied(Applied::Pause));
    let sleeper = Sleeper::start(guest);
    let blocked = vmpatch.run(&["--model", "clean-cut", "--timeout", "1", "revert", "--all"]);
    blocked.expect(4);
    let begun = vmpatch.run(&REVERT);
    let warnings = begun.json()["patches"][0]["warnings"].to_string();
    assert!(warnings.contains("still run the new code"), "{warnings}");
    in_transition(begun);
    assert_eq!(see(guest, "pause"), Seen::Flawed);
    let said = marked_tasks(&vmpatch);
    let inside = format!("pause (pid {}) runs the new code inside", sleeper.pid());
    assert!(said.contains("1 of ") && said.contains(&inside), "{said}");
    // It is not applied meanwhile, and the same revert goes on with it.
    let refused = vmpatch.run(&["apply", &modules.applied(Applied::Pause)]).expect(3);
    let complaint = refused.complaint();
    assert!(complaint.contains("test_pause is in transition"), "{complaint}");
    in_transition(vmpatch.run(&REVERT));
    let refused = insert(guest, &modules.applied(Applied::Printk)).unwrap_err();
    assert!(refused.contains("resource busy"), "{refused}");
    assert_eq!(sleeper.wake(guest), Seen::Fixed);
    let finished = vmpatch.run(&FINISH).expect(0).json();
    assert_eq!(names(&finished), [("test_pause", "reverted")]);
    assert_eq!(names(&vmpatch.status()), []);
    assert_eq!(see(guest, "pause"), Seen::Flawed);
    assert_eq!(vmpatch.inspect()["registry"], Value::Null);
}

/// A patch in transition can be reverted, also where tasks sleep in the old code.
fn a_transition_is_reverted(guest: &Guest, modules: &Modules) {
    let vmpatch = Vmpatch::on(guest);
    let sleeper = Sleeper::start(guest);
    in_transition(vmpatch.run(&[&APPLY[..], &[&modules.applied(Applied::Pause)]].concat()));
    let other = vmpatch.run(&["apply", &modules.applied(Applied::Pair)]).expect(3);
    let complaint = other.complaint();
    assert!(complaint.contains("test_pause is in transition"), "{complaint}");
    let reverted = vmpatch.revert_all();
    assert_eq!(names(&reverted), [("test_pause", "reverted")]);
    assert_eq!(see(guest, "pause"), Seen::Flawed);
    assert_eq!(sleeper.wake(guest), Seen::Flawed);
    assert_eq!(vmpatch.inspect()["registry"], Value::Null);
}

/// Where nobody is inside, the patch goes in at one instant.
fn a_free_function_is_patched_at_one_instant(guest: &Guest, modules: &Modules) {
    let vmpatch = Vmpatch::on(guest);
    let applied = vmpatch.run(&[&APPLY[..], &[&modules.applied(Applied::Pause)]].concat());
    let report = applied.expect(0).json();
    assert_eq!(names(&report), [("test_pause", "applied")]);
    assert_eq!(report["patches"][0]["model"], "hybrid");
    vmpatch.revert_all();
}

/// The guest's own livepatches get EBUSY while a patch is in transition, and work afterwards.
fn the_guests_own_livepatch_waits(guest: &Guest, modules: &Modules) {
    let vmpatch = Vmpatch::on(guest);
    let sleeper = Sleeper::start(guest);
    in_transition(vmpatch.run(&[&APPLY[..], &[&modules.applied(Applied::Pause)]].concat()));
    let own = modules.applied(Applied::Printk);
    let refused = insert(guest, &own).unwrap_err();
    assert!(refused.contains("resource busy"), "{refused}");
    assert_eq!(sleeper.wake(guest), Seen::Flawed);
    vmpatch.run(&FINISH).expect(0);
    OwnLivepatch::load(guest, &own, "test_printk").unload();
    vmpatch.revert_all();
    OwnLivepatch::load(guest, &own, "test_printk").unload();
}

/// A task that sleeps in the old function, and writes what it saw into a file: no channel of the host is in its way.
struct Daemon(String);

impl Daemon {
    const SAYS: &str = "/tmp/daemon";

    #[track_caller]
    fn start(guest: &Guest) -> Self {
        let script = format!("/opt/pause sleep > {} 2>&1 < /dev/null & echo $!", Self::SAYS);
        let pid = guest.text(&["sh", "-c", &script]).unwrap().trim().to_owned();
        let start = Instant::now();
        let call = format!("/proc/{pid}/syscall");
        while !guest.text(&["cat", &call]).is_ok_and(|line| line.starts_with("34 ")) {
            assert!(start.elapsed() < DAEMON_LIMIT, "it never sleeps");
        }
        Self(pid)
    }

    /// Wakes it, and gives what it says.
    #[track_caller]
    fn wake(self, guest: &Guest) -> String {
        guest.text(&["kill", "-USR1", &self.0]).unwrap();
        let start = Instant::now();
        loop {
            let said = guest.text(&["cat", Self::SAYS]).unwrap();
            if said.contains("pause()") {
                return said;
            }
            assert!(start.elapsed() < DAEMON_LIMIT, "{said}");
        }
    }
}

const STEPS: [(Call, Side); 6] = [
    (Call::Watch, Side::Behind),
    (Call::Pause, Side::Behind),
    (Call::WriteMemory, Side::Before),
    (Call::WriteMemory, Side::Behind),
    (Call::Resume, Side::Before),
    (Call::Resume, Side::Behind),
];

/// Starts vmpatch, and kills it at that step.
fn killed(vmpatch: &Vmpatch, args: &[&str], (call, side): (Call, Side)) {
    let child = vmpatch.start(args);
    run_to(&child, call, 1, side);
    processes::kill(child.id(), Signal::SIGKILL);
    let killed = vmpatch.finish(args, child);
    assert_eq!(killed.code, None, "{killed}");
}

/// Killed where a transition begins, vmpatch leaves all old or a whole transition; the same command goes on.
#[test]
fn a_begin_that_is_killed_leaves_all_old_or_a_whole_transition() {
    let (guest, modules) = guest(Kernel::CLOUD_6_1);
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let module = modules.applied(Applied::Pause);
    let apply = [&APPLY[..], &["--grace", "0", &module]].concat();
    for step in STEPS {
        let sleeper = Sleeper::start(&guest);
        killed(&vmpatch, &apply, step);
        // The next command waits for the supervisor.
        let status = vmpatch.status();
        assert_eq!(monitor.run_state(), "running");
        let sees = see(&guest, "pause");
        println!("killed at {step:?}: then {:?}, {sees:?}", names(&status));
        let is_begun = names(&status) == [("test_pause", "in transition")];
        assert_eq!(sees == Seen::Fixed, is_begun, "{status}");
        in_transition(vmpatch.run(&apply));
        assert_eq!(see(&guest, "pause"), Seen::Fixed);
        assert_eq!(sleeper.wake(&guest), Seen::Flawed);
        vmpatch.run(&FINISH).expect(0);
        vmpatch.revert_all();
        assert_eq!(see(&guest, "pause"), Seen::Flawed);
    }
    OwnLivepatch::load(&guest, &modules.applied(Applied::Printk), "test_printk").unload();
    assert_healthy(&guest);
}

/// Killed where a transition ends, vmpatch leaves one that can end.
#[test]
fn an_end_that_is_killed_leaves_a_transition_that_can_end() {
    let (guest, modules) = guest(Kernel::CLOUD_6_1);
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let module = modules.applied(Applied::Pause);
    for step in STEPS {
        let sleeper = Sleeper::start(&guest);
        in_transition(vmpatch.run(&[&APPLY[..], &[&module]].concat()));
        assert_eq!(sleeper.wake(&guest), Seen::Flawed);
        killed(&vmpatch, &FINISH, step);
        let status = vmpatch.status();
        println!("killed at {step:?}: then {:?}", names(&status));
        assert_eq!(monitor.run_state(), "running");
        assert_eq!(see(&guest, "pause"), Seen::Fixed);
        vmpatch.run(&FINISH).expect(0);
        assert_eq!(names(&vmpatch.status()), [("test_pause", "applied")]);
        vmpatch.revert_all();
        assert_eq!(see(&guest, "pause"), Seen::Flawed);
    }
    OwnLivepatch::load(&guest, &modules.applied(Applied::Printk), "test_printk").unload();
    assert_healthy(&guest);
}

/// Killed where the transition of a revert begins, vmpatch leaves all new or a whole transition; killed where it ends, one that can end.
#[test]
fn a_revert_that_is_killed_leaves_all_new_or_a_transition_that_can_end() {
    let (guest, modules) = guest(Kernel::CLOUD_6_1);
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let module = modules.applied(Applied::Pause);
    let revert = [&["--grace", "0"], &REVERT[..]].concat();
    for step in STEPS {
        vmpatch.apply(&module);
        let sleeper = Sleeper::start(&guest);
        killed(&vmpatch, &revert, step);
        let status = vmpatch.status();
        assert_eq!(monitor.run_state(), "running");
        let sees = see(&guest, "pause");
        println!("begin killed at {step:?}: then {:?}, {sees:?}", names(&status));
        let is_begun = names(&status) == [("test_pause", "in transition")];
        assert_eq!(sees == Seen::Flawed, is_begun, "{status}");
        in_transition(vmpatch.run(&revert));
        assert_eq!(see(&guest, "pause"), Seen::Flawed);
        assert_eq!(sleeper.wake(&guest), Seen::Fixed);
        killed(&vmpatch, &FINISH, step);
        let status = vmpatch.status();
        println!("end killed at {step:?}: then {:?}", names(&status));
        assert_eq!(monitor.run_state(), "running");
        assert_eq!(see(&guest, "pause"), Seen::Flawed);
        vmpatch.run(&FINISH).expect(0);
        assert_eq!(vmpatch.inspect()["registry"], Value::Null);
        assert_eq!(see(&guest, "pause"), Seen::Flawed);
    }
    OwnLivepatch::load(&guest, &modules.applied(Applied::Printk), "test_printk").unload();
    assert_healthy(&guest);
}

/// A guest moves into another QEMU in the middle of a transition, which goes on and ends there.
#[test]
fn a_transition_moves_with_the_guest() {
    let mut config = kit::guest(Kernel::CLOUD_6_1);
    config.machine = "q35,aux-ram-share=on".to_owned();
    let mut guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let vmpatch = Vmpatch::on(&guest);
    let module = Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pause);
    let daemon = Daemon::start(&guest);
    in_transition(vmpatch.run(&[&APPLY[..], &[&module]].concat()));
    let report = vmpatch
        .run(&["upgrade", "--qemu", INSTALLED, "--json"])
        .expect(0)
        .json();
    let new = report["new"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok());
    guest.follow(new.unwrap()).unwrap();
    let said = marked_tasks(&vmpatch);
    assert!(
        said.contains("1 of ") && said.contains(&format!("pid {}", daemon.0)),
        "{said}"
    );
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    let said = daemon.wake(&guest);
    assert!(said.contains("flawed"), "{said}");
    vmpatch.run(&FINISH).expect(0);
    assert_eq!(names(&vmpatch.status()), [("test_pause", "applied")]);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "pause"), Seen::Flawed);
    assert_healthy(&guest);
}

fn all(kernel: Kernel) {
    let (guest, modules) = guest(kernel);
    a_free_function_is_patched_at_one_instant(&guest, &modules);
    a_sleeper_keeps_the_old_code_and_all_others_get_the_new(&guest, &modules);
    a_transition_is_reverted(&guest, &modules);
    a_sleeper_in_the_new_code_stays_there_and_all_others_get_the_old(&guest, &modules);
    the_guests_own_livepatch_waits(&guest, &modules);
    Ftrace::of(&guest).assert_alive();
    assert_healthy(&guest);
}

#[test]
fn a_transition_on_6_1() {
    all(Kernel::CLOUD_6_1);
}

#[test]
fn a_transition_on_5_10() {
    all(Kernel::CLOUD_5_10);
}

#[test]
fn a_transition_on_6_12() {
    all(Kernel::CLOUD_6_12);
}

#[test]
fn a_transition_on_6_12_with_preempt_rt() {
    all(Kernel::RT_6_12);
}

#[test]
fn a_transition_on_7_2() {
    all(Kernel::CLOUD_7_2);
}
