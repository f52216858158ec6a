//! vmpatch killed at any instant: the guest runs on, wholly old or wholly new, and the next command works.

use std::time::Duration;

use e2e::bed::assert_healthy;
use e2e::killing::{Command, PROGRAM, Stage, Victim, When, supervisors};
use e2e::probe::{Seen, see};
use e2e::ram::{KernelPlace, Ram};
use images::kernel::Kernel;
use serde_json::{Value, json};

/// Kills spread evenly over the time of one command.
const SPREAD: u32 = 18;
/// Kills within the pause of one command: after the guest has stopped, in microseconds.
const IN_PAUSE_US: [u64; 7] = [0, 50, 100, 200, 400, 800, 1600];

fn stage() -> Stage {
    Stage::new(Kernel::CLOUD_6_1)
}

/// What vmpatch must leave as it was in the guest: text and read-only data, page tables, ftrace records.
type Traces = (Vec<u8>, std::collections::BTreeMap<u64, Vec<u64>>, Vec<u8>);

fn traces(stage: &mut Stage, place: &KernelPlace) -> Traces {
    stage.monitor.stop();
    let ram = Ram::save(&stage.guest, &mut stage.monitor).expect("QEMU saves the guest's memory");
    stage.monitor.cont();
    (place.image(&ram), place.page_tables(&ram), place.ftrace_records(&ram))
}

/// Does all that is given; afterwards there is no trace of it, in the guest, in QEMU, and on the host.
fn without_a_trace(work: impl FnOnce(&mut Stage)) {
    let mut stage = stage();
    assert_eq!(see(&stage.guest, PROGRAM), Seen::Flawed);
    let place = KernelPlace::of(&stage.guest, &stage.vmpatch.inspect());
    let before = traces(&mut stage, &place);
    work(&mut stage);
    stage.vmpatch.revert_all();
    assert_eq!(stage.look("at the end"), Seen::Flawed);
    assert_eq!(stage.vmpatch.inspect()["registry"], Value::Null);
    let after = traces(&mut stage, &place);
    assert!(
        before.0 == after.0,
        "the kernel's text and read-only data are as before"
    );
    assert!(before.1 == after.1, "its page tables are as before");
    assert!(before.2 == after.2, "its ftrace records are as before");
    let devices = stage
        .monitor
        .call("query-chardev", json!({}))
        .expect("QEMU lists its devices");
    assert!(!devices.to_string().contains("vmpatch-gdb"), "{devices}");
    assert_eq!(supervisors(&stage.guest.qmp_path()), [0; 0]);
    assert_healthy(&stage.guest);
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
    without_a_trace(|stage| {
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
    without_a_trace(|stage| {
        let times = [Command::Apply, Command::Revert].map(|command| stage.measure(command));
        let killed = kill_at(stage, &instants(times, 4, &[0, 300]), Victim::ForegroundGroup);
        assert!(killed >= 4, "{killed}");
    });
}

#[test]
fn a_vmpatch_whose_supervisor_is_killed_says_what_the_guest_is_like() {
    without_a_trace(|stage| {
        let times = [Command::Apply, Command::Revert].map(|command| stage.measure(command));
        let killed = kill_at(stage, &instants(times, 6, &[0, 300]), Victim::Supervisor);
        assert_eq!(killed, 0, "the worker itself is not killed");
    });
}

#[test]
fn a_supervisor_outlives_the_signals_that_end_a_whole_service() {
    without_a_trace(|stage| {
        let in_pause = |us| [When::InPause(Duration::from_micros(us)); 2];
        let killed = kill_at(stage, &[in_pause(0), in_pause(300)], Victim::Service);
        assert_eq!(killed, 4);
    });
}

/// Nobody is left to let the guest run, and nobody can tell such a pause from an operator's; but nothing is lost.
#[test]
fn both_killed_in_the_pause_may_leave_the_guest_paused_and_the_next_command_works_as_it_does_in_a_paused_guest() {
    without_a_trace(|stage| {
        let mut paused = 0;
        for us in [0, 50, 100, 200, 300, 400, 600, 1000] {
            for command in [Command::Apply, Command::Revert] {
                let when = When::InPause(Duration::from_micros(us));
                let answer = stage.cut(command, when, Victim::Both);
                let context = format!("{command:?} {when:?}: {answer}");
                let before = stage.monitor.run_state();
                let next = stage.vmpatch.run(&stage.args(command));
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
