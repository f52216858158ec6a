//! What guests made by hand know of patches: their lists and tree of modules, before, while and after.

mod common;

use common::guest::{CAVE, Guest, VMALLOC, VMALLOC_TABLE, gpa, heap};
use common::machine::Vm;
use common::module::{Function, livepatch};
use common::patch::{OPTIONS, commit_plan, plan, recover, registry, two_with_sections};
use guest_core::Kernel;
use guest_core::commit::{CommitError, NotSafe, commit, stage};
use guest_core::guest_module::ModuleRegistration;
use guest_core::kernel::modules;
use guest_core::plan::{Refusal, RevertError, revert};
use guest_core::registry::State;
use std::collections::BTreeSet;

// Offsets in `struct module` and `struct mod_tree_root` as in `types.rs`.
const MEM: u64 = 96;
const MEM_BYTES: u64 = 72;
const NODES: [u64; 2] = [24, 48];
const BUG_LIST: u64 = 640;
const REFERENCES: u64 = 736;
const ROOTS: [u64; 2] = [8, 16];
const BOUNDS: [u64; 2] = [24, 32];

fn apply(guest: &Guest, kernel: &Kernel, name: &str, function: &'static str) -> ModuleRegistration {
    let file = livepatch(name, &[Function::returning_one(function)]);
    let plan = plan(guest, kernel, &file).unwrap();
    commit_plan(guest, kernel, &plan).unwrap();
    plan.record.registration.unwrap()
}

fn take_out(guest: &Guest, kernel: &Kernel, name: &str) {
    let plan = revert(&kernel.live(&guest.ram), &registry(guest, kernel), name).unwrap();
    commit_plan(guest, kernel, &plan).unwrap();
    recover(guest, kernel);
}

/// Where the alias mapping leads: the fake guest's own page tables are not asked.
fn physical(guest: &Guest, kernel: &Kernel, at: u64) -> u64 {
    let registry = registry(guest, kernel);
    at - registry.alias.0 + registry.base.0
}

fn word(guest: &Guest, kernel: &Kernel, at: u64) -> u64 {
    let alias = registry(guest, kernel).alias.0;
    match (alias..alias + (2 << 20)).contains(&at) {
        true => guest.ram.u64_at(physical(guest, kernel, at)),
        false => guest.u64_at(at),
    }
}

/// All nodes of a tree.
fn nodes(guest: &Guest, kernel: &Kernel, which: usize) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut open = vec![guest.u64_at(guest.symbol("mod_tree") + ROOTS[which])];
    while let Some(node) = open.pop().filter(|node| *node != 0) {
        assert!(found.insert(node), "{node:#x} comes twice");
        open.retain(|other| *other != 0);
        open.extend(
            [8, 16]
                .map(|child| word(guest, kernel, node + child))
                .iter()
                .filter(|child| **child != 0),
        );
    }
    found
}

fn nodes_of(known: &ModuleRegistration, which: usize) -> BTreeSet<u64> {
    (0..3)
        .map(|index| known.module + MEM + MEM_BYTES * index + NODES[which])
        .collect()
}

/// Demands that the guest finds these modules, and no others.
fn assert_known(guest: &Guest, kernel: &Kernel, expected: &[(&str, &ModuleRegistration)]) {
    let live = kernel.live(&guest.ram);
    let listed: Vec<_> = modules::all(&live)
        .unwrap()
        .into_iter()
        .map(|m| (m.name, m.at.0))
        .collect();
    let named: Vec<_> = expected
        .iter()
        .map(|(name, known)| ((*name).to_owned(), known.module))
        .collect();
    assert_eq!(listed, named);
    let mut at = guest.symbol("module_bug_list");
    for (_, known) in expected {
        at = word(guest, kernel, at);
        assert_eq!(at, known.module + BUG_LIST);
    }
    assert_eq!(word(guest, kernel, at), guest.symbol("module_bug_list"));
    for which in [0, 1] {
        let all = expected.iter().flat_map(|(_, known)| nodes_of(known, which)).collect();
        assert_eq!(nodes(guest, kernel, which), all, "tree {which}");
    }
}

fn bounds(guest: &Guest) -> [u64; 2] {
    BOUNDS.map(|bound| guest.u64_at(guest.symbol("mod_tree") + bound))
}

