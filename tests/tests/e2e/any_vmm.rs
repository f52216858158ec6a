//! Patching guests whose program is not QEMU, and that have no monitor: `--pid`.

use std::path::Path;

use e2e::killing::Command;
use e2e::other_vmm::{Files, OtherVmm, STEPS, SUPERVISOR_STEP};
use e2e::probe::Seen;
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::host_box::HostBox;
use images::kernel::Kernel;

const SMALL_VMM: &str = env!("CARGO_BIN_EXE_small-vmm");
const IN_BOX: &str = env!("CARGO_BIN_EXE_in-box");
/// RAM of the guest, MiB, and as the host shows it.
const MEMORY_MIB: &str = "256";
const MEMORY: u64 = 256 << 20;
/// Cycles of apply and revert.
const CYCLES: usize = 3;

fn start<'a>(host: &'a HostBox, files: &Files, more: &[&str]) -> OtherVmm<'a> {
    let [kernel, initrd] = [&files.kernel, &files.initrd].map(|path| path.to_string_lossy());
    let line = Files::command_line();
    let words = [&[&*kernel, &*initrd, &line, "--memory-mib", MEMORY_MIB], more].concat();
    OtherVmm::start(host, Path::new(IN_BOX), files, Path::new(SMALL_VMM), &words)
}

/// Lengths of the mappings of at least a MiB that the process can write, by `/proc/PID/maps`.
fn mapped(maps: &str) -> Vec<u64> {
    let len = |line: &str| {
        let (range, rest) = line.split_once(' ')?;
        let (start, end) = range.split_once('-')?;
        let [start, end] = [start, end].map(|text| u64::from_str_radix(text, 16).ok());
        rest.starts_with("rw").then_some(end? - start?)
    };
    maps.lines().filter_map(len).filter(|len| *len >= 1 << 20).collect()
}

#[test]
fn a_guest_of_another_program_is_patched_and_reverted_without_a_monitor() {
    let host = HostBox::start().unwrap_or_else(|error| panic!("{error}"));
    let files = Files::place(&host, Kernel::GENERIC_6_1);
    let guest = start(&host, &files, &["--vcpus", "2"]);
    let pid = guest.pid().to_string();
    assert!(
        guest.console().contains("Hypervisor detected: KVM"),
        "{}",
        guest.console()
    );
    // All of the RAM is one line, in which the guest's addresses are in the wrong order.
    let mappings = mapped(&guest.maps());
    assert!(mappings.iter().any(|len| *len >= MEMORY), "{mappings:?}");

    let domains = guest.vmpatch.run_bare(&["domains", "--json"]).expect(0).json();
    let error = domains[0]["error"].as_str().unwrap_or_default();
    assert_eq!(
        (&domains[0]["pid"], &domains[0]["program"]),
        (&guest.pid().into(), &"small-vmm".into())
    );
    assert!(
        error.contains(&format!("2 vCPUs, to be reached by --pid {pid}")),
        "{domains}"
    );

    let inspected = guest.vmpatch.inspect();
    assert_eq!(
        (&inspected["vcpus"], &inspected["accelerator"]),
        (&2.into(), &"kvm".into())
    );
    assert!(inspected["ram"].as_u64().unwrap() >= MEMORY, "{inspected}");
    assert_eq!(guest.see(), Seen::Flawed);
    for cycle in 0..CYCLES {
        println!("cycle {cycle}: paused for {:?} µs", guest.cycle());
    }
    let applied = guest.vmpatch.apply(&guest.module);
    assert_eq!(states(&guest.vmpatch.status()), states(&applied));

    // What can't be is refused by name.
    let refused = guest.vmpatch.run(&["revert", "--all", "--pause", "qmp"]).expect(3);
    assert!(refused.complaint().contains("QEMU's monitor"), "{refused}");
    let upgrade = ["upgrade", "--qemu", "/usr/bin/qemu-system-x86_64", "--check"];
    let refused = guest.vmpatch.run(&upgrade).expect(3);
    assert!(
        refused
            .stderr
            .contains("only a guest that is reached by a QMP socket can be moved"),
        "{refused}"
    );
    let refused = Vmpatch::process(&host, 1).run(&["status"]).expect(3);
    assert!(refused.complaint().contains("process 1 has no VM of KVM"), "{refused}");
    guest.vmpatch.revert_all();
    assert_eq!(guest.see(), Seen::Flawed);
}

#[test]
fn vmpatch_killed_in_the_pause_of_a_guest_in_shared_memory_leaves_it_running_and_whole() {
    let host = HostBox::start().unwrap_or_else(|error| panic!("{error}"));
    let files = Files::place(&host, Kernel::GENERIC_6_1);
    let guest = start(&host, &files, &["--shared"]);
    assert!(guest.maps().contains("/memfd:small-vmm-ram"));
    println!("paused for {:?} µs", guest.cycle());
    // In turn: a patch that is applied is not applied again.
    let steps = STEPS.map(|step| (step, false));
    for (step, supervisor) in steps.into_iter().chain([(SUPERVISOR_STEP, true)]) {
        for command in [Command::Apply, Command::Revert] {
            guest.cut_and_repeat(command, step, supervisor);
        }
    }
}
