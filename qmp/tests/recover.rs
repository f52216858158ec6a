//! A process killed in its pause, and another that puts things right.

mod common;

use common::{PATIENCE, Qemu};
use guest_core::Gpa;
use qmp::{Machine, RunState};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const QMP: &str = "QMP_TEST_SOCKET";
const WAITS: &str = "pauses_and_writes_until_it_is_killed";
const REPEATS: &str = "pauses_again_and_again_until_it_is_killed";
const AT: Gpa = Gpa(0x20_0000);

/// Not a test of its own: the process that is killed.
#[test]
#[ignore = "the process that the other tests kill"]
fn pauses_and_writes_until_it_is_killed() {
    let Some(socket) = std::env::var_os(QMP) else { return };
    let mut machine = Machine::attach(socket.as_ref(), PATIENCE).unwrap();
    let mut paused = machine.pause().unwrap();
    paused.write(&[(AT, b"half")]).unwrap();
    println!("\nIN PAUSE");
    std::thread::sleep(PATIENCE * 10);
}

/// Not a test of its own: the process that is killed at any instant.
#[test]
#[ignore = "the process that the other tests kill"]
fn pauses_again_and_again_until_it_is_killed() {
    let Some(socket) = std::env::var_os(QMP) else { return };
    println!("\nIN PAUSE");
    loop {
        let mut machine = Machine::attach(socket.as_ref(), PATIENCE).unwrap();
        for bytes in [b"half", b"old!"] {
            let mut paused = machine.pause().unwrap();
            paused.write(&[(AT, bytes)]).unwrap();
            paused.resume().unwrap();
        }
    }
}

fn start_victim(qemu: &Qemu, what: &str) -> Child {
    let mut victim = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", what, "--ignored", "--nocapture"])
        .env(QMP, qemu.qmp())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(victim.stdout.take().unwrap()).lines();
    assert!(lines.map_while(Result::ok).any(|line| line == "IN PAUSE"));
    victim
}

/// What the supervisor does for a process that was killed: connects anew, closes the stub that was left, writes with the vCPUs stopped, and
/// lets the guest run if it did, or if `resume` says that it did before the pause.
fn recover(qmp: &Path, writes: &[(Gpa, &[u8])], resume: bool) {
    let mut machine = Machine::attach(qmp, PATIENCE).unwrap();
    machine.close_left_stub().unwrap();
    if !writes.is_empty() {
        let mut paused = machine.pause_to_recover().unwrap();
        paused.write(writes).unwrap();
        paused.resume().unwrap();
    }
    if resume && machine.run_state().unwrap() == RunState::Paused {
        machine.block_on(machine.client().execute(qapi::qmp::cont {})).unwrap();
    }
}

fn state_and_bytes(qemu: &Qemu) -> (RunState, [u8; 4]) {
    let mut machine = Machine::attach(&qemu.qmp(), PATIENCE).unwrap();
    let state = machine.run_state().unwrap();
    let mut bytes = [0; 4];
    machine.pause().unwrap().read(AT, &mut bytes).unwrap();
    (state, bytes)
}

#[test]
fn a_guest_left_paused_by_a_killed_process_is_undone_and_runs() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut victim = start_victim(&qemu, WAITS);
    victim.kill().unwrap();
    victim.wait().unwrap();
    recover(&qemu.qmp(), &[(AT, b"old!")], true);
    assert_eq!(state_and_bytes(&qemu), (RunState::Running, *b"old!"));
}

#[test]
fn without_resume_the_guest_is_undone_and_stays_paused() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut victim = start_victim(&qemu, WAITS);
    victim.kill().unwrap();
    victim.wait().unwrap();
    recover(&qemu.qmp(), &[(AT, b"old!")], false);
    assert_eq!(state_and_bytes(&qemu), (RunState::Paused, *b"old!"));
}

#[test]
fn a_guest_that_runs_is_written_and_runs_on() {
    let qemu = Qemu::start(&["-M", "q35"]);
    recover(&qemu.qmp(), &[(AT, b"old!")], true);
    recover(&qemu.qmp(), &[], true);
    assert_eq!(state_and_bytes(&qemu), (RunState::Running, *b"old!"));
}

#[test]
fn killed_at_any_instant_the_guest_is_undone_and_runs() {
    let qemu = Qemu::start(&["-M", "q35"]);
    for instant in 0..30 {
        let mut victim = start_victim(&qemu, REPEATS);
        std::thread::sleep(Duration::from_micros(instant * 700));
        victim.kill().unwrap();
        victim.wait().unwrap();
        recover(&qemu.qmp(), &[(AT, b"old!")], true);
        assert_eq!(
            state_and_bytes(&qemu),
            (RunState::Running, *b"old!"),
            "instant {instant}"
        );
    }
}

#[test]
fn half_a_change_is_undone_while_a_migration_is_under_way() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut victim = start_victim(&qemu, WAITS);
    victim.kill().unwrap();
    victim.wait().unwrap();
    let machine = Machine::attach(&qemu.qmp(), PATIENCE).unwrap();
    let migrate = serde_json::json!({ "uri": "exec:sleep 60" });
    machine
        .block_on(machine.client().execute_as::<serde_json::Value>("migrate", migrate))
        .unwrap();
    assert!(machine.busy_with().unwrap().is_some());
    drop(machine);
    recover(&qemu.qmp(), &[(AT, b"old!")], true);
    let mut machine = Machine::attach(&qemu.qmp(), PATIENCE).unwrap();
    let mut bytes = [0; 4];
    machine.pause_to_recover().unwrap().read(AT, &mut bytes).unwrap();
    assert_eq!(bytes, *b"old!");
}
