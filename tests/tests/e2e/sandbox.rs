//! The process that reads a guest has no rights, and its end harms no guest.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use e2e::cut::{Call, Side, let_go, run_to};
use e2e::killing::{Command, Stage, Victim, When, readers};
use e2e::probe::Seen;
use images::kernel::Kernel;

/// Kills within the pause, after the guest has stopped, in microseconds.
const IN_PAUSE_US: [u64; 5] = [0, 100, 300, 600, 1200];
/// Kills spread over the time of one command.
const SPREAD: u32 = 6;
/// Nobody, whom the reader of a guest becomes whose QEMU is root's.
const NOBODY: &str = "65534";

/// What /proc/PID/status says.
fn status(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("it lives");
    let lines = text.lines().filter_map(|line| line.split_once(":\t"));
    lines.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// What its descriptors above standard error lead to.
fn descriptors(pid: u32) -> Vec<PathBuf> {
    let folder = fs::read_dir(format!("/proc/{pid}/fd")).expect("it lives").flatten();
    let above = folder.filter(|entry| {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok());
        number.is_some_and(|number| number > 2)
    });
    above
        .map(|entry| fs::read_link(entry.path()).expect("it is open"))
        .collect()
}

#[test]
fn the_process_that_reads_the_guest_has_no_rights_and_no_way_to_qemu() {
    let mut stage = Stage::new(Kernel::CLOUD_6_1);
    let args = [&stage.args(Command::Apply)[..], &["--sandbox", "require"]].concat();
    let child = stage.vmpatch.start(&args);
    run_to(&child, Call::Pause, 1, Side::Before);
    let [reader] = readers(&child)[..] else {
        panic!("{:?}", readers(&child));
    };
    let (own, reader_status, open) = (status(child.id()), status(reader), descriptors(reader));
    let_go(&child);
    stage.vmpatch.finish(&args, child).expect(0);

    assert_eq!(
        (&*own["Seccomp"], &*own["NoNewPrivs"]),
        ("0", "0"),
        "who asks QEMU keeps its rights"
    );
    let qemu = status(stage.guest.pid())["Uid"].clone();
    let user = qemu
        .split('\t')
        .nth(1)
        .map(|user| if user == "0" { NOBODY } else { user });
    for name in ["Uid", "Gid"] {
        let all: Vec<_> = reader_status[name].split('\t').map(Some).collect();
        assert_eq!(all, [user; 4], "{name}");
    }
    assert_eq!((&*reader_status["Seccomp"], &*reader_status["NoNewPrivs"]), ("2", "1"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(reader_status[set], "0".repeat(16), "{set}");
    }
    assert_eq!(reader_status["Groups"].trim(), "");
    // The guest's RAM, and the way to the other process.
    let is_ram = |path: &&PathBuf| path.ends_with("mem") || path.to_string_lossy().contains("memfd:");
    let (ram, others): (Vec<_>, Vec<_>) = open.iter().partition(is_ram);
    assert!(!ram.is_empty(), "{open:?}");
    assert_eq!(others.len(), 1, "{open:?}");
    assert!(others[0].to_string_lossy().starts_with("socket:"), "{open:?}");
    stage.run(Command::Revert);
    assert_eq!(stage.look("at the end"), Seen::Flawed);
}

#[test]
fn a_reader_killed_at_any_instant_leaves_the_guest_running_and_wholly_old_or_wholly_new() {
    let mut stage = Stage::new(Kernel::CLOUD_6_1);
    let took = stage.measure(Command::Apply);
    let even = (0..SPREAD).map(|step| When::After(took * step / SPREAD));
    let paused = IN_PAUSE_US.map(|us| When::InPause(Duration::from_micros(us)));
    let mut killed = 0;
    for when in even.chain(paused) {
        for command in [Command::Apply, Command::Revert] {
            let answer = stage.cut(command, when, Victim::Reader);
            let context = format!("{command:?} {when:?}: {answer}");
            let seen = stage.look(&context);
            match answer.code {
                Some(0) => assert_eq!(seen, command.aim(), "{context}"),
                Some(1) => assert_eq!(seen, command.start(), "{context}"),
                Some(6) => assert!(answer.stderr.contains("has ended: SIGKILL"), "{context}"),
                _ => panic!("{context}"),
            }
            killed += u32::from(answer.code != Some(0));
            if seen != command.aim() {
                stage.run(command);
            }
            assert_eq!(stage.look(&context), command.aim(), "{context}: once more");
        }
    }
    println!("{killed} of {} were killed before their end", 2 * (SPREAD + 5));
    assert!(killed >= 8, "most kills must hit: {killed}");
}
