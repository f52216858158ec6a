//! Patches that replace all others, in one pause; and patches of one function on top of each other.

use std::fs;
use std::time::{Duration, SystemTime};

use e2e::bed::{self, Lent, assert_healthy};
use e2e::cut::{Call, Side, run_to};
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, ask, see};
use e2e::processes;
use e2e::report::states;
use e2e::sleeper::Sleeper;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// The program that tells the version.
const PROGRAM: &str = "version";
/// Replacements under load.
const CYCLES: u32 = 60;
/// How long the program may take to start and to end on a guest that is all busy.
const PROGRAM_LIMIT: Duration = Duration::from_secs(30);

fn guest() -> (Lent, Modules) {
    let kernel = Kernel::CLOUD_6_1;
    let modules = Modules::of(&kernel);
    (bed::lend(kit::guest(kernel)), modules)
}

fn version(guest: &Guest) -> String {
    ask(guest, PROGRAM).1
}

fn names(report: &Value) -> Vec<(&str, &str)> {
    states(report).into_iter().map(|(id, state, _)| (id, state)).collect()
}

/// A program that calls the function in a loop on all vCPUs sees no call of the kernel's own function from the first version to the last.
#[test]
fn no_call_is_unpatched_while_one_version_replaces_the_other() {
    let (guest, modules) = guest();
    let vmpatch = Vmpatch::on(&guest);
    let versions = [1, 2, 3].map(|version| modules.version(version));
    let [first, ..] = &versions;
    vmpatch.apply(first);
    assert_eq!(version(&guest), "v1, getppid replaced");
    let load = guest.spawn(&["/opt/version", "load", "2"]).unwrap();
    load.wait_for_stdout("started", PROGRAM_LIMIT).unwrap();
    let mut last = "test_v1";
    for cycle in 1..=CYCLES {
        let number = cycle % 3 + 1;
        let module = &versions[usize::try_from(number).unwrap() - 1];
        let applied = vmpatch
            .run(&["--timeout", "60", "--json", "apply", module])
            .expect(0)
            .json();
        assert_eq!(applied["patches"][0]["replaces"], json!([last]), "{applied}");
        let warnings = applied["patches"][0]["warnings"].to_string();
        assert!(!warnings.contains("still in the guest"), "{applied}");
        last = ["test_v1", "test_v2", "test_v3"][usize::try_from(number).unwrap() - 1];
        assert_eq!(names(&vmpatch.status()), [(last, "applied")]);
    }
    guest.text(&["kill", &load.pid().to_string()]).unwrap();
    let output = load.wait(PROGRAM_LIMIT).unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{CYCLES} replacements: {said}");
    let words: Vec<&str> = said.lines().last().unwrap_or_default().split(' ').collect();
    let ["v0", "0", "v1", one, "v2", two, "v3", three, "lost", "0"] = words[..] else {
        panic!("{said}");
    };
    assert!(
        [one, two, three]
            .iter()
            .all(|calls| calls.parse::<u64>().unwrap() > 100),
        "{said}"
    );
    // What only the first version carries has the kernel's code again.
    vmpatch.apply(first);
    assert_eq!(version(&guest), "v1, getppid replaced");
    vmpatch.apply(&modules.version(2));
    assert_eq!(version(&guest), "v2, getppid own");
    let reverted = vmpatch.revert_all();
    assert_eq!(names(&reverted), [("test_v2", "reverted")]);
    assert_eq!(version(&guest), "v0, getppid own");
    assert_eq!(vmpatch.inspect()["registry"], Value::Null);
    Ftrace::of(&guest).assert_alive();
    assert_healthy(&guest);
}

