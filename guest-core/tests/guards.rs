//! Integrity guards of the guest, found by their sysctls. In sound guests, and in hostile ones.

mod common;

use common::guest::{DATA, Guest, heap};
use guest_core::Kernel;
use guest_core::kernel::KernelError;
use guest_core::kernel::guard::{self, Guard, Reaction};
use guest_core::reads::Reads;

/// Where `sysctl_table_root` is.
const ROOT: u64 = DATA + 0x3_0000;
/// `ctl_table_root.default_set.dir.root`.
const TOP: u64 = ROOT + 8 + 80;
/// Bytes between the things that the tests put into the heap.
const STEP: u64 = 0x200;
/// `mode` of a directory and of a value.
const DIRECTORY: u64 = 0o040_555;
const VALUE: u64 = 0o100_644;

/// A guest whose `/proc/sys` has the entries `kernel`, `lkrg` and `vm`, and in `lkrg` the values given.
fn guest(values: &[(&str, u32)]) -> Guest {
    let guest = Guest::with_symbols(common::guest::Choice::default(), |symbols| {
        symbols.push(('d', "sysctl_table_root".to_owned(), ROOT));
    });
    let lkrg = directory(&guest, 1, "lkrg");
    let (kernel, vm) = (directory(&guest, 2, "kernel"), directory(&guest, 3, "vm"));
    // A root with a smaller name to its left and a greater one to its right.
    guest.put_u64(TOP, lkrg);
    guest.put_u64(lkrg + 16, kernel);
    guest.put_u64(lkrg + 8, vm);
    // Values one below the other, each to the right of the one before: names in ascending order.
    let table = heap(STEP * 10);
    let nodes = heap(STEP * 12);
    let header = heap(STEP * 14);
    guest.put_u64(header, table);
    guest.put_u64(header + 64, nodes);
    let mut link = heap(STEP) + 80;
    for (index, (name, value)) in (0..).zip(values) {
        let (node, entry, data) = (nodes + 32 * index, table + 64 * index, heap(STEP * 16) + 8 * index);
        put_entry(&guest, entry, heap(STEP * 18) + 32 * index, name, VALUE);
        guest.put_u64(entry + 8, data);
        guest.put(data, &value.to_le_bytes());
        guest.put_u64(node + 24, header);
        guest.put_u64(link, node);
        link = node + 8;
    }
    guest
}

/// Makes a `ctl_dir` of that name, and gives its node.
fn directory(guest: &Guest, number: u64, name: &str) -> u64 {
    let at = heap(STEP * number);
    let (table, node, text) = (at + 0x80, at + 0x100, at + 0x180);
    guest.put_u64(at, table);
    guest.put_u64(at + 64, node);
    guest.put_u64(node + 24, at);
    put_entry(guest, table, text, name, DIRECTORY);
    node
}

fn put_entry(guest: &Guest, entry: u64, text: u64, name: &str, mode: u64) {
    guest.put(text, name.as_bytes());
    guest.put_u64(entry, text);
    guest.put(entry + 20, &mode.to_le_bytes()[..2]);
}

fn found(guest: &Guest) -> Result<Option<Guard>, KernelError> {
    let kernel: Kernel = guest.kernel();
    guard::find(&kernel.live(&guest.ram))
}

fn reaction(values: &[(&str, u32)]) -> Reaction {
    found(&guest(values)).unwrap().unwrap().reaction
}

#[test]
fn a_guest_without_such_sysctls_or_modules_has_no_guard() {
    assert_eq!(found(&Guest::new()).unwrap(), None);
    let guest = guest(&[]);
    guest.put_u64(TOP, heap(STEP * 2) + 0x100);
    assert_eq!(found(&guest).unwrap(), None, "only /proc/sys/kernel");
}

#[test]
fn what_a_guard_does_is_read_from_its_sysctls() {
    let settings = |validate, enforce| [("interval", 15), ("kint_enforce", enforce), ("kint_validate", validate)];
    assert_eq!(reaction(&settings(3, 2)), Reaction::Panics);
    assert_eq!(reaction(&settings(1, 7)), Reaction::Panics);
    assert_eq!(reaction(&settings(3, 1)), Reaction::Logs);
    assert_eq!(reaction(&settings(3, 0)), Reaction::Logs);
    assert_eq!(reaction(&settings(0, 2)), Reaction::Off);
}

#[test]
fn a_guard_whose_settings_are_not_known_may_do_anything() {
    assert_eq!(reaction(&[]), Reaction::Unknown);
    assert_eq!(reaction(&[("kint_enforce", 0)]), Reaction::Unknown);
    assert_eq!(reaction(&[("kint_validate", 0)]), Reaction::Unknown);
    let guard = found(&guest(&[])).unwrap().unwrap();
    assert!(guard.permits().unwrap_err().to_string().contains("may panic"));
}

#[test]
fn a_guard_whose_tenant_makes_it_panic_before_the_commit_is_noticed() {
    let guest = guest(&[("kint_enforce", 1), ("kint_validate", 3)]);
    let kernel = guest.kernel();
    let reads = Reads::default();
    let found = guard::find(&kernel.live(&guest.ram).recording(&reads));
    found.unwrap().unwrap().permits().unwrap();
    let unchanged = reads.preconditions();
    unchanged.check(&guest.ram).unwrap();
    guest.put(heap(STEP * 16), &2_u32.to_le_bytes());
    unchanged.check(&guest.ram).unwrap_err();
}

#[test]
fn a_tree_without_an_end_is_refused() {
    let guest = guest(&[]);
    let node = heap(STEP * 3) + 0x100;
    guest.put_u64(TOP, node);
    guest.put_u64(node + 16, node);
    guest.ram.count_from_here();
    let error = found(&guest).unwrap_err();
    assert!(error.to_string().contains("levels"), "{error}");
}

#[test]
fn sysctls_that_cannot_be_read_are_an_error() {
    let entry = heap(STEP) + 0x80;
    for at in [TOP, entry, heap(STEP), heap(STEP) + 0x118] {
        let guest = guest(&[]);
        guest.put_u64(at, 0x7fff_ffff_fff8);
        assert!(matches!(found(&guest), Err(KernelError::Unreadable { .. })), "{at:#x}");
    }
}