#[test]
fn a_patch_is_in_the_guests_lists_and_in_both_trees() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let known = apply(&guest, &kernel, "fix", "victim");
    assert_known(&guest, &kernel, &[("fix", &known)]);
    let record = registry(&guest, &kernel).entries[0].record.clone().unwrap();
    let pages = |bytes: u64| bytes.next_multiple_of(4096);
    assert_eq!(
        bounds(&guest),
        [record.text.start, record.data.start + pages(record.data.len)]
    );
}

#[test]
fn patches_taken_out_in_any_order_leave_no_trace() {
    for first_out in ["older", "newer"] {
        let guest = Guest::new();
        let kernel = guest.kernel();
        let older = apply(&guest, &kernel, "older", "victim");
        let newer = apply(&guest, &kernel, "newer", "vfs_read");
        assert_known(&guest, &kernel, &[("newer", &newer), ("older", &older)]);
        take_out(&guest, &kernel, first_out);
        let left = if first_out == "older" {
            ("newer", &newer)
        } else {
            ("older", &older)
        };
        assert_known(&guest, &kernel, &[left]);
        take_out(&guest, &kernel, left.0);
        assert_eq!(bounds(&guest), [u64::MAX, 0]);
        // Where the tree was changed in between, its sequence number has gone on; everything else is as it was.
        let sequence = guest.symbol("mod_tree");
        guest.put(sequence, &[0; 4]);
        assert!(guest.ram.differences().is_empty(), "{first_out} first");
        assert_eq!(guest.bytes_at(CAVE, 8), [0xcc; 8]);
    }
}

#[test]
fn a_module_that_the_guest_loads_between_plan_and_pause_is_seen() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan(&guest, &kernel, &livepatch("fix", &[Function::returning_one("victim")])).unwrap();
    let before = guest.u64_at(guest.symbol("mod_tree"));
    guest.put_u64(guest.symbol("mod_tree"), before + 2);
    let error = commit_plan(&guest, &kernel, &plan).unwrap_err();
    assert!(matches!(error, CommitError::Changed(_)), "{error}");
    guest.put_u64(guest.symbol("mod_tree"), before);
    assert!(guest.ram.differences().is_empty());
}

#[test]
fn a_module_that_is_being_loaded_is_waited_for() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan(&guest, &kernel, &livepatch("fix", &[Function::returning_one("victim")])).unwrap();
    guest.put_u64(guest.symbol("module_mutex"), common::guest::DIRECT);
    let error = commit_plan(&guest, &kernel, &plan).unwrap_err();
    assert!(matches!(error, CommitError::NotSafe { why: NotSafe::Held(held), .. } if held.name == "module_mutex"));
}

#[test]
fn a_patch_of_a_name_that_the_guest_has_loaded_is_refused() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let own = common::guest::heap(0x1000);
    guest.link(guest.symbol("modules"), &[own + 8]);
    guest.put(own + 24, b"fix\0");
    let file = livepatch("fix", &[Function::returning_one("victim")]);
    assert!(matches!(plan(&guest, &kernel, &file), Err(Refusal::Loaded { id }) if id == "fix"));
}

#[test]
fn a_patch_that_the_guest_uses_is_not_taken_out() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let known = apply(&guest, &kernel, "fix", "victim");
    let at = physical(&guest, &kernel, known.module + REFERENCES);
    let live = kernel.live(&guest.ram);
    let planned = revert(&live, &registry(&guest, &kernel), "fix").unwrap();
    guest.ram.put(at, &[3]);
    let error = revert(&live, &registry(&guest, &kernel), "fix").unwrap_err();
    assert!(matches!(error, RevertError::InUse { references: 1, .. }), "{error}");
    let error = commit_plan(&guest, &kernel, &planned).unwrap_err();
    assert!(matches!(error, CommitError::Changed(_)), "{error}");
}

#[test]
fn a_patch_that_the_guest_probes_is_not_taken_out() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    apply(&guest, &kernel, "fix", "victim");
    let probe = common::guest::heap(0x500);
    let code = registry(&guest, &kernel).entries[0].record.as_ref().unwrap().text.start + 4;
    guest.put_u64(guest.symbol("kprobe_table"), probe);
    guest.put_u64(probe + 40, code);
    let error = revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap_err();
    assert!(
        matches!(error, RevertError::Probed { at, .. } if at.0 == code),
        "{error}"
    );
}

