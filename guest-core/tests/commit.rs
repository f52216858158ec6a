//! Commits in guests made by hand: faults at every write, deaths, guests that are in the way, forged records.

mod common;

use common::guest::{CAVE, Choice, DIRECT, ETEXT, FUNCTIONS, Guest, SITE_NOP, gpa};
use common::machine::{Stopped, Vm};
use common::patch::{OPTIONS, commit_plan, patched, plan, plan_for, recover, registry, target, two, two_with_sections};
use common::ram::Fault;
use common::tasks::{START, process, write};
use guest_core::change::Change;
use guest_core::commit::{
    CommitError, CommitOptions, Committed, Effect, Model, NotSafe, commit, journal, roll_back, stage,
};
use guest_core::kernel::locks::Held;
use guest_core::plan::{Plan, cleanup, recovery, revert};
use guest_core::registry::State;
use guest_core::{Gpa, Kernel};
use std::time::Duration;

/// How many writes a plan takes.
fn writes(plan: &Plan) -> u64 {
    (plan.staged.len() + plan.atomic.len()) as u64
}

/// One write fails, and the commit takes everything back: no byte of the guest differs.
#[test]
fn a_write_that_fails_anywhere_leaves_the_guest_as_it_was() {
    let (sound, kernel) = (Guest::new(), Guest::new().kernel());
    let (applied, _) = patched();
    let plans = [
        plan(&sound, &kernel, &two_with_sections()).unwrap(),
        revert(&kernel.live(&applied.ram), &registry(&applied, &kernel), "fix").unwrap(),
    ];
    for (start, plan) in [&sound, &applied].into_iter().zip(plans) {
        let mut write = 0;
        loop {
            let guest = start.clone();
            guest.ram.set_fault(Some(Fault::Once(write)));
            if commit_plan(&guest, &kernel, &plan).is_ok() {
                break;
            }
            assert!(guest.ram.differences().is_empty(), "write {write}");
            write += 1;
        }
        assert!(write >= writes(&plan), "{write}");
    }
}

/// vmpatch dies at a write, also in the middle of one; its supervisor rolls back what was not complete.
#[test]
fn a_death_at_any_write_is_made_harmless_by_the_supervisor() {
    let (sound, kernel) = (Guest::new(), Guest::new().kernel());
    let (applied, _) = patched();
    let plans = [
        plan(&sound, &kernel, &two_with_sections()).unwrap(),
        revert(&kernel.live(&applied.ram), &registry(&applied, &kernel), "fix").unwrap(),
    ];
    for (start, plan) in [&sound, &applied].into_iter().zip(plans) {
        let journal = journal(&kernel.live(&start.ram), &plan).unwrap();
        let last = writes(&plan) - 1;
        for write in 0..=last {
            for fault in [Fault::Death(write), Fault::TornDeath(write)] {
                let guest = start.clone();
                guest.ram.set_fault(Some(fault));
                commit_plan(&guest, &kernel, &plan).unwrap_err();
                guest.ram.set_fault(None);
                let mut stopped = Stopped::new(&guest);
                let complete = roll_back(&guest.ram, &mut stopped, &journal, false).unwrap();
                // Half of the last word is all of the state: everything else was written before.
                assert!(!complete || fault == Fault::TornDeath(last), "{fault:?}");
                assert!(complete || guest.ram.differences().is_empty(), "{fault:?}");
            }
        }
    }
}

/// The supervisor died, too: the next vmpatch finds in the guest what there is to undo.
#[test]
fn a_death_at_any_write_is_mended_by_the_next_vmpatch() {
    let (sound, kernel) = (Guest::new(), Guest::new().kernel());
    let plan = plan(&sound, &kernel, &two()).unwrap();
    for write in 0..writes(&plan) {
        let guest = sound.clone();
        guest.ram.set_fault(Some(Fault::Death(write)));
        commit_plan(&guest, &kernel, &plan).unwrap_err();
        guest.ram.set_fault(None);
        recover(&guest, &kernel);
        assert!(guest.ram.differences().is_empty(), "write {write}");
    }
}

