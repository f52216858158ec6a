//! Patches of one function on top of each other, and patches that replace all others: in guests made by hand, with a death at every write.

mod common;

use common::guest::{FUNCTIONS, Guest, gpa};
use common::machine::{Stopped, Vm};
use common::module::{Function, livepatch, livepatch_that_replaces};
use common::patch::{commit_plan, plan, registry, target};
use common::ram::{Fault, Ram};
use common::tasks::{START, process, write};
use guest_core::commit::{CommitError, Model, journal, roll_back};
use guest_core::guest::{Embedded, Guest as Opened, PatchFile, PatchOptions};
use guest_core::kernel::modules;
use guest_core::plan::{RevertError, revert};
use guest_core::registry::{Redirect, State};
use guest_core::{Gpa, Gva, Kernel, PhysMemory};
use std::time::Duration;

const OPTIONS: PatchOptions = PatchOptions {
    model: Model::CleanCut,
    timeout: Duration::ZERO,
};
/// `module.refcnt` in a guest made by hand.
const REFERENCES: u64 = 736;
/// A function with an ftrace site, one without, and another one with.
const TRACED: &str = "victim";
const NOTRACE: &str = "notrace_victim";
const OTHER: &str = "vfs_read";

fn returning_one(names: &[&'static str]) -> Vec<Function> {
    names.iter().map(|name| Function::returning_one(name)).collect()
}

fn cumulative(name: &str, functions: &[&'static str]) -> Vec<u8> {
    livepatch_that_replaces(name, &returning_one(functions))
}

fn open(guest: &Guest) -> Opened<Embedded<&Ram, Vm<'_>>> {
    Opened::open(Embedded {
        memory: &guest.ram,
        machine: Vm::new(guest),
    })
    .unwrap()
}

fn apply(guest: &Guest, name: &str, bytes: &[u8]) {
    let mut opened = open(guest);
    opened.recover().unwrap();
    opened.apply(PatchFile { name, bytes }, &OPTIONS).unwrap();
}

fn take_out(guest: &Guest, id: &str) {
    let mut opened = open(guest);
    opened.recover().unwrap();
    opened.revert(id, &OPTIONS).unwrap();
}

/// The patches, oldest first.
fn patches(guest: &Guest, kernel: &Kernel) -> Vec<(String, State)> {
    let registry = registry(guest, kernel);
    let mut entries: Vec<_> = registry.entries.iter().collect();
    entries.sort_by_key(|entry| entry.record().map(|record| record.order));
    let named = entries
        .into_iter()
        .map(|entry| (entry.record().unwrap().id.clone(), entry.state));
    named.collect()
}

fn in_force(ids: &[&str]) -> Vec<(String, State)> {
    ids.iter().map(|id| ((*id).to_owned(), State::Applied)).collect()
}

/// Where the jump of a function is: in its site, or at its entry.
fn place(guest: &Guest, function: &str) -> u64 {
    guest.symbol(function) + if function == NOTRACE { 0 } else { 4 }
}

/// The patch whose code a function leads to; none where the kernel's own code runs.
fn leads_to(guest: &Guest, kernel: &Kernel, function: &str) -> Option<String> {
    let at = place(guest, function);
    if guest.bytes_at(at, 1) != [0xe9] {
        assert_eq!(guest.bytes_at(at, 5), Guest::new().bytes_at(at, 5), "{function}");
        return None;
    }
    let to = target(guest, at);
    let registry = registry(guest, kernel);
    let holds = |record: &&guest_core::registry::Record| record.functions.iter().any(|one| one.new == to);
    Some(registry.all_records().find(holds).unwrap().id.clone())
}

fn all_lead_to(guest: &Guest, kernel: &Kernel) -> [Option<String>; 3] {
    [TRACED, NOTRACE, OTHER].map(|function| leads_to(guest, kernel, function))
}

fn lead_to(expected: [&str; 3]) -> [Option<String>; 3] {
    expected.map(|id| (!id.is_empty()).then(|| id.to_owned()))
}

/// Which of the functions hold a jump.
fn jumps(guest: &Guest) -> [bool; 3] {
    [TRACED, NOTRACE, OTHER].map(|function| guest.bytes_at(place(guest, function), 1) == [0xe9])
}

/// A guest with v1 of a cumulative patch, for two of three functions.
fn with_v1() -> (Guest, Kernel) {
    let mut guest = Guest::new();
    let kernel = guest.kernel();
    apply(&guest, "v1", &cumulative("v1", &[TRACED, NOTRACE]));
    guest.ram.take_baseline();
    (guest, kernel)
}

fn v2() -> Vec<u8> {
    cumulative("v2", &[TRACED, OTHER])
}

#[test]
fn a_later_patch_takes_a_function_and_gives_it_back() {
    let mut guest = Guest::new();
    let kernel = guest.kernel();
    apply(&guest, "one", &livepatch("one", &returning_one(&[TRACED, NOTRACE])));
    guest.ram.take_baseline();
    apply(&guest, "two", &livepatch("two", &returning_one(&[NOTRACE, TRACED])));
    assert_eq!(patches(&guest, &kernel), in_force(&["one", "two"]));
    assert_eq!(all_lead_to(&guest, &kernel), lead_to(["two", "two", ""]));
    let live = kernel.live(&guest.ram);
    let covered = revert(&live, &registry(&guest, &kernel), "one").unwrap_err();
    assert!(
        matches!(&covered, RevertError::Covered { by, .. } if by == "two"),
        "{covered}"
    );
    take_out(&guest, "two");
    assert!(guest.ram.differences().is_empty());
    take_out(&guest, "one");
    assert_eq!(all_lead_to(&guest, &kernel), lead_to(["", "", ""]));
    assert!(registry(&guest, &kernel).entries.is_empty());
}

#[test]
fn a_task_in_the_covered_code_is_inside_an_old_function() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    apply(&guest, "one", &livepatch("one", &returning_one(&[TRACED])));
    let one = registry(&guest, &kernel).entries[0].record().unwrap().functions[0].new;
    write(&guest, process(1), "stuck", &[FUNCTIONS + 16, one + 5, START + 1]);
    let file = livepatch("two", &returning_one(&[TRACED]));
    let error = commit_plan(&guest, &kernel, &plan(&guest, &kernel, &file).unwrap()).unwrap_err();
    assert!(matches!(error, CommitError::NotSafe { .. }), "{error}");
}

