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
    grace: Duration::ZERO,
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

/// vmpatch dies at a write, also in the middle of one, and perhaps its supervisor dies with it, or comes after the guest has run. Who comes
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

/// Has the guest hold a reference to the module of v1, its only patch. Gives where the references are counted, and the count before.
fn refer_to_v1(guest: &Guest, kernel: &Kernel) -> (u64, u64) {
    let registry = registry(guest, kernel);
    let v1 = registry.entries[0].record().unwrap();
    let counter = v1.registration.as_ref().unwrap().module + REFERENCES;
    let counter = kernel.space.translate(&guest.ram, Gva(counter)).unwrap().gpa.0;
    let unused = guest.ram.u64_at(counter);
    guest.ram.put_u64(counter, unused + 1);
    (counter, unused)
}

/// The replaced patch's code is removed in a pause of its own. Until then it is nobody's.
#[test]
fn a_replaced_patch_that_can_not_be_removed_yet_is_removed_by_the_next_vmpatch() {
    let (guest, kernel) = with_v1();
    let (counter, unused) = refer_to_v1(&guest, &kernel);
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

/// A function of that many bytes.
fn padded(old: &'static str, len: usize) -> Function {
    let mut function = Function::returning_one(old);
    let len = len.max(function.code.len());
    function.code.resize(len, 0xcc);
    function
}

/// Some bytes of v2's jump are those of v1's, the others those of the NOP: it is no torn jump of v1.
#[test]
fn the_removal_of_v1_leaves_the_jump_of_v2_whatever_its_bytes_are() {
    let clean = Guest::new();
    let site = clean.symbol(TRACED) + 4;
    // The third byte of the jump is to be 0x44, that of the NOP.
    let offset = (1..16u64)
        .map(|n| n << 8)
        .find(|offset| (offset.wrapping_sub(site + 5) >> 8) & 0xf == 4)
        .unwrap();
    let functions = [padded(OTHER, offset as usize), padded(TRACED, 16)];
    let mut met = 0;
    for pad in 0..17 {
        let mut guest = Guest::new();
        let kernel = guest.kernel();
        apply(&guest, "x", &livepatch("x", &[padded(NOTRACE, (pad << 12) + 16)]));
        apply(&guest, "v1", &livepatch("v1", &functions));
        guest.ram.take_baseline();
        let bytes = livepatch_that_replaces("v2", &functions);
        let planned = plan(&guest, &kernel, &bytes).unwrap();
        let to = planned.record.functions[1].new;
        let third = (to.wrapping_sub(site + 5) >> 8) & 0xff;
        apply(&guest, "v2", &bytes);
        let found = guest.bytes_at(site, 5);
        if third == 0x44 {
            met += 1;
            assert_eq!(found[0], 0xe9, "pad {pad}");
        }
    }
    assert!(met > 0);
}

/// The guest has run when the supervisor comes.
#[test]
fn a_death_in_the_removal_of_v1_leaves_the_sites_of_v2() {
    let (guest, kernel) = with_v1();
    let (counter, unused) = refer_to_v1(&guest, &kernel);
    let file = v2();
    open(&guest)
        .apply(
            PatchFile {
                name: "v2",
                bytes: &file,
            },
            &OPTIONS,
        )
        .unwrap();
    guest.ram.put_u64(counter, unused);
    let live = kernel.live(&guest.ram);
    let planned = guest_core::plan::discard(&live, &registry(&guest, &kernel))
        .unwrap()
        .unwrap();
    let journal = journal(&live, &planned).unwrap();
    let record = registry(&guest, &kernel).records().next().unwrap().clone();
    assert_eq!(record.id, "v2");
    let mut bad = Vec::new();
    for write in 0..planned.atomic.len() as u64 {
        for fault in [Fault::Death(write), Fault::TornDeath(write)] {
            let guest = guest.clone();
            guest.ram.set_fault(Some(fault));
            commit_plan(&guest, &kernel, &planned).unwrap_err();
            guest.ram.set_fault(None);
            roll_back(&guest.ram, &mut Stopped::new(&guest), &journal, true).unwrap();
            let lost: Vec<_> = record
                .changes
                .iter()
                .filter(|c| !c.is_made(&guest.ram).unwrap())
                .map(|c| c.what())
                .collect();
            if !lost.is_empty() {
                bad.push(format!("{fault:?}: {lost:?}"));
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

/// A released function with an ftrace site: where its jump is still there, so is the bit that keeps ftrace from it.
#[test]
fn a_death_in_a_replacement_never_leaves_a_jump_in_an_enabled_site() {
    let mut start = Guest::new();
    let kernel = start.kernel();
    apply(&start, "v1", &cumulative("v1", &[TRACED, OTHER]));
    start.ram.take_baseline();
    let v1 = registry(&start, &kernel).entries[0].record().unwrap().clone();
    let planned = plan(&start, &kernel, &cumulative("v2", &[TRACED, NOTRACE])).unwrap();
    let journal = journal(&kernel.live(&start.ram), &planned).unwrap();
    let writes = (planned.staged.len() + planned.atomic.len()) as u64;
    let mut bad = Vec::new();
    for write in 0..writes {
        for fault in [Fault::Death(write), Fault::TornDeath(write)] {
            let guest = start.clone();
            guest.ram.set_fault(Some(fault));
            commit_plan(&guest, &kernel, &planned).unwrap_err();
            guest.ram.set_fault(None);
            roll_back(&guest.ram, &mut Stopped::new(&guest), &journal, true).unwrap();
            let jump = guest.bytes_at(place(&guest, OTHER), 1) == [0xe9];
            let flag = v1
                .changes
                .iter()
                .find(|c| c.what() == "ftrace flags of vfs_read")
                .unwrap();
            if jump && !flag.is_made(&guest.ram).unwrap() {
                bad.push(format!("{fault:?}"));
            }
        }
    }
    assert!(bad.is_empty(), "{writes} writes: {bad:?}");
}

/// Both die in a replacement, and then the recovery dies after the guest has run.
#[test]
fn a_death_in_the_recovery_of_a_replacement_leaves_v1_whole() {
    let (start, kernel) = with_v1();
    let planned = plan(&start, &kernel, &v2()).unwrap();
    let writes = (planned.staged.len() + planned.atomic.len()) as u64;
    let mut bad = Vec::new();
    for write in 0..writes {
        let cut = start.clone();
        cut.ram.set_fault(Some(Fault::Death(write)));
        commit_plan(&cut, &kernel, &planned).unwrap_err();
        cut.ram.set_fault(None);
        let live = kernel.live(&cut.ram);
        let Some(recovery) = guest_core::plan::recovery(&live, &registry(&cut, &kernel)).unwrap() else {
            continue;
        };
        let journal = journal(&live, &recovery).unwrap();
        for second in 0..(recovery.staged.len() + recovery.atomic.len()) as u64 {
            let guest = cut.clone();
            guest.ram.set_fault(Some(Fault::TornDeath(second)));
            commit_plan(&guest, &kernel, &recovery).unwrap_err();
            guest.ram.set_fault(None);
            roll_back(&guest.ram, &mut Stopped::new(&guest), &journal, true).unwrap();
            open(&guest).recover().unwrap();
            let (now, lead) = (patches(&guest, &kernel), all_lead_to(&guest, &kernel));
            let whole = lead_to(["v1", "v1", ""]);
            if now == in_force(&["v1"]) && lead != whole {
                bad.push(format!("{write}, {second}: {lead:?}"));
            }
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}