/// The bare command takes the newest one that replaces all others, and leaves the older ones out.
#[test]
fn one_bare_command_brings_a_guest_from_one_version_to_the_next() {
    let (guest, modules) = guest();
    let vmpatch = Vmpatch::on(&guest);
    let folder = std::env::temp_dir().join(format!("vmpatch-replace-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let put = |number: u32| {
        let path = folder.join(format!("test-v{number}.ko"));
        fs::copy(modules.version(number), &path).unwrap();
        let age = Duration::from_secs(u64::from(100 - number));
        fs::File::open(&path)
            .unwrap()
            .set_modified(SystemTime::now() - age)
            .unwrap();
    };
    let bare = || {
        let answer = vmpatch.run(&["--json", "--patches", folder.to_str().unwrap()]);
        answer.expect(0).json()
    };
    put(1);
    assert_eq!(names(&bare()), [("test_v1", "applied")]);
    put(2);
    for state in ["applied", "already applied"] {
        assert_eq!(names(&bare()), [("test_v2", state), ("test-v1", "superseded")]);
        assert_eq!(version(&guest), "v2, getppid own");
    }
    fs::remove_dir_all(&folder).unwrap();
    vmpatch.revert_all();
}

/// vmpatch is killed in the pause, or behind the first write of code: its supervisor leaves one of the two in force, and the same command works.
#[test]
fn a_killed_replacement_leaves_one_of_the_two_in_force() {
    let (guest, modules) = guest();
    let vmpatch = Vmpatch::on(&guest);
    let mut monitor = Monitor::second(&guest);
    let (one, two) = (modules.version(1), modules.version(2));
    for (call, side) in [
        (Call::Watch, Side::Behind),
        (Call::Pause, Side::Behind),
        (Call::WriteMemory, Side::Before),
        (Call::WriteMemory, Side::Behind),
        (Call::Resume, Side::Before),
        (Call::Resume, Side::Behind),
    ] {
        vmpatch.apply(&one);
        let args = ["apply", two.as_str()];
        let child = vmpatch.start(&args);
        run_to(&child, call, 1, side);
        processes::kill(child.id(), Signal::SIGKILL);
        let killed = vmpatch.finish(&args, child);
        assert_eq!(killed.code, None, "{killed}");
        // The next command waits for the supervisor.
        let applied = vmpatch.run(&["--json", "apply", &two]).expect(0).json();
        let state = applied["patches"][0]["state"].as_str().unwrap().to_owned();
        println!("killed at {call:?}, {side:?}: then {state}");
        assert_eq!(monitor.run_state(), "running");
        assert_eq!(names(&vmpatch.status()), [("test_v2", "applied")]);
        assert_eq!(version(&guest), "v2, getppid own");
        vmpatch.revert_all();
        assert_eq!(version(&guest), "v0, getppid own");
    }
    assert_healthy(&guest);
}

/// A later patch takes a function; the earlier one has it again when that is reverted. A task in the earlier one's code is in an old function.
#[test]
fn a_later_patch_takes_a_function_and_gives_it_back() {
    let (guest, modules) = guest();
    let vmpatch = Vmpatch::on(&guest);
    let [one, two] = [Applied::Faults, Applied::Printk].map(|module| modules.applied(module));
    vmpatch.apply(&one);
    assert_eq!(see(&guest, "faults"), Seen::Fixed);
    for command in ["check", "apply"] {
        let said = vmpatch.run(&["--json", command, &two]).expect(0).json();
        let warnings = said["patches"][0]["warnings"].to_string();
        assert!(
            warnings.contains("__x64_sys_sysinfo of test_faults is overridden"),
            "{said}"
        );
    }
    assert_eq!(see(&guest, "printk"), Seen::Fixed);
    let status = vmpatch.status();
    assert_eq!(
        states(&status),
        [
            ("test_faults", "applied", vec!["overridden"]),
            ("test_printk", "applied", vec!["patched"])
        ]
    );
    assert_eq!(status["patches"][0]["functions"][0]["overridden_by"], "test_printk");
    let refused = vmpatch.run(&["revert", "test_faults"]).expect(3);
    assert!(refused.complaint().contains("revert test_printk first"), "{refused}");
    vmpatch.run(&["revert", "test_printk"]).expect(0);
    assert_eq!(see(&guest, "faults"), Seen::Fixed);
    vmpatch.apply(&two);
    // Both, the later one first.
    let reverted = vmpatch.revert_all();
    assert_eq!(
        names(&reverted),
        [("test_printk", "reverted"), ("test_faults", "reverted")]
    );

    vmpatch.apply(&modules.applied(Applied::Pause));
    let sleeper = Sleeper::start(&guest);
    let static_call = modules.applied(Applied::StaticCall);
    let blocked = vmpatch.run(&["--timeout", "0.5", "apply", &static_call]).expect(4);
    assert!(blocked.complaint().contains("livepatch_pause"), "{blocked}");
    sleeper.wake(&guest);
    vmpatch.apply(&static_call);
    assert_eq!(see(&guest, "pause"), Seen::Fixed);
    vmpatch.revert_all();
    assert_healthy(&guest);
}

/// kpatch-build's own init, out of Debian's package, sets the flag.
#[test]
fn a_module_of_kpatch_build_replaces_all_others() {
    let (guest, modules) = guest();
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&modules.applied(Applied::Kstrtoint));
    assert_eq!(see(&guest, "kstrtoint"), Seen::Fixed);
    let module = modules.kpatch_hook();
    let checked = vmpatch.run(&["--json", "check", &module]).expect(0).json();
    assert_eq!(
        checked["patches"][0]["replaces"],
        json!(["test_kstrtoint"]),
        "{checked}"
    );
    vmpatch.apply(&module);
    assert_eq!(names(&vmpatch.status()), [("test_kpatch_hook", "applied")]);
    assert_eq!(see(&guest, "kstrtoint"), Seen::Flawed);
    assert_eq!(see(&guest, Applied::Kpatch.program()), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(see(&guest, Applied::Kpatch.program()), Seen::Flawed);
}