#[test]
fn a_patch_that_replaces_all_others_takes_their_place_and_they_are_gone() {
    let guest = Guest::new();
    let (untouched, kernel) = (guest.clone(), guest.kernel());
    apply(&guest, "v1", &cumulative("v1", &[TRACED, NOTRACE]));
    apply(&guest, "more", &livepatch("more", &returning_one(&[OTHER])));
    let file = cumulative("v2", &[TRACED]);
    let planned = open(&guest)
        .check(
            PatchFile {
                name: "v2",
                bytes: &file,
            },
            &OPTIONS,
        )
        .unwrap();
    assert_eq!(planned.record.replaces, ["v1", "more"]);
    apply(&guest, "v2", &file);
    assert_eq!(patches(&guest, &kernel), in_force(&["v2"]));
    assert_eq!(all_lead_to(&guest, &kernel), lead_to(["v2", "", ""]));
    let names: Vec<_> = modules::all(&kernel.live(&guest.ram))
        .unwrap()
        .into_iter()
        .map(|one| one.name)
        .collect();
    assert_eq!(names, ["v2"]);
    let registry = registry(&guest, &kernel);
    let record = registry.entries[0].record().unwrap();
    assert_eq!(record.functions[0].redirect, Redirect::Ftrace);
    take_out(&guest, "v2");
    // The tree of modules counts its changes. The tree goes on counting where patches go in another order than the reverse of that in which they came.
    let counter = gpa(guest.symbol("mod_tree"));
    for (page, bytes) in guest.ram.differences() {
        let at = |index: usize| page + index as u64;
        let mut before = vec![0; bytes.len()];
        untouched.ram.read(Gpa(page), &mut before).unwrap();
        let changed = (0..bytes.len()).filter(|index| before[*index] != bytes[*index]);
        let changed: Vec<u64> = changed.map(at).collect();
        assert!(
            changed.iter().all(|at| (counter..counter + 4).contains(at)),
            "{changed:x?}"
        );
    }
}

