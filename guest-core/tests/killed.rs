//! vmpatch is killed at each write of a commit, and the guest runs on before its supervisor comes, as under KVM: see `commit::roll_back`.

mod common;

use common::guest::Guest;
use common::machine::Stopped;
use common::module::{Function, livepatch, livepatch_with_sections};
use common::patch::{commit_plan, plan, recover, registry, target};
use common::ram::Fault;
use guest_core::change::Change;
use guest_core::commit::{journal, roll_back};
use guest_core::machine::Journal;
use guest_core::plan::{Plan, recovery, revert};
use guest_core::registry::{Redirect, State};
use guest_core::{Gva, Kernel};

/// Functions with all kinds of redirects: behind the site, as the guest traces it; in the site; at the entry.
const FUNCTIONS: [&str; 3] = ["victim", "function_40", "notrace_victim"];

/// A guest that traces the first of them.
fn traced() -> Guest {
    let guest = Guest::new();
    let site = guest.symbol("victim") + 4;
    let record = guest_core::kernel::ftrace::record(&guest.kernel().live(&guest.ram), Gva(site));
    guest.put_u64(record.unwrap().unwrap().flags_at.0, 1 << 31 | 1);
    guest.put(site, &[0xe8, 1, 2, 3, 4]);
    guest
}

/// A patch whose revert wipes it.
fn wiped() -> Vec<u8> {
    livepatch_with_sections("fix", &FUNCTIONS)
}

/// A patch that hands out an address of its own, so that a revert keeps it: `lea new_victim(%rip),%rax; ret`.
fn kept() -> Vec<u8> {
    let code = [0x48, 0x8d, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xc3];
    let mut functions = FUNCTIONS.map(Function::returning_one);
    functions[0].code = code.to_vec();
    livepatch("fix", &functions)
}

/// A plan, and the guest that it is for, whose differences are told from there.
struct Case {
    name: &'static str,
    start: Guest,
    plan: Plan,
    journal: Journal,
}

fn cases(kernel: &Kernel) -> Vec<Case> {
    let mut cases = Vec::new();
    for (apply, out, recover_name, file) in [
        ("apply", "revert", "recovery", wiped()),
        ("apply what is kept", "revert that keeps", "recovery that keeps", kept()),
    ] {
        let mut add = |name, guest: &Guest, plan| {
            let mut start = guest.clone();
            start.ram.take_baseline();
            let journal = journal(&kernel.live(&start.ram), &plan).unwrap();
            cases.push(Case {
                name,
                start,
                plan,
                journal,
            });
        };
        let guest = traced();
        let first = plan(&guest, kernel, &file).unwrap();
        add(apply, &guest, first.clone());
        commit_plan(&guest, kernel, &first).unwrap();
        let taken_out = revert(&kernel.live(&guest.ram), &registry(&guest, kernel), "fix").unwrap();
        add(out, &guest, taken_out.clone());
        if file == kept() {
            let guest = guest.clone();
            commit_plan(&guest, kernel, &taken_out).unwrap();
            add("apply again", &guest, plan(&guest, kernel, &file).unwrap());
        }
        if file == wiped() {
            // No function is redirected yet.
            let guest = traced();
            let data = first.atomic.iter().take_while(|change| change.is_data());
            first
                .staged
                .iter()
                .chain(data)
                .for_each(|change| change.make(&guest.ram).unwrap());
            let rest = recovery(&kernel.live(&guest.ram), &registry(&guest, kernel)).unwrap();
            add("recovery without a jump", &guest, rest.unwrap());
        }
        // Every function is redirected, and the last word not written.
        first.atomic.last().unwrap().undone().make(&guest.ram).unwrap();
        let rest = recovery(&kernel.live(&guest.ram), &registry(&guest, kernel))
            .unwrap()
            .unwrap();
        add(recover_name, &guest, rest);
    }
    cases
}

/// The jumps of a plan: its changes of code at functions' sites, as the record has them.
fn jumps(plan: &Plan) -> Vec<&Change> {
    let of = |change: &&Change| plan.record.functions.iter().any(|one| one.jump == change.gpa().0);
    plan.record.changes.iter().filter(of).collect()
}

/// Jumps that stand whole, in their order.
fn standing(guest: &Guest, plan: &Plan) -> Vec<bool> {
    jumps(plan).iter().map(|jump| jump.verify(&guest.ram).is_ok()).collect()
}