/// Whoever walks the lists and the tree does not hold a lock: only the address that a CPU has tells that it does.
#[test]
fn a_patch_that_a_cpu_is_looking_at_is_not_taken_out() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let known = apply(&guest, &kernel, "fix", "victim");
    let plan = revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap();
    let mut vm = Vm::new(&guest);
    vm.vcpus[1].general[3] = known.module + 8;
    let error = commit(&kernel.live(&guest.ram), &mut vm, &plan, &OPTIONS).unwrap_err();
    let CommitError::NotSafe { why_text, .. } = error else {
        panic!("{error}")
    };
    assert!(why_text.contains("may be reading there"), "{why_text}");
    commit_plan(&guest, &kernel, &plan).unwrap();
}

/// vmpatch and its supervisor died before the patch was in force, and the guest has loaded a module since.
#[test]
fn a_patch_that_was_cut_off_is_forgotten_also_where_the_guest_went_on() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let live = kernel.live(&guest.ram);
    let file = livepatch("fix", &[Function::returning_one("victim")]);
    let cut_off = plan(&guest, &kernel, &file).unwrap();
    stage(&live, &cut_off.staged).unwrap();
    let (_, almost_all) = cut_off.atomic.split_last().unwrap();
    stage(&live, almost_all).unwrap();
    assert_eq!(registry(&guest, &kernel).entries[0].state, State::Applying);
    // Another module, in front of it in the list, and the tree has been changed since.
    let (head, own) = (guest.symbol("modules"), common::guest::heap(0x1000) + 8);
    let ours = cut_off.record.registration.as_ref().unwrap().module + 8;
    guest.put_u64(head, own);
    guest.put_u64(own, ours);
    guest.put_u64(own + 8, head);
    guest.ram.put_u64(physical(&guest, &kernel, ours + 8), own);
    guest.put(guest.symbol("mod_tree"), &[0x80]);

    recover(&guest, &kernel);
    assert_eq!((guest.u64_at(head), guest.u64_at(head + 8)), (own, own));
    assert_eq!((guest.u64_at(own), guest.u64_at(own + 8)), (head, head));
    for which in [0, 1] {
        assert!(nodes(&guest, &kernel, which).is_empty());
    }
}

/// vmpatch and its supervisor died before the pause. Nothing led to the patch, so that nothing kept the guest from unloading the module
/// that was its neighbour in the list, and from loading others.
#[test]
fn a_patch_that_was_only_staged_is_wiped_whatever_the_guest_has_loaded_and_unloaded_since() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let (head, entry, first) = (guest.symbol("modules"), VMALLOC_TABLE + 8 * 40, VMALLOC + 4096 * 40);
    guest.put_u64(entry, gpa(first) | 1 << 63 | 0x63);
    guest.link(head, &[first + 8]);
    guest.put(first + 24, b"other\0");
    let staged = plan(&guest, &kernel, &two_with_sections()).unwrap();
    stage(&kernel.live(&guest.ram), &staged.staged).unwrap();
    assert_eq!(registry(&guest, &kernel).entries[0].state, State::Applying);

    let other = heap(0x1000) + 8;
    guest.link(head, &[other]);
    guest.put_u64(entry, 0);
    // The number that the guest has come to may be the very one to which the patch would have brought it.
    let [_, after] = staged.record.registration.unwrap().sequence;
    for sequence in [0x80, after] {
        let guest = guest.clone();
        guest.put(guest.symbol("mod_tree"), &sequence.to_le_bytes());
        recover(&guest, &kernel);
        assert!(!registry(&guest, &kernel).exists);
        assert_eq!((guest.u64_at(head), guest.u64_at(head + 8)), (other, other));
        assert_eq!((guest.u64_at(other), guest.u64_at(other + 8)), (head, head));
        assert_eq!(guest.bytes_at(guest.symbol("mod_tree"), 4), sequence.to_le_bytes());
    }
}

/// The same, of a function of a module that the guest has unloaded: by now, other things lie where its ftrace records were.
#[test]
fn a_bit_that_a_patch_was_going_to_set_is_the_guests_where_the_patch_was_only_staged() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let staged = plan(&guest, &kernel, &livepatch("fix", &[Function::returning_one("victim")])).unwrap();
    stage(&kernel.live(&guest.ram), &staged.staged).unwrap();
    let mut flags = staged
        .record
        .changes
        .iter()
        .filter(|change| change.what().contains("flags"));
    let (at, all) = (flags.next().unwrap().gpa().0, [0xff]);
    guest.ram.put(at, &all);
    recover(&guest, &kernel);
    assert!(!registry(&guest, &kernel).exists);
    assert_eq!(guest.ram.u64_at(at) & 0xff, 0xff);
}

