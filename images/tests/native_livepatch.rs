//! The modules that tests apply from outside are right: the guest's own livepatch takes them, and the programs see them.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use images::build::hand_written::Applied;
use images::build::{Cve, KernelTree, Module, programs};
use images::cache::Cache;
use images::guest::{Guest, GuestConfig};
use images::kernel::Kernel;

/// A livepatch of two idle vCPUs takes two seconds; this is for a busy machine.
const TRANSITION_LIMIT: Duration = Duration::from_secs(120);
const FIXED: Option<i32> = Some(0);
const FLAWED: Option<i32> = Some(1);

/// Boots a guest with all programs in `/opt/tests`.
fn guest(kernel: Kernel) -> Guest {
    let folder = programs::build(&Cache::from_env().unwrap()).unwrap();
    let mut config = GuestConfig::new(kernel);
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        config = config.file(&format!("/opt/tests/{name}"), path);
    }
    Guest::boot(config).unwrap()
}

/// The modules that the guest's own livepatch takes, too: their functions have ftrace sites, and they stand in standard form.
const NATIVE: [Applied; 5] = [
    Applied::Pause,
    Applied::Symbols,
    Applied::Sections,
    Applied::Printk,
    Applied::Faults,
];

/// Runs a test program; its exit status and its line.
fn run(guest: &Guest, program: &str) -> (Option<i32>, String) {
    let output = guest.run(&[&format!("/opt/tests/{program}")]).unwrap();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

/// Waits until every task runs what the livepatches in the guest say.
fn wait_for_transition(guest: &Guest) {
    let start = Instant::now();
    let in_transition = ["sh", "-c", "grep -q 1 /sys/kernel/livepatch/*/transition"];
    while guest.run(&in_transition).unwrap().status.success() {
        assert!(start.elapsed() < TRANSITION_LIMIT, "a livepatch stays in transition");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Loads a livepatch module in the guest.
fn load(guest: &Guest, module: &Path) -> Result<(), String> {
    guest
        .push("/tmp/module.ko", &std::fs::read(module).unwrap(), 0o644)
        .unwrap();
    let output = guest.run(&["insmod", "/tmp/module.ko"]).unwrap();
    if !output.status.success() {
        return Err(String::from_utf8(output.stderr).unwrap());
    }
    wait_for_transition(guest);
    Ok(())
}

fn shows_its_effect(guest: &Guest, program: &str, module: &Path) {
    let (status, line) = run(guest, program);
    assert_eq!(status, FLAWED, "{program} before: {line}");
    load(guest, module).unwrap();
    let (status, line) = run(guest, program);
    assert_eq!(status, FIXED, "{program} after: {line}");
}

fn every_module_shows_its_effect(kernel: Kernel) {
    let tree = kernel.headers().unwrap();
    let guest = guest(kernel);
    for cve in Cve::ALL.into_iter().filter(|cve| cve.concerns(tree.release())) {
        shows_its_effect(&guest, cve.program(), &cve.module(&tree).unwrap());
    }
    // One module for each program: they stay loaded, and a later one's effect would not be told from an earlier one's.
    for module in NATIVE {
        shows_its_effect(&guest, module.program(), &module.build(&tree).unwrap());
    }
    let log = guest.text(&["dmesg"]).unwrap();
    assert!(log.contains("vmpatch test: sysinfo of printk"), "{log}");

    // The guest's own livepatch needs an ftrace site.
    let (status, line) = run(&guest, "kstrtoint");
    assert_eq!(status, FLAWED, "{line}");
    assert!(load(&guest, &Applied::Kstrtoint.build(&tree).unwrap()).is_err());
    guest.shutdown().unwrap();
}

/// The module pair for the guest's own livepatch, which needs an ftrace site: the system call's entry has one.
fn native_pair() -> String {
    let entry = "static long livepatch_entry(const struct pt_regs *regs)\n\
                 {\n\treturn livepatch_sysinfo((struct sysinfo __user *)regs->di);\n}\n\n\
                 LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_entry),";
    let text = include_str!("../modules/pair.c");
    let native = text.replace("LIVEPATCH(PATCH(__do_sys_sysinfo, livepatch_sysinfo),", entry);
    assert_ne!(native, text);
    native
}

/// That with one of its two functions only.
fn half_a_pair(name: &str, left_out: &str, tree: &KernelTree) -> PathBuf {
    let whole = native_pair();
    let half = whole.replace(left_out, "");
    assert_ne!(half, whole);
    let half = half
        .replace("static long livepatch", "static long __used livepatch")
        .replace("static void livepatch", "static void __used livepatch");
    Module::new(name).source(name, half).build(tree).unwrap()
}

#[test]
fn the_program_pair_notices_a_new_function_beside_an_old_one() {
    let tree = Kernel::CLOUD_6_1.headers().unwrap();
    let guest = guest(Kernel::CLOUD_6_1);
    let halves = [
        (
            "callee",
            "PATCH(__x64_sys_sysinfo, livepatch_entry),",
            "of the caller 0",
        ),
        (
            "caller",
            ",\n\t  PATCH(si_meminfo, livepatch_si_meminfo)",
            "old callees 1,",
        ),
    ];
    for (name, left_out, found) in halves {
        load(&guest, &half_a_pair(name, left_out, &tree)).unwrap();
        let (status, line) = run(&guest, "pair");
        assert_eq!(status, Some(2), "{name}: {line}");
        assert!(line.starts_with("mixed: ") && line.contains(found), "{name}: {line}");
        guest
            .text(&["sh", "-c", "echo 0 >/sys/kernel/livepatch/$0/enabled", name])
            .unwrap();
        wait_for_transition(&guest);
    }

    let load_program = guest.spawn(&["/opt/tests/pair", "load", "0", "2"]).unwrap();
    load_program
        .wait_for_stdout("started", Duration::from_secs(10))
        .unwrap();
    let whole = Module::new("pair").source("pair", native_pair()).build(&tree).unwrap();
    load(&guest, &whole).unwrap();
    guest.text(&["sleep", "1"]).unwrap();
    guest.text(&["kill", &load_program.pid().to_string()]).unwrap();
    let output = load_program.wait(Duration::from_secs(10)).unwrap();
    let line = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && line.ends_with(" mixed 0 lost 0\n"), "{line}");
    assert!(!line.contains("old 0 ") && !line.contains("new 0 "), "{line}");
    guest.shutdown().unwrap();
}

#[test]
fn every_module_shows_its_effect_in_a_6_1_guest() {
    every_module_shows_its_effect(Kernel::CLOUD_6_1);
}

#[test]
fn every_module_shows_its_effect_in_a_6_12_guest() {
    every_module_shows_its_effect(Kernel::CLOUD_6_12);
}