/// The guest as vmpatch leaves it that dies at that write.
fn dead(case: &Case, kernel: &Kernel, fault: Fault) -> Guest {
    let guest = case.start.clone();
    guest.ram.set_fault(Some(fault));
    commit_plan(&guest, kernel, &case.plan).unwrap_err();
    guest.ram.set_fault(None);
    guest
}

fn faults(plan: &Plan) -> impl Iterator<Item = Fault> {
    let writes = (plan.staged.len() + plan.atomic.len()) as u64;
    (0..writes).flat_map(|write| [Fault::Death(write), Fault::TornDeath(write)])
}

/// A task may stand in the bytes of a function that a jump would take: nobody has checked the stacks since the guest runs.
#[test]
fn a_jump_is_only_written_in_the_pause_that_checked_the_stacks() {
    let kernel = traced().kernel();
    for case in cases(&kernel) {
        let kinds: Vec<_> = case.plan.record.functions.iter().map(|one| one.redirect).collect();
        assert_eq!(kinds, [Redirect::Body, Redirect::Ftrace, Redirect::Body]);
        let mut partly = 0;
        for fault in faults(&case.plan) {
            let guest = dead(&case, &kernel, fault);
            let before = standing(&guest, &case.plan);
            partly += u32::from(before.contains(&true) && before.contains(&false));
            for _ in 0..2 {
                roll_back(&guest.ram, &mut Stopped::new(&guest), &case.journal, true).unwrap();
                for (before, after) in before.iter().zip(standing(&guest, &case.plan)) {
                    assert!(*before || !after, "{}, {fault:?}", case.name);
                }
            }
        }
        assert!(partly >= 2 || case.name == "recovery without a jump", "{}", case.name);
    }
}

/// Half of a list or tree would lead the guest astray until the next vmpatch.
#[test]
fn lists_and_trees_of_the_guest_are_whole_as_soon_as_the_supervisor_was_there() {
    let kernel = traced().kernel();
    for case in cases(&kernel) {
        let words: Vec<_> = case
            .plan
            .atomic
            .iter()
            .filter(|change| change.what().contains("modules"))
            .collect();
        for fault in faults(&case.plan) {
            let guest = dead(&case, &kernel, fault);
            roll_back(&guest.ram, &mut Stopped::new(&guest), &case.journal, true).unwrap();
            let is_new = |change: &&&Change| change.is_made(&guest.ram).unwrap();
            let new = words.iter().filter(is_new).count();
            assert!(
                new == 0 || new == words.len(),
                "{}, {fault:?}: {new} of {}",
                case.name,
                words.len()
            );
        }
    }
}

/// What a supervisor leaves is whole, and the next vmpatch ends it.
#[test]
fn what_the_supervisor_leaves_is_wholly_old_or_new_once_the_next_vmpatch_has_recovered() {
    let kernel = traced().kernel();
    for case in cases(&kernel) {
        for fault in faults(&case.plan) {
            let name = format!("{}, {fault:?}", case.name);
            let guest = dead(&case, &kernel, fault);
            let complete = roll_back(&guest.ram, &mut Stopped::new(&guest), &case.journal, true).unwrap();
            recover(&guest, &kernel);
            let states: Vec<_> = registry(&guest, &kernel)
                .entries
                .iter()
                .map(|entry| entry.state)
                .collect();
            let standing = standing(&guest, &case.plan);
            match states.as_slice() {
                [] | [State::Kept] => assert_eq!(standing, [false; 3], "{name}"),
                [State::Applied] => assert_eq!(standing, [true; 3], "{name}"),
                _ => panic!("{name}: {states:?}"),
            }
            let is_apply = case.name.starts_with("apply");
            let is_applied = states == [State::Applied];
            // A revert that is not complete may be rolled back; a recovery ends without the patch.
            match complete {
                true => assert_eq!(is_applied, is_apply, "{name}"),
                false if case.name.starts_with("revert") => assert!(is_applied, "{name}"),
                false => assert!(!is_applied, "{name}"),
            }
            if is_applied {
                for function in &case.plan.record.functions {
                    let at = function.jump - common::guest::IMAGE_GPA + common::guest::IMAGE;
                    assert_eq!(target(&guest, at), function.new, "{name}");
                }
            }
        }
    }
}

