//! Which functions the guest's own tracers want to see, and what that was read from. In sound guests, and in hostile ones.

mod common;

use common::guest::{FUNCTIONS, Guest, heap};
use guest_core::kernel::{KernelError, tracers};
use guest_core::reads::Reads;
use guest_core::{Gva, Kernel};

/// Where the test's `ftrace_ops` are, each with its hashes behind it.
fn ops(number: u64) -> u64 {
    heap(0x1_0000 + 0x1000 * number)
}

/// The site that the tests ask about.
const SITE: Gva = Gva(FUNCTIONS + 4);
/// Another one.
const OTHER: Gva = Gva(FUNCTIONS + 64 + 4);

/// A guest with one `ftrace_ops` for each pair of a filter and exceptions.
fn guest(tracers: &[(&[Gva], &[Gva])]) -> (Guest, Kernel) {
    let guest = Guest::new();
    let end = guest.symbol("ftrace_list_end");
    let mut link = guest.symbol("ftrace_ops_list");
    for (number, (filter, except)) in (0..).zip(tracers) {
        let at = ops(number);
        guest.put_u64(link, at);
        link = at + 16;
        let both = at + 0x100;
        guest.put_u64(at + 96, both);
        guest.put_u64(both, hash(&guest, at + 0x200, except));
        guest.put_u64(both + 8, hash(&guest, at + 0x800, filter));
    }
    guest.put_u64(link, end);
    let kernel = guest.kernel();
    (guest, kernel)
}

/// An `ftrace_hash` of two buckets at `at`, with the sites in turn; the entries behind it.
fn hash(guest: &Guest, at: u64, sites: &[Gva]) -> u64 {
    let buckets = at + 0x20;
    for (word, value) in [(0, 1), (8, buckets), (16, sites.len() as u64)] {
        guest.put_u64(at + word, value);
    }
    for (number, site) in (0..).zip(sites) {
        let (entry, bucket) = (at + 0x40 + 0x20 * number, buckets + 8 * (number % 2));
        guest.put_u64(entry, guest.u64_at(bucket));
        guest.put_u64(entry + 16, site.0);
        guest.put_u64(bucket, entry);
    }
    at
}

fn is_wanted(tracers: &[(&[Gva], &[Gva])]) -> bool {
    let (guest, kernel) = guest(tracers);
    tracers::is_wanted(&kernel.live(&guest.ram), SITE).unwrap()
}

#[test]
fn a_function_is_wanted_by_whom_its_filter_lets_through() {
    assert!(!is_wanted(&[]));
    assert!(is_wanted(&[(&[], &[])]), "no filter: all functions");
    assert!(is_wanted(&[(&[OTHER, OTHER, SITE], &[])]));
    assert!(!is_wanted(&[(&[OTHER], &[])]));
    assert!(is_wanted(&[(&[OTHER], &[]), (&[SITE], &[])]), "the second one wants it");
}

#[test]
fn an_exception_outweighs_a_filter() {
    assert!(!is_wanted(&[(&[], &[SITE])]));
    assert!(!is_wanted(&[(&[SITE], &[OTHER, SITE])]));
    assert!(is_wanted(&[(&[SITE], &[OTHER])]));
}

#[test]
fn every_pointer_that_the_answer_depends_on_is_a_precondition() {
    let (guest, kernel) = guest(&[(&[SITE], &[])]);
    let reads = Reads::default();
    assert!(tracers::is_wanted(&kernel.live(&guest.ram).recording(&reads), SITE).unwrap());
    let found = reads.preconditions();
    found.check(&guest.ram).unwrap();
    let both = ops(0) + 0x100;
    let pointers = [
        guest.symbol("ftrace_ops_list"),
        ops(0) + 96,
        both + 8,
        both,
        ops(0) + 16,
    ];
    for at in pointers {
        let before = guest.u64_at(at);
        guest.put_u64(at, before ^ 1);
        found.check(&guest.ram).unwrap_err();
        guest.put_u64(at, before);
    }
}

#[test]
fn a_list_of_tracers_without_an_end_is_refused() {
    let (guest, kernel) = guest(&[(&[], &[])]);
    guest.put_u64(ops(0) + 16, ops(0));
    let found = tracers::is_wanted(&kernel.live(&guest.ram), SITE);
    assert!(matches!(found, Err(KernelError::Disagrees { what, .. }) if what == "the list of ftrace_ops"));
}

#[test]
fn a_hash_that_no_kernel_makes_is_refused() {
    let filter = ops(0) + 0x800;
    let (guest, kernel) = guest(&[(&[SITE], &[])]);
    for bits in [13, 64, u64::MAX] {
        guest.put_u64(filter, bits);
        guest.ram.count_from_here();
        let found = tracers::is_wanted(&kernel.live(&guest.ram), SITE);
        assert!(matches!(found, Err(KernelError::Disagrees { what, .. }) if what == "ftrace_hash.size_bits"));
        assert!(guest.ram.counted().0 < 100);
    }
    // A bucket whose entry is its own successor.
    guest.put_u64(filter, 1);
    let entry = filter + 0x40;
    guest.put_u64(entry, entry);
    guest.put_u64(entry + 16, OTHER.0);
    let found = tracers::is_wanted(&kernel.live(&guest.ram), SITE);
    assert!(matches!(found, Err(KernelError::Disagrees { what, .. }) if what == "ftrace_hash.buckets"));
}

#[test]
fn tracers_that_cannot_be_read_are_an_error() {
    for at in [96, 16, 0x108, 0x100, 0x808] {
        let (guest, kernel) = guest(&[(&[SITE], &[SITE])]);
        guest.put_u64(ops(0) + at, 0x7fff_ffff_fff8);
        let found = tracers::is_wanted(&kernel.live(&guest.ram), SITE);
        assert!(
            matches!(found, Err(KernelError::Unreadable { .. })),
            "{at:#x}: {found:?}"
        );
    }
}