/// The same for a revert, whose pause may have been cut off between two functions: it is still in force, and reverted anew.
#[test]
fn a_revert_whose_vmpatch_and_supervisor_died_at_any_write_can_be_made_again() {
    let (applied, kernel) = patched();
    let plan = revert(&kernel.live(&applied.ram), &registry(&applied, &kernel), "fix").unwrap();
    let carry_on = |guest: &Guest| {
        recover(guest, &kernel);
        if let Some(entry) = registry(guest, &kernel).entries.first() {
            // Killed before the first write of the pause: it is in force.
            assert_eq!(entry.state, State::Applied);
            let again = revert(&kernel.live(&guest.ram), &registry(guest, &kernel), "fix").unwrap();
            commit_plan(guest, &kernel, &again).unwrap();
            recover(guest, &kernel);
        }
        // The number of the guest's tree of modules only counts on where the last of its words was written, and not the number.
        guest.put(guest.symbol("mod_tree"), &[0; 4]);
        guest.ram.differences()
    };
    let whole = carry_on(&applied.clone());
    for write in 0..writes(&plan) {
        let guest = applied.clone();
        guest.ram.set_fault(Some(Fault::Death(write)));
        commit_plan(&guest, &kernel, &plan).unwrap_err();
        guest.ram.set_fault(None);
        assert!(carry_on(&guest) == whole, "write {write}");
    }
}

/// Any writes fail, of the commit and of its rollback, some of them halfway; what is left is rolled back later.
#[test]
fn whatever_writes_fail_the_guest_is_as_before_once_it_is_taken_back() {
    let (sound, kernel) = (Guest::new(), Guest::new().kernel());
    let plan = plan(&sound, &kernel, &two_with_sections()).unwrap();
    let journal = journal(&kernel.live(&sound.ram), &plan).unwrap();
    let (mut at_once, mut later, mut committed) = (0, 0, 0);
    for seed in 1..=600 {
        let guest = sound.clone();
        // From a fault in most commits to one in every fourth write.
        let chance = [4, 16, 64][seed as usize % 3];
        guest
            .ram
            .set_fault(Some(Fault::Random(seed << 32 | 0x9e37_79b9, chance)));
        let result = commit_plan(&guest, &kernel, &plan);
        guest.ram.set_fault(None);
        match result {
            Ok(()) => {
                committed += 1;
                assert_eq!(registry(&guest, &kernel).entries[0].state, State::Applied, "{seed}");
            }
            Err(CommitError::HalfDone { .. }) => {
                later += 1;
                let mut stopped = Stopped::new(&guest);
                let complete = roll_back(&guest.ram, &mut stopped, &journal, false).unwrap();
                assert!(complete || guest.ram.differences().is_empty(), "{seed}");
            }
            Err(_) => {
                at_once += 1;
                assert!(guest.ram.differences().is_empty(), "{seed}");
            }
        }
    }
    assert!(
        at_once > 100 && later > 100 && committed > 10,
        "{at_once} {later} {committed}"
    );
}

/// Should the pause end in between, what leads into the new code must not outlive what the guest knows of it.
#[test]
fn a_revert_puts_the_code_back_before_the_guest_forgets_the_new_one() {
    let (guest, kernel) = patched();
    let live = kernel.live(&guest.ram);
    let plan = revert(&live, &registry(&guest, &kernel), "fix").unwrap();
    let mut vm = Vm::new(&guest);
    commit(&live, &mut vm, &plan, &OPTIONS).unwrap();
    // Alone what is written in front of the code: the state, and the bits of ftrace's records.
    let expected = patched().0;
    let bits = plan.atomic.iter().take_while(|change| change.is_data());
    let bits: Vec<_> = bits
        .inspect(|bit| assert!(bit.what().contains("ftrace flags")))
        .collect();
    plan.staged
        .iter()
        .chain(bits)
        .for_each(|change| change.make(&expected.ram).unwrap());
    assert!(vm.before_code == Some(expected.ram.differences()));
}

