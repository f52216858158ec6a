//! What the guest knows of a patch: its code is a module's. Faults are fixed up, WARN warns, stacks lead through it by name, and
//! it can't be unloaded; and after the revert nothing of it is left.

use e2e::bed::{self, Lent};
use e2e::kit::{self, Modules};
use e2e::own_livepatch::OwnLivepatch;
use e2e::probe::{Seen, see};
use e2e::sleeper::Sleeper;
use e2e::vmpatch::Vmpatch;
use images::build::hand_written::Applied;
use images::guest::Guest;
use images::kernel::Kernel;

/// What unloading says that the kernel does not allow (EWOULDBLOCK).
const BUSY: &str = "Resource temporarily unavailable";

fn guest(kernel: &Kernel) -> Lent {
    bed::lend(kit::guest(kernel.clone()))
}

fn dmesg(guest: &Guest) -> String {
    guest.text(&["dmesg"]).expect("the guest runs dmesg")
}

/// All that a test here does on one guest, in turn.
fn everything_on(kernel: &Kernel) {
    let guest = guest(kernel);
    let modules = Modules::of(kernel);
    is_listed(&guest, &modules);
    survives_faults(&guest, &modules);
    stands_beside_the_guests_own_livepatch(&guest, &modules);
    warns_once(guest, &modules);
}

fn is_listed(guest: &Guest, modules: &Modules) {
    let list = || guest.text(&["cat", "/proc/modules"]).unwrap();
    let before = list();
    let vmpatch = Vmpatch::on(guest);
    vmpatch.apply(&modules.applied(Applied::Pair));
    let listed = list();
    let line = listed.lines().next().unwrap_or_default();
    assert!(
        line.starts_with("test_pair ") && line.contains(" Live ") && line.ends_with(" (OK)"),
        "{listed}"
    );
    let symbols = guest.text(&["grep", "-F", "[test_pair]", "/proc/kallsyms"]).unwrap();
    for name in ["t livepatch_sysinfo", "t livepatch_si_meminfo", "d old_callers"] {
        assert!(symbols.lines().any(|line| line.contains(name)), "no {name}: {symbols}");
    }
    for rmmod in [&["rmmod", "test_pair"][..], &["rmmod", "-f", "test_pair"]] {
        let refused = guest.run(rmmod).unwrap();
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains(BUSY), "{rmmod:?}: {said}");
    }
    assert_eq!(see(guest, "pair"), Seen::Fixed);
    vmpatch.revert_all();
    assert_eq!(list(), before);
    assert_eq!(see(guest, "pair"), Seen::Flawed);
}

fn survives_faults(guest: &Guest, modules: &Modules) {
    let vmpatch = Vmpatch::on(guest);
    vmpatch.apply(&modules.applied(Applied::Faults));
    assert_eq!(see(guest, "faults"), Seen::Fixed);
    bed::assert_healthy(guest);
    vmpatch.revert_all();
    assert_eq!(see(guest, "faults"), Seen::Flawed);
}

/// The guest's own livepatch waits until it can tell from every stack that its function is not in use, so it must find its way
/// through those that lead through vmpatch's code.
fn stands_beside_the_guests_own_livepatch(guest: &Guest, modules: &Modules) {
    let vmpatch = Vmpatch::on(guest);
    vmpatch.apply(&modules.applied(Applied::Pause));
    let sleeper = Sleeper::start(guest);
    let stack = guest.text(&["cat", &format!("/proc/{}/stack", sleeper.pid())]).unwrap();
    assert!(
        stack.contains("livepatch_pause+0x") && stack.contains("[test_pause]") && stack.contains("do_syscall_64"),
        "{stack}"
    );
    let own = OwnLivepatch::load(guest, &modules.applied(Applied::Printk), "test_printk");
    assert_eq!(see(guest, "printk"), Seen::Fixed);
    own.unload();
    assert_eq!(sleeper.wake(guest), Seen::Fixed);
    vmpatch.revert_all();
    bed::assert_healthy(guest);
}

fn warns_once(guest: Lent, modules: &Modules) {
    let vmpatch = Vmpatch::on(&guest);
    vmpatch.apply(&modules.applied(Applied::Warns));
    for _ in 0..3 {
        assert_eq!(see(&guest, "warns"), Seen::Fixed);
    }
    let log = dmesg(&guest);
    let warnings: Vec<&str> = log.split("WARNING: ").skip(1).collect();
    assert_eq!(warnings.len(), 2, "each once: {log}");
    for warning in warnings {
        let (head, trace) = warning.split_once("Call Trace:").expect("with a stack");
        for name in [
            "livepatch_sysinfo+0x",
            "[test_warns]",
            "Modules linked in: test_warns(OK)",
        ] {
            assert!(head.contains(name), "no {name}: {head}");
        }
        for name in ["do_syscall_64+0x", "entry_SYSCALL_64"] {
            assert!(trace.contains(name), "no {name}: {trace}");
        }
    }
    assert!(log.contains("warns.c:"), "{log}");
    assert!(log.contains("vmpatch test: warns, 42"), "with its text: {log}");
    vmpatch.revert_all();
    assert_eq!(see(&guest, "warns"), Seen::Flawed);
    guest.discard_after_complaints("warns.c:");
}

#[test]
fn the_guest_knows_the_code_of_a_patch_6_1_cloud() {
    everything_on(&Kernel::CLOUD_6_1);
}

#[test]
fn the_guest_knows_the_code_of_a_patch_6_1_generic() {
    everything_on(&Kernel::GENERIC_6_1);
}

#[test]
fn the_guest_knows_the_code_of_a_patch_6_12_cloud() {
    everything_on(&Kernel::CLOUD_6_12);
}

#[test]
fn the_guest_knows_the_code_of_a_patch_7_2_cloud() {
    everything_on(&Kernel::CLOUD_7_2);
}