/// vmpatch dies at a write, also in the middle of one, and perhaps its supervisor dies with it, or comes after the guest has run. Whoever comes
/// next finds v1 or v2 in force, wholly, and can go on.
#[test]
fn a_death_at_any_write_of_a_replacement_leaves_one_of_the_two_in_force() {
    let (start, kernel) = with_v1();
    let planned = plan(&start, &kernel, &v2()).unwrap();
    let journal = journal(&kernel.live(&start.ram), &planned).unwrap();
    let writes = (planned.staged.len() + planned.atomic.len()) as u64;
    let mut counts = [0; 2];
    for write in 0..writes {
        for fault in [Fault::Death(write), Fault::TornDeath(write)] {
            for supervisor in [None, Some(false), Some(true)] {
                let at = format!("{fault:?}, the supervisor: {supervisor:?}");
                let guest = start.clone();
                guest.ram.set_fault(Some(fault));
                commit_plan(&guest, &kernel, &planned).unwrap_err();
                guest.ram.set_fault(None);
                if let Some(has_run) = supervisor {
                    let before = jumps(&guest);
                    roll_back(&guest.ram, &mut Stopped::new(&guest), &journal, has_run).unwrap();
                    // A task may be in the middle of the bytes that a new jump would take.
                    let is_new = before.iter().zip(jumps(&guest)).any(|(before, after)| !before && after);
                    assert!(!(has_run && is_new), "{at}");
                }
                open(&guest).recover().unwrap();
                let is_new = match patches(&guest, &kernel) {
                    patches if patches == in_force(&["v1"]) => false,
                    patches if patches == in_force(&["v2"]) => true,
                    patches => panic!("{at}: {patches:?}"),
                };
                counts[usize::from(is_new)] += 1;
                let expected = if is_new { ["v2", "", "v2"] } else { ["v1", "v1", ""] };
                assert_eq!(all_lead_to(&guest, &kernel), lead_to(expected), "{at}");
                if !is_new {
                    assert!(guest.ram.differences().is_empty(), "{at}");
                    apply(&guest, "v2", &v2());
                }
                take_out(&guest, "v2");
                assert_eq!(all_lead_to(&guest, &kernel), lead_to(["", "", ""]), "{at}");
                assert!(registry(&guest, &kernel).entries.is_empty(), "{at}");
            }
        }
    }
    assert!(counts.iter().all(|count| *count > 3), "{counts:?}");
}

/// The replaced patch's code is removed in a pause of its own. Until then it is nobody's.
#[test]
fn a_replaced_patch_that_can_not_be_removed_yet_is_removed_by_the_next_vmpatch() {
    let (guest, kernel) = with_v1();
    let v1 = registry(&guest, &kernel).entries[0].record().unwrap().clone();
    // The guest holds a reference to v1's module.
    let counter = v1.registration.as_ref().unwrap().module + REFERENCES;
    let counter = kernel.space.translate(&guest.ram, Gva(counter)).unwrap().gpa.0;
    let unused = guest.ram.u64_at(counter);
    guest.ram.put_u64(counter, unused + 1);
    let mut opened = open(&guest);
    let file = v2();
    let applied = opened
        .apply(
            PatchFile {
                name: "v2",
                bytes: &file,
            },
            &OPTIONS,
        )
        .unwrap();
    let left = applied.left.unwrap();
    assert!(left.contains("references"), "{left}");
    let expected = vec![("v1".to_owned(), State::Replaced), ("v2".to_owned(), State::Applied)];
    assert_eq!(patches(&guest, &kernel), expected);
    assert_eq!(all_lead_to(&guest, &kernel), lead_to(["v2", "", "v2"]));
    open(&guest).recover().unwrap();
    assert_eq!(patches(&guest, &kernel), expected);
    guest.ram.put_u64(counter, unused);
    open(&guest).recover().unwrap();
    assert_eq!(patches(&guest, &kernel), in_force(&["v2"]));
}