/// A pause is over sooner, and code comes before all that the guest knows of it.
#[test]
fn of_a_revert_only_jumps_and_the_text_are_written_as_code() {
    let (guest, kernel) = patched();
    let plan = revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap();
    let code = plan.atomic.iter().filter(|change| !change.is_data());
    let code: Vec<_> = code.map(Change::what).collect();
    assert_eq!(code, ["jump of notrace_victim", "jump of victim", "the patch's text"]);
}

/// The VMM does not answer in time, but has what it was to write, and gets to it later.
#[test]
fn writes_that_come_late_are_taken_back_too() {
    let (guest, kernel) = (Guest::new(), Guest::new().kernel());
    let plan = plan(&guest, &kernel, &two_with_sections()).unwrap();
    let mut vm = Vm::new(&guest);
    vm.is_late = true;
    let error = commit(&kernel.live(&guest.ram), &mut vm, &plan, &OPTIONS).unwrap_err();
    assert!(matches!(error, CommitError::Machine(_)), "{error}");
    assert!(guest.ram.differences().is_empty());
}

#[test]
fn a_patch_is_in_force_also_where_the_supervisor_died_with_the_commit() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan(&guest, &kernel, &two()).unwrap();
    let mut vm = Vm::new(&guest);
    vm.supervisor_dies = true;
    commit(&kernel.live(&guest.ram), &mut vm, &plan, &OPTIONS).unwrap();
    assert_eq!(registry(&guest, &kernel).entries[0].state, State::Applied);
}

/// The error says what is in the guest, and the journal stays outstanding, so that the supervisor resumes it.
#[test]
fn a_guest_that_does_not_run_again_is_left_to_the_supervisor() {
    let (sound, kernel) = (Guest::new(), Guest::new().kernel());
    let plan = plan(&sound, &kernel, &two()).unwrap();
    let last = writes(&plan) - 1;
    let paused_from = plan.staged.len() as u64;
    let faults = (paused_from..=last).map(|write| Some(Fault::Once(write)));
    for fault in faults.chain([Some(Fault::Death(last)), None]) {
        let guest = sound.clone();
        guest.ram.set_fault(fault);
        let mut vm = Vm::new(&guest);
        vm.stays_paused = true;
        let error = commit(&kernel.live(&guest.ram), &mut vm, &plan, &OPTIONS).unwrap_err();
        guest.ram.set_fault(None);
        let effect = match fault {
            None => Effect::InForce,
            Some(Fault::Death(_)) => Effect::HalfPatched,
            Some(_) => Effect::AsBefore,
        };
        assert!(error.left_paused() && error.effect() == effect, "{fault:?}: {error}");
        let journal = vm.journal.expect("somebody still watches");
        let complete = roll_back(&guest.ram, &mut Stopped::new(&guest), &journal, false).unwrap();
        assert_eq!(complete, effect == Effect::InForce, "{fault:?}");
        assert_eq!(guest.ram.differences().is_empty(), !complete, "{fault:?}");
    }
}

/// Nothing was written, and nobody knows whether it runs.
#[test]
fn a_guest_that_does_not_run_again_after_a_try_is_told_as_before() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    let mut vm = Vm::new(&guest);
    (vm.stays_paused, vm.elapsed) = (true, Duration::from_secs(2));
    let error = commit(&kernel.live(&guest.ram), &mut vm, &plan, &OPTIONS).unwrap_err();
    assert!(error.left_paused() && error.effect() == Effect::AsBefore, "{error}");
    assert!(vm.journal.is_some() && vm.pauses == 1);
}