/// A task may be in the new code, at any depth.
#[test]
fn new_code_that_a_jump_led_to_stays_and_is_known_to_the_guest_until_the_next_vmpatch() {
    let kernel = traced().kernel();
    for case in cases(&kernel).iter().filter(|case| case.name.starts_with("apply")) {
        let (mut left, mut completed) = (0, 0);
        for fault in faults(&case.plan) {
            let guest = dead(case, &kernel, fault);
            let has_jump = standing(&guest, &case.plan).contains(&true);
            let is_complete = roll_back(&guest.ram, &mut Stopped::new(&guest), &case.journal, true).unwrap();
            if !has_jump || is_complete {
                completed += u32::from(is_complete);
                continue;
            }
            left += 1;
            let memory = &guest.ram;
            let entry = registry(&guest, &kernel).entries.remove(0);
            let is_first = case.name != "apply again";
            let state = if is_first { State::Reverting } else { State::Reapplying };
            assert_eq!(entry.state, state, "{}, {fault:?}", case.name);
            let is_site = |change: &&Change| case.journal.sites.contains(change);
            let (_, words) = case.plan.atomic.split_last().unwrap();
            let text = case
                .plan
                .staged
                .iter()
                .find(|change| change.what().starts_with("arena page"));
            for change in words.iter().filter(|change| !is_site(change)).chain(text) {
                assert!(
                    change.is_made(memory).unwrap(),
                    "{}, {fault:?}: {}",
                    case.name,
                    change.what()
                );
            }
        }
        assert!(left >= 2 && completed >= 2, "{}: {left} {completed}", case.name);
    }
}

/// The guest is changing its lists, or has changed them since: what is half written there stays until the next vmpatch, which waits for the lock.
#[test]
fn words_of_lists_that_the_guest_uses_are_left_to_the_next_vmpatch() {
    let kernel = traced().kernel();
    let mut left = 0;
    for case in cases(&kernel)
        .iter()
        .filter(|case| ["apply", "revert"].contains(&case.name))
    {
        let first = case.plan.staged.len() as u64;
        for write in first..first + case.plan.atomic.len() as u64 {
            let guest = dead(case, &kernel, Fault::Death(write));
            let lock = guest.symbol("module_mutex");
            guest.put_u64(lock, common::guest::DIRECT);
            let words = || -> Vec<bool> {
                let data = case.plan.atomic.iter().filter(|change| change.is_data());
                let words = data.filter(|change| change.what().contains("modules"));
                words.map(|change| change.is_made(&guest.ram).unwrap()).collect()
            };
            let before = words();
            left += u32::from(before.contains(&true) && before.contains(&false));
            roll_back(&guest.ram, &mut Stopped::new(&guest), &case.journal, true).unwrap();
            assert_eq!(words(), before, "{}, {write}", case.name);
            guest.put_u64(lock, 0);
            recover(&guest, &kernel);
            assert!(
                registry(&guest, &kernel)
                    .entries
                    .iter()
                    .all(|entry| entry.state == State::Applied)
            );
        }
    }
    assert!(left > 4, "{left}");
}

/// Words that were restored one by one would be a mixture of two lists.
#[test]
fn lists_that_the_guest_has_changed_since_are_left_to_the_next_vmpatch() {
    let kernel = traced().kernel();
    let case = cases(&kernel).remove(0);
    let data = case.plan.atomic.iter().take_while(|change| change.is_data()).count();
    let guest = dead(&case, &kernel, Fault::Death((case.plan.staged.len() + data) as u64));
    // The guest loads another module: it is put in front of the patch's.
    let registry = registry(&guest, &kernel);
    let module = case.plan.record.registration.as_ref().unwrap().module;
    let ours = module + 8;
    let ours_gpa = ours - registry.alias.0 + registry.base.0;
    let (head, own) = (guest.symbol("modules"), common::guest::heap(0x1000) + 8);
    assert_eq!((guest.u64_at(head), guest.u64_at(head + 8)), (ours, ours));
    guest.put_u64(own, ours);
    guest.put_u64(own + 8, head);
    guest.ram.put_u64(ours_gpa + 8, own);
    guest.put_u64(head, own);
    let before = guest.ram.differences();
    assert!(!roll_back(&guest.ram, &mut Stopped::new(&guest), &case.journal, true).unwrap());
    assert!(guest.ram.differences() == before);
    recover(&guest, &kernel);
    assert_eq!((guest.u64_at(head), guest.u64_at(head + 8)), (own, own));
    assert_eq!((guest.u64_at(own), guest.u64_at(own + 8)), (head, head));
}
