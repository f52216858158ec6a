//! Pausing real guests: firmware only, which is idle or not yet started.

mod common;

use common::{PATIENCE, Qemu, TempDir};
use guest_core::{Gpa, Registers};
use qmp::machine::StubOpenError;
use qmp::{Backing, Machine, PauseError, Paused, RamRegion, RunState};
use serde_json::{Value, json};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::time::Duration;

/// How long a QEMU that goes silent is waited for. One on a busy host must answer QMP commands within it.
const REPLY_TIMEOUT: Duration = Duration::from_secs(1);
const MEMFD: [&str; 4] = [
    "-M",
    "q35,memory-backend=m0",
    "-object",
    "memory-backend-memfd,id=m0,size=64M",
];

fn attach(qemu: &Qemu) -> Machine {
    Machine::attach(&qemu.qmp(), PATIENCE).unwrap()
}

/// What both sources tell: `info registers` has no KERNEL_GS_BASE, the stub no IDT, and flags differ under TCG.
fn comparable(state: &Registers) -> Registers {
    Registers {
        kernel_gs_base: None,
        idt_base: None,
        rflags: 0,
        ..*state
    }
}

#[test]
fn registers_of_every_vcpu_are_those_that_qemu_prints() {
    for vcpus in [1, 2, 4, 40] {
        let qemu = Qemu::start(&["-M", "q35", "-smp", &vcpus.to_string()]);
        let mut machine = attach(&qemu);
        for _ in 0..2 {
            let paused = machine.pause().unwrap();
            let printed: Vec<_> = paused.machine().cpu_states().unwrap().iter().map(comparable).collect();
            assert_eq!(paused.registers().iter().map(comparable).collect::<Vec<_>>(), printed);
            assert_eq!(printed.len(), vcpus);
            assert!(paused.registers().iter().all(|state| state.kernel_gs_base.is_some()));
            paused.resume().unwrap();
        }
    }
}

#[test]
fn a_running_guest_runs_again_after_resume_and_after_drop() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    let paused = machine.pause().unwrap();
    assert_eq!(paused.machine().run_state().unwrap(), RunState::Paused);
    let times = paused.resume().unwrap();
    assert!(
        !times.left_paused && times.total_us >= times.stop_us + times.registers_us + times.resume_us,
        "{times:?}"
    );
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
    drop(machine.pause().unwrap());
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _paused = machine.pause().unwrap();
        panic!("a bug in the caller");
    }));
    assert!(unwound.is_err());
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
}

#[test]
fn a_guest_paused_by_its_operator_stays_paused() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    machine.block_on(machine.client().execute(qapi::qmp::stop {})).unwrap();
    let mut paused = machine.pause().unwrap();
    paused.write(&[(Gpa(0x20_0000), b"x")]).unwrap();
    assert!(paused.resume().unwrap().left_paused);
    assert_eq!(machine.run_state().unwrap(), RunState::Paused);
    drop(machine.pause().unwrap());
    drop(machine);
    assert_eq!(attach(&qemu).run_state().unwrap(), RunState::Paused);
}

#[test]
fn writes_are_in_guest_memory_while_still_paused() {
    let qemu = Qemu::start(&MEMFD);
    let mut machine = attach(&qemu);
    let map = machine.ram_map(machine.pid().unwrap()).unwrap();
    let holds = |region: &&RamRegion| region.gpa.0 <= 0x20_0000 && 0x30_0000 <= region.gpa.0 + region.len;
    let region = map.regions.iter().find(holds).unwrap();
    let Backing::Shared(file) = &region.backing else {
        panic!("{region:?}")
    };
    let memory = file.open(map.pid).unwrap();
    let at = |gpa: u64| file.offset + gpa - region.gpa.0;
    let long: Vec<u8> = (0..=250).cycle().take(100_001).collect();
    let mut paused = machine.pause().unwrap();
    paused
        .write(&[(Gpa(0x20_0001), &[0xe9, 1, 2, 3, 4]), (Gpa(0x20_1001), &long)])
        .unwrap();
    let (mut short_seen, mut long_seen, mut read) = ([0; 5], vec![0; long.len()], vec![0; long.len()]);
    memory.read_exact_at(&mut short_seen, at(0x20_0001)).unwrap();
    memory.read_exact_at(&mut long_seen, at(0x20_1001)).unwrap();
    paused.read(Gpa(0x20_1001), &mut read).unwrap();
    assert_eq!(short_seen, [0xe9, 1, 2, 3, 4]);
    assert!(long_seen == long && read == long);
    assert!(paused.resume().unwrap().writes_us > 0);
}