#[test]
fn a_task_inside_the_old_function_keeps_it_as_it_is() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    write(
        &guest,
        process(1),
        "stuck",
        &[FUNCTIONS + 16, FUNCTIONS + 64 * 3 + 20, START + 1],
    );
    let before = guest.ram.differences();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    let mut vm = Vm::new(&guest);
    let options = CommitOptions {
        timeout: Duration::from_millis(5),
        ..OPTIONS
    };
    let error = commit(&kernel.live(&guest.ram), &mut vm, &plan, &options).unwrap_err();
    assert_eq!((vm.pauses, vm.journal.clone()), (0, None));
    let CommitError::NotSafe { why_text, tries, .. } = error else {
        panic!()
    };
    assert!(
        why_text.contains("stuck (pid 101) is inside victim") && tries > 1,
        "{why_text}"
    );
    assert!(guest.ram.differences() == before);
    let none = CommitOptions {
        model: Model::None,
        ..OPTIONS
    };
    commit(&kernel.live(&guest.ram), &mut Vm::new(&guest), &plan, &none).unwrap();
    target(&guest, guest.symbol("victim") + 4);
}

/// Whether the guest has neither the patch's code nor a jump to it.
fn is_unpatched(guest: &Guest) -> bool {
    guest.bytes_at(guest.symbol("victim") + 4, 5) == SITE_NOP && guest.bytes_at(CAVE, 8) == [0xcc; 8]
}

/// Why a commit was not safe; none where it was made.
fn held(result: Result<Committed, CommitError>) -> Option<Held> {
    match result {
        Ok(_) => None,
        Err(CommitError::NotSafe {
            why: NotSafe::Held(held),
            ..
        }) => Some(held),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_guest_that_goes_on_changing_its_text_is_not_paused() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    for model in [Model::CleanCut, Model::None] {
        guest.put_u64(guest.symbol("text_mutex"), DIRECT);
        let mut vm = Vm::new(&guest);
        let result = commit(
            &kernel.live(&guest.ram),
            &mut vm,
            &plan,
            &CommitOptions { model, ..OPTIONS },
        );
        assert_eq!(held(result).unwrap().name, "text_mutex");
        assert_eq!(vm.pauses, 0);
        assert!(is_unpatched(&guest));
    }
}

#[test]
fn a_guest_that_begins_to_change_its_text_before_the_pause_is_left_alone() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    let mut vm = Vm::new(&guest);
    vm.last_write = Some((Gpa(gpa(guest.symbol("text_mutex"))), DIRECT));
    let result = commit(&kernel.live(&guest.ram), &mut vm, &plan, &OPTIONS);
    assert_eq!(held(result).unwrap().name, "text_mutex");
    assert_eq!(vm.pauses, 1);
    assert!(is_unpatched(&guest));
}

#[test]
fn a_pause_that_is_too_long_changes_nothing() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    let mut vm = Vm::new(&guest);
    vm.elapsed = Duration::from_secs(2);
    let options = CommitOptions {
        timeout: Duration::from_millis(50),
        ..OPTIONS
    };
    let error = commit(&kernel.live(&guest.ram), &mut vm, &plan, &options).unwrap_err();
    let CommitError::NotSafe { why, why_text, .. } = error else {
        panic!("{error}")
    };
    let (took_us, allowed_us) = (2_000_000, 1_000_000);
    assert_eq!(why, NotSafe::TooLong { took_us, allowed_us }, "{why_text}");
    assert!(guest.ram.differences().is_empty());
}

#[test]
fn a_guest_that_changed_since_the_plan_is_left_alone() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    guest.put(guest.symbol("victim") + 4, &[0xe8, 9, 9, 9, 9]);
    let before = guest.ram.differences();
    let error = commit_plan(&guest, &kernel, &plan).unwrap_err();
    assert!(matches!(error, CommitError::Changed(_)), "{error}");
    assert!(guest.ram.differences() == before);
}

