//! The same patch on every kind of guest: several kernels, one to four vCPUs, with and without page-table isolation, with four and five
//! levels of page tables, in private and shared RAM; each idle, busy in user mode, busy in the kernel, and paused by its operator.
//! Every value of each choice meets the kernels of the first three kinds; the others are there once.

use std::time::Duration;

use e2e::bed;
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::build::hand_written::Applied;
use images::guest::{Guest, Ram};
use images::kernel::Kernel;

/// Page-table isolation, which a kernel must be told on the emulated CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pti {
    On,
    Off,
}

/// Levels of page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Levels {
    Four,
    Five,
}

/// What all vCPUs do.
const IN_USER_MODE: &str = "while :; do :; done";
/// The zero device fills the buffer, so nearly all of it is one copy in the kernel after another.
const IN_THE_KERNEL: &str = "exec dd if=/dev/zero of=/dev/null bs=1M";
/// Under load the default of the command line may be short: each vCPU shares the host's processors with vmpatch.
const TIMEOUT_SECONDS: &str = "30";

/// Patches such a guest, whatever it does, and takes the patch back.
fn is_patched(kernel: Kernel, vcpus: u32, pti: Pti, levels: Levels, ram: Ram) {
    let modules = Modules::of(&kernel);
    let mut config = kit::guest(kernel).vcpus(vcpus).ram(ram);
    config = config.append(if pti == Pti::On { "pti=on" } else { "pti=off" });
    if levels == Levels::Four {
        config = config.append("no5lvl");
    }
    let guest = bed::lend(config);
    is_the_guest_that_was_asked_for(&guest, pti, levels);

    for module in [
        Applied::Sections,
        Applied::StaticCall,
        Applied::Kstrtoint,
        Applied::Kpatch,
        Applied::KlpBuild,
    ] {
        changes_and_changes_back(&guest, module.program(), &modules.applied(module));
    }
    resolves_symbols(&guest, &modules.applied(Applied::Symbols));
    for cve in Cve::ALL.into_iter().filter(|cve| cve.concerns(guest.kernel_release())) {
        changes_and_changes_back(&guest, cve.program(), &modules.cve(cve));
    }

    let (program, module) = (Applied::Sections.program(), modules.applied(Applied::Sections));
    for work in [IN_USER_MODE, IN_THE_KERNEL] {
        let busy: Vec<_> = (0..vcpus).map(|_| guest.spawn(&["sh", "-c", work]).unwrap()).collect();
        changes_and_changes_back(&guest, program, &module);
        for task in &busy {
            assert_eq!(task.status().unwrap(), None, "{work:?} has ended by itself");
            task.kill().unwrap();
        }
    }
    stays_paused(&guest, program, &module);
    guest.discard();
}

fn is_the_guest_that_was_asked_for(guest: &Guest, pti: Pti, levels: Levels) {
    let found = Vmpatch::on(guest).inspect();
    let levels = if levels == Levels::Four { 4 } else { 5 };
    assert_eq!(
        (&found["page_table_levels"], &found["vcpus"]),
        (&levels.into(), &guest.config().vcpus.into())
    );
    let flags = guest.text(&["grep", "-m1", "^flags", "/proc/cpuinfo"]).unwrap();
    assert_eq!(
        flags.split_whitespace().any(|flag| flag == "pti"),
        pti == Pti::On,
        "{flags}"
    );
    assert!(!guest.text(&["cat", "/proc/cmdline"]).unwrap().contains("nokaslr"));
}

fn changes_and_changes_back(guest: &Guest, program: &str, module: &str) {
    let vmpatch = Vmpatch::on(guest);
    assert_eq!(see(guest, program), Seen::Flawed);
    vmpatch.run(&["apply", "--timeout", TIMEOUT_SECONDS, module]).expect(0);
    assert_eq!(see(guest, program), Seen::Fixed);
    vmpatch
        .run(&["revert", "--all", "--timeout", TIMEOUT_SECONDS])
        .expect(0);
    assert_eq!(see(guest, program), Seen::Flawed);
}

/// The program compares with /proc/kallsyms, which tells addresses to root alone.
fn resolves_symbols(guest: &Guest, module: &str) {
    let vmpatch = Vmpatch::on(guest);
    vmpatch.apply(module);
    let compared = guest.run(&["/opt/symbols"]).unwrap();
    assert!(
        compared.status.success(),
        "{}",
        String::from_utf8_lossy(&compared.stdout)
    );
    vmpatch.revert_all();
}

fn stays_paused(guest: &Guest, program: &str, module: &str) {
    let vmpatch = Vmpatch::on(guest);
    let mut monitor = Monitor::second(guest);
    let mut while_paused = |args: &[&str], seen| {
        monitor.stop();
        vmpatch.run(args).expect(0);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(monitor.run_state(), "paused");
        monitor.cont();
        assert_eq!(see(guest, program), seen);
    };
    while_paused(&["apply", module], Seen::Fixed);
    while_paused(&["revert", "--all"], Seen::Flawed);
}

use Kernel as K;
use Levels::{Five, Four};
use Pti::{Off, On};
use Ram::{Private, SharedMemfd as Shared};

#[test]
fn a_6_1_cloud_guest_with_1_vcpu_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_6_1, 1, On, Five, Shared);
}

#[test]
fn a_6_1_cloud_guest_with_2_vcpus_no_pti_and_4_levels_in_private_ram_is_patched() {
    is_patched(K::CLOUD_6_1, 2, Off, Four, Private);
}

#[test]
fn a_6_1_cloud_guest_with_4_vcpus_pti_and_4_levels_in_private_ram_is_patched() {
    is_patched(K::CLOUD_6_1, 4, On, Four, Private);
}

#[test]
fn a_6_1_guest_with_1_vcpu_no_pti_and_4_levels_in_shared_ram_is_patched() {
    is_patched(K::GENERIC_6_1, 1, Off, Four, Shared);
}

#[test]
fn a_6_1_guest_with_2_vcpus_pti_and_5_levels_in_private_ram_is_patched() {
    is_patched(K::GENERIC_6_1, 2, On, Five, Private);
}

#[test]
fn a_6_1_guest_with_4_vcpus_no_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::GENERIC_6_1, 4, Off, Five, Shared);
}

#[test]
fn a_6_12_cloud_guest_with_1_vcpu_pti_and_4_levels_in_private_ram_is_patched() {
    is_patched(K::CLOUD_6_12, 1, On, Four, Private);
}

#[test]
fn a_6_12_cloud_guest_with_2_vcpus_no_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_6_12, 2, Off, Five, Shared);
}

#[test]
fn a_6_12_cloud_guest_with_4_vcpus_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::CLOUD_6_12, 4, On, Five, Shared);
}

#[test]
fn a_6_1_rt_guest_with_2_vcpus_no_pti_and_5_levels_in_shared_ram_is_patched() {
    is_patched(K::RT_6_1, 2, Off, Five, Shared);
}
