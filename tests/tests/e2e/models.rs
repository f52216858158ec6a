//! When it is safe to patch: tasks that sleep or work inside what is to be changed, and guests at rest or at work.

use std::sync::LazyLock;
use std::time::Duration;

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::ram::{KernelPlace, Ram};
use e2e::report::states;
use e2e::sleeper::Sleeper;
use e2e::vmpatch::{Answer, Vmpatch};
use images::build::hand_written::Applied;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));
/// What a test waits for a safe moment that does not come, and what vmpatch may take then, on a busy host.
const TIMEOUT: [&str; 2] = ["--timeout", "2"];
const TOOK_MAX: Duration = Duration::from_secs(10);

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

/// The message names who is in the way and where, and came within the deadline.
#[track_caller]
fn assert_blocked(answer: Answer, sleepers: &[&Sleeper], place: &str) {
    let answer = answer.expect(4);
    let complaint = answer.complaint();
    for sleeper in sleepers {
        let who = format!("pause (pid {}) is inside {place}", sleeper.pid());
        assert!(complaint.contains(&who), "no {who:?}: {answer}");
    }
    assert!(
        (Duration::from_secs(1)..TOOK_MAX).contains(&answer.took),
        "{:?}: {answer}",
        answer.took
    );
}

fn with_timeout<'a>(command: &[&'a str]) -> Vec<&'a str> {
    [command, &TIMEOUT].concat()
}

#[test]
fn tasks_asleep_in_the_old_function_are_named_and_the_patch_goes_in_when_they_have_left() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let module = MODULES.applied(Applied::Pause);
    let apply = with_timeout(&["apply", &module]);
    let sleepers = [Sleeper::start(&guest), Sleeper::start(&guest)];
    let found = vmpatch.inspect();
    let place = KernelPlace::of(&guest, &found);
    let mut look = || {
        monitor.stop();
        let ram = Ram::save(&guest, &mut monitor).unwrap();
        monitor.cont();
        (place.image(&ram), place.page_tables(&ram), place.ftrace_records(&ram))
    };

    let before = look();
    assert_blocked(vmpatch.run(&apply), &[&sleepers[0], &sleepers[1]], "__x64_sys_pause");
    let after = look();
    // No assert_eq: megabytes help nobody.
    assert!(before.0 == after.0, "text or read-only data is not as before");
    assert!(before.1 == after.1, "page tables are not as before");
    assert!(before.2 == after.2, "ftrace records are not as before");
    assert_eq!(states(&vmpatch.status()), []);
    assert_eq!(vmpatch.inspect()["caves"], found["caves"], "the cave is filler again");
    assert_eq!(monitor.run_state(), "running");

    let [first, second] = sleepers;
    assert_eq!(first.wake(&guest), Seen::Flawed);
    assert_blocked(vmpatch.run(&apply), &[&second], "__x64_sys_pause");
    assert_eq!(second.wake(&guest), Seen::Flawed);
    vmpatch.run(&apply).expect(0);
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
}

#[test]
fn a_task_asleep_in_the_new_function_keeps_the_patch_in_until_it_has_left() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&MODULES.applied(Applied::Pause));
    let sleeper = Sleeper::start(&guest);
    // Not even without a model: the code would be gone under the task.
    for revert in [&["revert", "--all"][..], &["revert", "--all", "--model", "none"]] {
        assert_blocked(
            vmpatch.run(&with_timeout(revert)),
            &[&sleeper],
            "the new code of test_pause",
        );
        let applied = [("test_pause", "applied", vec!["patched"])];
        assert_eq!(states(&vmpatch.status()), applied);
        assert_eq!(see(&guest, "pause"), Seen::Fixed);
    }
    assert_eq!(sleeper.wake(&guest), Seen::Fixed);
    vmpatch.run(&with_timeout(&["revert", "--all"])).expect(0);
    assert_eq!(see(&guest, "pause"), Seen::Flawed);
}

#[test]
fn without_a_model_the_patch_goes_in_at_once_with_a_warning_and_the_sleeper_ends_in_the_old_function() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Pause);
    let sleeper = Sleeper::start(&guest);
    let applied = vmpatch.run(&["apply", "--json", "--model", "none", &module]).expect(0);
    let patch = &applied.json()["patches"][0];
    let warning = patch["warnings"][0].as_str().unwrap_or_default();
    assert!(warning.contains("--model none"), "{patch}");
    assert_eq!(patch["model"], "none");
    assert_eq!(patch["pause"]["tries"], 1);
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    assert_eq!(sleeper.wake(&guest), Seen::Flawed);
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(see(&guest, "pause"), Seen::Flawed);
}

#[test]
fn with_nobody_inside_a_patch_goes_in_and_out_at_the_first_try() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let applied = vmpatch.apply(&MODULES.applied(Applied::Pause));
    assert_eq!(applied["patches"][0]["pause"]["tries"], 1, "{applied}");
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    let reverted = vmpatch.revert_all();
    assert_eq!(reverted["patches"][0]["pause"]["tries"], 1, "{reverted}");
    assert_eq!(see(&guest, "pause"), Seen::Flawed);
}

/// Patches and reverts while every vCPU, and one task more than there are, is at that work.
fn works_beside(work: &str) {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let module = MODULES.applied(Applied::Pause);
    let busy: Vec<_> = (0..=guest.config().vcpus)
        .map(|_| guest.spawn(&["sh", "-c", work]).expect("the guest runs a shell"))
        .collect();
    for _ in 0..3 {
        vmpatch.apply(&module);
        assert_eq!(see(&guest, "pause"), Seen::Fixed);
        vmpatch.revert_all();
        assert_eq!(see(&guest, "pause"), Seen::Flawed);
    }
    for running in &busy {
        assert_eq!(running.status().unwrap(), None, "the work goes on");
        running.kill().unwrap();
    }
}

#[test]
fn a_guest_whose_vcpus_are_all_busy_in_user_mode_is_patched_and_reverted() {
    works_beside("while :; do :; done");
}

#[test]
fn a_guest_whose_vcpus_are_all_busy_in_the_kernel_is_patched_and_reverted() {
    works_beside("exec dd if=/dev/zero of=/dev/null bs=1M");
}

#[test]
fn a_guest_whose_vcpus_make_and_end_processes_all_the_time_is_patched_and_reverted() {
    works_beside("while :; do /bin/true; done");
}

#[test]
fn a_guest_that_its_operator_has_paused_is_patched_and_stays_paused() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let module = MODULES.applied(Applied::Pause);
    let sleeper = Sleeper::start(&guest);
    monitor.stop();
    assert_blocked(
        vmpatch.run(&with_timeout(&["apply", &module])),
        &[&sleeper],
        "__x64_sys_pause",
    );
    assert_eq!(monitor.run_state(), "paused");
    monitor.cont();
    assert_eq!(sleeper.wake(&guest), Seen::Flawed);

    monitor.stop();
    vmpatch.apply(&module);
    assert_eq!(monitor.run_state(), "paused");
    assert_eq!(states(&vmpatch.status())[0].1, "applied");
    monitor.cont();
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    monitor.stop();
    vmpatch.revert_all();
    assert_eq!(monitor.run_state(), "paused");
    monitor.cont();
    assert_eq!(see(&guest, "pause"), Seen::Flawed);
}