/// What the guest wrote where a change was still to be made is the guest's: a rollback must not restore what was there
/// when the plan was made.
#[test]
fn undoing_leaves_alone_what_the_guest_wrote_meanwhile() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    let window = plan
        .staged
        .iter()
        .find(|change| change.what().contains("page-directory"))
        .unwrap()
        .gpa();
    let site = guest.symbol("victim") + 4;
    guest.ram.put_u64(window.0, 0x5063);
    guest.put(site, &[0xe8, 1, 2, 3, 4]);
    let before = guest.ram.differences();
    commit_plan(&guest, &kernel, &plan).unwrap_err();
    assert!(guest.ram.differences() == before, "undone by the commit");
    let journal = journal(&kernel.live(&guest.ram), &plan).unwrap();
    let mut stopped = Stopped::new(&guest);
    roll_back(&guest.ram, &mut stopped, &journal, false).unwrap();
    assert!(guest.ram.differences() == before, "undone by the supervisor");
}

/// vmpatch and its supervisor died before the pause; the guest then began to trace the function. The next vmpatch finds
/// the patch half committed, and must not take the tracer's call away.
#[test]
fn recovery_leaves_a_site_alone_that_the_guest_traces_since() {
    let guest = Guest::new();
    let kernel = guest.kernel();
    let plan = plan_for(&guest, &kernel, "victim").unwrap();
    stage(&kernel.live(&guest.ram), &plan.staged).unwrap();
    let site = guest.symbol("victim") + 4;
    guest.put(site, &[0xe8, 1, 2, 3, 4]);
    recover(&guest, &kernel);
    assert_eq!(guest.bytes_at(site, 5), [0xe8, 1, 2, 3, 4]);
    assert_eq!(guest.ram.differences().len(), 1);
}

/// A record in the guest is the guest's word: changes that lie outside of RAM, or that say what is not there.
#[test]
fn a_forged_record_makes_revert_an_error_and_changes_nothing() {
    for (at, len) in [
        (u64::MAX - 2, 5),
        (16 << 20, 5),
        (gpa(ETEXT) - 2, 5),
        (gpa(FUNCTIONS), 0),
    ] {
        let (guest, kernel) = patched();
        let live = kernel.live(&guest.ram);
        let mut registry = registry(&guest, &kernel);
        let record = registry.entries[0].record.as_mut().unwrap();
        record.changes = vec![Change::replace("forged", Gpa(at), vec![1; len], vec![2; len])];
        record.text.len = u64::MAX;
        record.text.start = u64::MAX;
        let plan = revert(&live, &registry, "fix").unwrap();
        if len != 0 {
            commit_plan(&guest, &kernel, &plan).unwrap_err();
            assert!(guest.ram.differences().is_empty(), "{at:#x}");
        }
        // Nothing is left to do of a patch in force: other commands go on.
        assert!(recovery(&live, &registry).unwrap().is_none());
        assert!(cleanup(&live, &registry).unwrap().is_empty());
        assert!(plan.atomic.iter().all(|change| change.len() <= 2 << 20));
    }
}

#[test]
fn every_form_of_a_kernel_is_patched_and_given_back() {
    for release in common::kallsyms::RELEASES {
        for five_levels in [false, true] {
            let guest = Guest::with(Choice {
                release,
                five_levels,
                isolated: true,
                ..Default::default()
            });
            let kernel = guest.kernel();
            let model = CommitOptions {
                model: Model::None,
                ..OPTIONS
            };
            let carry = |plan: &Plan| commit(&kernel.live(&guest.ram), &mut Vm::new(&guest), plan, &model).unwrap();
            carry(&plan(&guest, &kernel, &two()).unwrap());
            carry(&revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap());
            mend_without_stacks(&guest, &kernel);
            assert!(guest.ram.differences().is_empty(), "{release:?} {five_levels}");
        }
    }
}

fn mend_without_stacks(guest: &Guest, kernel: &Kernel) {
    let live = kernel.live(&guest.ram);
    stage(&live, &cleanup(&live, &registry(guest, kernel)).unwrap()).unwrap();
}
