//! Patches that are applied task by task, where a task sleeps inside an old function.

use e2e::bed::{self, Lent, assert_healthy};
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::own_livepatch::{OwnLivepatch, insert};
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::sleeper::Sleeper;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use serde_json::Value;

const APPLY: [&str; 6] = ["--json", "--model", "hybrid", "--timeout", "1", "apply"];
const FINISH: [&str; 4] = ["--json", "--timeout", "30", "finish"];

fn guest(kernel: Kernel) -> (Lent, Modules) {
    let modules = Modules::of(&kernel);
    (bed::lend(kit::guest(kernel)), modules)
}

fn names(report: &Value) -> Vec<(&str, &str)> {
    states(report).into_iter().map(|(id, state, _)| (id, state)).collect()
}

/// The answer to an apply that ends in a transition.
#[track_caller]
fn in_transition(answer: Answer) {
    let answer = answer.expect(6);
    let report = answer.json();
    assert_eq!(report["guest_state"], "in transition", "{report}");
    assert_eq!(names(&report), [("test_pause", "in transition")]);
}

/// What `status` says of the tasks that run the old code.
fn old_tasks(vmpatch: &Vmpatch) -> String {
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
    let said = old_tasks(&vmpatch);
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

/// A patch in transition can be reverted, whoever sleeps in the old code.
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

fn all(kernel: Kernel) {
    let (guest, modules) = guest(kernel);
    a_free_function_is_patched_at_one_instant(&guest, &modules);
    a_sleeper_keeps_the_old_code_and_all_others_get_the_new(&guest, &modules);
    a_transition_is_reverted(&guest, &modules);
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