#[test]
fn a_write_changes_code_that_runs_and_was_translated_already() {
    // 16-bit code at 64 KiB: `inc dword [0x500]`, `jmp` back. A vCPU starts with code segment base 0xffff0000, which makes
    // 0x10000 of instruction pointer 0x20000. The write changes 0x500 to 0x600.
    let loop_at = Gpa(0x1_0000);
    let dir = TempDir::new();
    let file = dir.path().join("loop");
    std::fs::write(&file, [0x66, 0xff, 0x06, 0x00, 0x05, 0xeb, 0xf9]).unwrap();
    let code = format!("loader,file={},addr=0x10000,force-raw=on", file.display());
    let qemu = Qemu::start(&[
        "-M",
        "q35",
        "-device",
        &code,
        "-device",
        "loader,addr=0x20000,cpu-num=0",
    ]);
    let mut machine = attach(&qemu);
    let mut counters = |patch: Option<&[u8]>| {
        std::thread::sleep(Duration::from_millis(50));
        let mut paused = machine.pause().unwrap();
        let counter = |paused: &mut Paused, at| {
            let mut bytes = [0; 4];
            paused.read(Gpa(at), &mut bytes).unwrap();
            u32::from_le_bytes(bytes)
        };
        let seen = (counter(&mut paused, 0x500), counter(&mut paused, 0x600));
        if let Some(bytes) = patch {
            paused.write(&[(loop_at.checked_add(3).unwrap(), bytes)]).unwrap();
        }
        seen
    };
    let (old, new) = counters(Some(&[0x00, 0x06]));
    assert!(old > 0 && new == 0, "{old} {new}");
    let (old_after, new_after) = counters(None);
    // The vCPU may have been stopped behind its `inc`.
    assert!(
        old_after.wrapping_sub(old) <= 1 && new_after > 0,
        "{old} {old_after} {new_after}"
    );
}

#[test]
fn a_write_that_is_not_all_ram_writes_nothing() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    let mut paused = machine.pause().unwrap();
    for bad in [0xb000_0000, 0xfffc_0000, (64 << 20) - 1, u64::MAX] {
        let refused = paused.write(&[(Gpa(0x20_0000), b"ab"), (Gpa(bad), b"cd")]);
        assert!(
            matches!(refused, Err(PauseError::NotRam { at, .. }) if at == Gpa(bad)),
            "{refused:?}"
        );
    }
    let mut bytes = [0xff; 2];
    paused.read(Gpa(0x20_0000), &mut bytes).unwrap();
    assert_eq!(bytes, [0; 2]);
}

#[test]
fn a_stub_of_the_operator_is_neither_used_nor_closed() {
    let qemu = Qemu::start(&["-M", "q35", "-gdb", "tcp:127.0.0.1:0,server=on,wait=off"]);
    let mut machine = attach(&qemu);
    match machine.pause() {
        Err(PauseError::Open(StubOpenError::Foreign { at })) => assert!(at.contains("tcp:127.0.0.1"), "{at}"),
        other => panic!("{other:?}"),
    }
    drop(machine);
    assert!(chardevs(&attach(&qemu)).contains(r#""label":"gdb""#));
}

fn chardevs(machine: &Machine) -> String {
    let listed: Value = machine
        .block_on(machine.client().execute_as("query-chardev", json!({})))
        .unwrap();
    listed.to_string()
}

#[test]
fn nothing_is_left_in_qemu_or_on_disk_afterwards() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    machine.prepare_pause().unwrap();
    assert_eq!(
        machine.run_state().unwrap(),
        RunState::Running,
        "opening the stub must not pause"
    );
    let listed = chardevs(&machine);
    let (_, address) = listed.split_once("disconnected:unix:").unwrap();
    let socket = std::path::Path::new(address.split_once(',').unwrap().0);
    assert!(!socket.exists() && !socket.parent().unwrap().exists());
    drop(machine.pause().unwrap());
    drop(machine);
    assert!(!chardevs(&attach(&qemu)).contains("vmpatch"));
}

#[test]
fn a_qemu_that_gave_up_its_rights_is_handed_the_socket_instead() {
    if std::fs::metadata("/proc/self").unwrap().uid() != 0 {
        eprintln!("skipped: only root can start a QEMU that becomes another user");
        return;
    }
    // Up to QEMU 9 the option has another name.
    let qemu = Qemu::start_else(
        &["-M", "q35", "-run-with", "user=nobody"],
        &["-M", "q35", "-runas", "nobody"],
    );
    let mut machine = attach(&qemu);
    for _ in 0..2 {
        let mut paused = machine.pause().unwrap();
        paused.write(&[(Gpa(0x20_0000), b"x")]).unwrap();
        paused.resume().unwrap();
    }
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
}

#[test]
fn states_other_than_running_and_paused_are_refused_by_name() {
    let qemu = Qemu::start(&["-M", "q35", "-incoming", "defer"]);
    match attach(&qemu).pause() {
        Err(PauseError::State(state)) => assert_eq!(state.to_string(), "inmigrate"),
        other => panic!("{other:?}"),
    };
}

#[test]
fn a_guest_under_migration_is_refused() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    assert_eq!(machine.busy_with().unwrap(), None);
    // A target that accepts and never reads.
    let target = qemu.dir().join("target");
    let _listener = UnixListener::bind(&target).unwrap();
    let migrate = json!({"uri": format!("unix:{}", target.display())});
    let _: Value = machine
        .block_on(machine.client().execute_as("migrate", migrate))
        .unwrap();
    let refused = machine.pause().map(drop);
    assert!(matches!(refused, Err(PauseError::Busy(_))), "{refused:?}");
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
}