/// The bits of the reserve of per-CPU memory that are set, and the bytes that it says are free.
fn reserve(guest: &Guest) -> (u32, u64) {
    let chunk = guest.u64_at(guest.symbol("pcpu_reserved_chunk"));
    let map = guest.u64_at(chunk + 80);
    let used = (0..32).map(|word| guest.u64_at(map + 8 * word).count_ones()).sum();
    (used, guest.u64_at(chunk + 16) & 0xffff_ffff)
}

#[test]
fn variables_on_each_cpu_are_taken_from_the_guests_reserve_and_given_back() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let before = reserve(&guest);
    assert_eq!(before, (256, 4 * 1792));
    let chunk = guest.u64_at(guest.symbol("pcpu_reserved_chunk"));
    let hints = || [chunk + 24, chunk + 0x600, chunk + 0x628].map(|at| guest.bytes_at(at, 40));
    let old_hints = hints();

    let plan = plan(&guest, &kernel, &two_with_sections()).unwrap();
    commit_plan(&guest, &kernel, &plan).unwrap();
    let known = plan.record.registration.unwrap();
    let piece = known.per_cpu.unwrap();
    assert_eq!(piece.bytes, 24);
    assert_eq!(reserve(&guest), (before.0 + 6, before.1 - 24));
    // The last place: 1018 of the second page's 1024 units are left, and both pages are one run but for these.
    assert_eq!(guest.u64_at(chunk + 0x628 + 20) & 0xffff_ffff, 1018);
    for cpu in 0..2 {
        let offset = guest.u64_at(guest.symbol("__per_cpu_offset") + 8 * cpu);
        let at = piece.at.wrapping_add(offset);
        assert_eq!(guest.bytes_at(at, 24), [7; 24], "CPU {cpu}");
    }

    take_out(&guest, &kernel, "fix");
    assert_eq!(reserve(&guest), before);
    assert_eq!(hints(), old_hints);
}

#[test]
fn a_piece_that_is_given_back_already_is_not_given_back_again() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let before = reserve(&guest);
    let plan = plan(&guest, &kernel, &two_with_sections()).unwrap();
    commit_plan(&guest, &kernel, &plan).unwrap();
    let known = plan.record.registration.unwrap();
    let mark = physical(&guest, &kernel, known.module) + 752;
    assert_eq!(guest.ram.u64_at(mark) & 0xffff_ffff, 24);
    // As where vmpatch was killed in the pause of a revert, when the memory was no longer the patch's.
    guest.ram.put(mark, &[0; 4]);
    take_out(&guest, &kernel, "fix");
    assert_eq!(
        reserve(&guest),
        (before.0 + 6, before.1 - 24),
        "may be the guest's by now"
    );
}

#[test]
fn new_functions_are_the_last_of_ftraces_records_until_the_patch_goes() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let last = guest.symbol("ftrace_pages");
    let before = guest.u64_at(last);
    let plan = plan(&guest, &kernel, &two_with_sections()).unwrap();
    commit_plan(&guest, &kernel, &plan).unwrap();
    let traced = plan.record.registration.unwrap().traced.unwrap();
    assert_eq!((guest.u64_at(last), guest.u64_at(before)), (traced.group, traced.group));
    let group = |offset: u64| word(&guest, &kernel, traced.group + offset);
    let [first, second] = [0, 1].map(|index| word(&guest, &kernel, group(8) + 24 * index));
    let code = plan.record.text.start;
    assert_eq!((group(0), group(16), first, second), (0, 2, code + 4, code + 36));

    // A group that comes later hangs on ours, and stays.
    let later = heap(0x5_0000);
    guest.ram.put_u64(physical(&guest, &kernel, traced.group), later);
    guest.put_u64(last, later);
    // While somebody traces a new function the patch stays.
    let flags = physical(&guest, &kernel, group(8)) + 8;
    guest.ram.put_u64(flags, 1);
    let held = revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap_err();
    assert!(matches!(held, RevertError::NewTraced { .. }), "{held}");
    guest.ram.put_u64(flags, 0);
    take_out(&guest, &kernel, "fix");
    assert_eq!((guest.u64_at(last), guest.u64_at(before)), (later, later));
}
