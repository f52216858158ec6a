//! What plans were made from, in guests made by hand: where any of it has changed by the time of the pause, nothing is written.

mod common;

use common::guest::{DIRECT, Guest, gpa, heap};
use common::machine::Vm;
use common::module::{Function, livepatch};
use common::patch::{OPTIONS, commit_plan, plan, registry, two_with_sections};
use guest_core::change::ChangeError;
use guest_core::commit::{CommitError, NotSafe, commit};
use guest_core::kernel::KernelError;
use guest_core::plan::{Plan, Refusal, recovery, revert};
use guest_core::{Gpa, Kernel, PhysMemory};

/// A guest with a module of its own, and a patch with tables, static keys and variables on each CPU; the plans of applying it, of
/// taking it out, and of taking back half of it, each with the guest that it is for.
fn plans() -> Vec<(&'static str, Guest, Kernel, Plan)> {
    let mut guest = Guest::new();
    let kernel = guest.kernel();
    guest.ram.take_baseline();
    let file = two_with_sections();
    let applying = plan(&guest, &kernel, &file).unwrap();

    let mut patched = guest.clone();
    commit_plan(&patched, &kernel, &applying).unwrap();
    patched.ram.take_baseline();
    let reverting = revert(&kernel.live(&patched.ram), &registry(&patched, &kernel), "fix").unwrap();

    let mut cut_off = guest.clone();
    for change in applying.staged.iter().chain(applying.atomic.iter().rev().skip(1)) {
        change.make(&cut_off.ram).unwrap();
    }
    cut_off.ram.take_baseline();
    let recovering = recovery(&kernel.live(&cut_off.ram), &registry(&cut_off, &kernel));
    let recovering = recovering.unwrap().unwrap();
    let kernels = [cut_off.kernel(), patched.kernel(), kernel];
    let [first, second, third] = kernels;
    vec![
        ("applying", guest, third, applying),
        ("reverting", patched, second, reverting),
        ("recovering", cut_off, first, recovering),
    ]
}

fn flip(guest: &Guest, gpa: Gpa, bits: u8) {
    let mut byte = [0];
    guest.ram.read(gpa, &mut byte).unwrap();
    guest.ram.put(gpa.0, &[byte[0] ^ bits]);
}

#[test]
fn where_any_byte_that_a_plan_was_made_from_has_changed_nothing_is_written() {
    for (name, start, kernel, plan) in plans() {
        let bytes: Vec<_> = plan.requires.bytes().collect();
        assert!(bytes.len() > 100, "{name}: {} bytes", bytes.len());
        println!("{name}: {} bytes at {} places", bytes.len(), plan.requires.places());
        for (gpa, mask) in bytes {
            let guest = start.clone();
            flip(&guest, gpa, mask);
            let before = guest.ram.differences();
            let result = commit(&kernel.live(&guest.ram), &mut Vm::new(&guest), &plan, &OPTIONS);
            // What says that a lock is held is no precondition, but may lie among them.
            let error = result.expect_err(&format!("{name} {gpa}"));
            let is_refused = matches!(
                error,
                CommitError::Changed(_) | CommitError::NotSafe { .. } | CommitError::Kernel(_) | CommitError::Tasks(_)
            );
            assert!(is_refused, "{name} {gpa}: {error}");
            assert!(guest.ram.differences() == before, "{name} {gpa}");
        }
        commit_plan(&start, &kernel, &plan).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
}

/// The words in the guest's own structures, each of which somebody in the guest changes under the lock that is in the list of
/// those which are waited for.
#[test]
fn the_neighbours_of_what_a_plan_edits_are_among_its_preconditions() {
    for (name, guest, _, plan) in plans() {
        let needed = [
            "modules",
            "module_bug_list",
            "mod_tree",
            "ftrace_pages",
            "ftrace_pages_start",
            "ftrace_ops_list",
            "pcpu_reserved_chunk",
        ];
        for symbol in needed {
            if name == "recovering" && symbol == "ftrace_ops_list" {
                continue;
            }
            let at = gpa(guest.symbol(symbol));
            let is_there = plan.requires.bytes().any(|(gpa, _)| gpa.0 == at);
            assert!(is_there, "{name}: {symbol}");
        }
    }
}

#[test]
fn a_group_of_ftrace_records_that_the_guest_frees_between_plan_and_pause_is_seen() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let file = two_with_sections();
    commit_plan(&guest, &kernel, &plan(&guest, &kernel, &file).unwrap()).unwrap();
    // The guest loads a module: its group of records comes behind the patch's.
    let ours = guest.u64_at(guest.symbol("ftrace_pages"));
    let theirs = heap(0x3000);
    let at = registry(&guest, &kernel);
    let next = ours - at.alias.0 + at.base.0;
    guest.ram.put_u64(next, theirs);
    guest.put_u64(guest.symbol("ftrace_pages"), theirs);
    let reverting = revert(&kernel.live(&guest.ram), &at, "fix").unwrap();
    // It unloads it, and frees the group.
    guest.ram.put_u64(next, 0);
    guest.put_u64(guest.symbol("ftrace_pages"), ours);
    let before = guest.ram.differences();
    let error = commit_plan(&guest, &kernel, &reverting).unwrap_err();
    assert!(
        matches!(error, CommitError::Changed(ChangeError::Changing { .. })),
        "{error}"
    );
    assert!(guest.ram.differences() == before);
}

#[test]
fn a_planner_that_fails_over_what_is_being_changed_says_so() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let file = livepatch("fix", &[Function::returning_one("victim")]);
    // A module that is gone, and whose memory is, too.
    guest.put_u64(guest.symbol("modules"), 0x7fff_ffff_fff8);
    let error = plan(&guest, &kernel, &file).unwrap_err();
    assert!(
        matches!(error, Refusal::Kernel(KernelError::Unreadable { .. })),
        "{error}"
    );
    guest.put_u64(guest.symbol("module_mutex"), DIRECT);
    let error = plan(&guest, &kernel, &file).unwrap_err();
    assert!(
        matches!(error, Refusal::Kernel(KernelError::Held(held)) if held.name == "module_mutex"),
        "{error}"
    );
}

#[test]
fn who_takes_per_cpu_memory_is_waited_for_where_a_patch_has_some() {
    for (name, guest, kernel, plan) in plans() {
        // The offset of `rlock.raw_lock.val.counter` in `types.rs`.
        for (lock, offset) in [("pcpu_lock", 20), ("pcpu_alloc_mutex", 0)] {
            let guest = guest.clone();
            guest.put(guest.symbol(lock) + offset, &[8]);
            let before = guest.ram.differences();
            let error = commit_plan(&guest, &kernel, &plan).expect_err(&format!("{name} {lock}"));
            let is_it = matches!(error, CommitError::NotSafe { why: NotSafe::Held(held), .. } if held.name == lock);
            assert!(is_it, "{name}: {error}");
            assert!(guest.ram.differences() == before, "{name}");
        }
    }
}