#[test]
fn a_qemu_that_goes_silent_in_the_pause_runs_its_guest_when_it_is_back() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    machine.set_reply_timeout(REPLY_TIMEOUT);
    let mut paused = machine.pause().unwrap();
    qemu.signal("STOP");
    assert!(matches!(
        paused.write(&[(Gpa(0x20_0000), b"x")]),
        Err(PauseError::Stub(_))
    ));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(2 * REPLY_TIMEOUT);
            qemu.signal("CONT");
        });
        drop(paused);
    });
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
    machine.pause().unwrap().resume().unwrap();
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
}

/// QEMU is silent while the first packets are with it, and answers again when the bytes are to be restored.
#[test]
fn after_a_write_that_failed_nothing_is_on_its_way_and_the_guest_still_stopped() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    let mut paused = fail_to_write(&qemu, &mut machine);
    let at = Gpa(0x20_0000);
    assert!(paused.write(&[(at, b"old")]).is_err());
    paused.drain().unwrap();
    paused.write(&[(at, b"old")]).unwrap();
    assert_eq!(paused.machine().run_state().unwrap(), RunState::Paused);
    let mut bytes = [0; 3];
    paused.read(at, &mut bytes).unwrap();
    assert_eq!(&bytes, b"old");
    assert!(!paused.resume().unwrap().left_paused);
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
    machine.pause().unwrap().resume().unwrap();
}

/// Pauses the guest and has a write fail by QEMU's silence, which is over then.
fn fail_to_write<'a>(qemu: &Qemu, machine: &'a mut Machine) -> Paused<'a> {
    machine.set_reply_timeout(REPLY_TIMEOUT);
    let mut paused = machine.pause().unwrap();
    qemu.signal("STOP");
    let failed = paused.write(&[(Gpa(0x20_0000), b"new")]);
    assert!(matches!(failed, Err(PauseError::Stub(_))), "{failed:?}");
    qemu.signal("CONT");
    paused
}

#[test]
fn what_was_written_is_not_taken_back_in_a_guest_that_somebody_has_let_go_on() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    let mut paused = fail_to_write(&qemu, &mut machine);
    let client = paused.machine().client();
    paused.machine().block_on(client.execute(qapi::qmp::cont {})).unwrap();
    assert!(matches!(paused.drain(), Err(PauseError::State(RunState::Running))));
    drop(paused);
    assert_eq!(machine.run_state().unwrap(), RunState::Running);
}

#[test]
fn a_guest_that_its_operator_paused_stays_so_also_where_the_stub_is_of_no_use_any_more() {
    let qemu = Qemu::start(&["-M", "q35"]);
    let mut machine = attach(&qemu);
    machine.block_on(machine.client().execute(qapi::qmp::stop {})).unwrap();
    let paused = fail_to_write(&qemu, &mut machine);
    assert!(paused.resume().unwrap().left_paused);
    assert_eq!(machine.run_state().unwrap(), RunState::Paused);
    assert!(
        !chardevs(&machine).contains("vmpatch"),
        "nothing is on its way any more"
    );
}
