//! Transitions, in guests made by hand: how one begins, ends, is reverted, and is cut off at every write.

mod common;

use common::guest::{FUNCTIONS, Guest, gpa, per_cpu_area};
use common::machine::{Stopped, Vm};
use common::module::{Function, livepatch_with_orc};
use common::patch::{registry, target};
use common::ram::{Fault, Ram};
use common::tasks::{PATCH_STATE, STACK, START, Task, idle, process, write};
use guest_core::commit::{CommitError, CommitOptions, Model, commit, journal, roll_back};
use guest_core::guest::{Embedded, Guest as Opened, GuestState, PatchError, PatchFile, PatchOptions};
use guest_core::kernel::patch_state::Mark;
use guest_core::plan::{self, ApplyOptions, Plan};
use guest_core::registry::State;
use guest_core::{Gpa, Kernel, PhysMemory};
use std::time::Duration;

const OPTIONS: PatchOptions = PatchOptions {
    model: Model::Hybrid,
    timeout: Duration::ZERO,
    grace: Duration::ZERO,
};
const COMMIT: CommitOptions = CommitOptions {
    model: Model::Hybrid,
    timeout: Duration::ZERO,
    pause_max: Duration::from_secs(1),
};
/// Index of RSP among the general registers.
const RSP: usize = 4;
const PATCHED: [&str; 2] = ["victim", "vfs_read"];
/// The flag's byte and bit: flag 9 of the first word.
const FLAG: (u64, u8) = (1, 2);

fn module() -> Vec<u8> {
    livepatch_with_orc("fix", &PATCHED.map(Function::returning_one))
}

fn open(guest: &Guest) -> Opened<Embedded<&Ram, Vm<'_>>> {
    Opened::open(Embedded {
        memory: &guest.ram,
        machine: Vm::new(guest),
    })
    .unwrap()
}

/// Has a process sleep in the first function, or not any more.
fn sleep_inside(guest: &Guest, is_inside: bool) {
    let inside = guest.symbol(PATCHED[0]) + 0x20;
    let returns = [FUNCTIONS + 16, inside, START + 1];
    write_marked(guest, process(1), if is_inside { &returns } else { &returns[2..] });
}

/// Writes a stack, and leaves the mark.
fn write_marked(guest: &Guest, task: Task, returns: &[u64]) {
    let mark = guest.bytes_at(task.at + PATCH_STATE, 4);
    write(guest, task, "stuck", returns);
    guest.put(task.at + PATCH_STATE, &mark);
}

/// A guest with such a process, as the state that differences are told from.
fn with_sleeper() -> (Guest, Kernel) {
    let mut guest = Guest::new();
    let kernel = guest.kernel();
    sleep_inside(&guest, true);
    guest.ram.take_baseline();
    (guest, kernel)
}

fn tasks() -> Vec<Task> {
    (0..4).map(process).chain((0..2).map(idle)).collect()
}

fn is_marked(guest: &Guest, task: Task) -> bool {
    let is_marked = guest.bytes_at(task.at + PATCH_STATE, 4) != [0xff; 4];
    let flag = guest.bytes_at(task.at + FLAG.0, 1)[0] & FLAG.1 != 0;
    assert!(is_marked || !flag, "a flag without a mark");
    is_marked
}

fn marked(guest: &Guest) -> Vec<u32> {
    let marked = tasks().into_iter().filter(|task| is_marked(guest, *task));
    marked.map(|task| task.pid).collect()
}

fn owner(guest: &Guest) -> u64 {
    guest.u64_at(guest.symbol("klp_transition_patch"))
}

fn states(guest: &Guest, kernel: &Kernel) -> Vec<State> {
    registry(guest, kernel)
        .entries
        .iter()
        .map(|entry| entry.state)
        .collect()
}

/// Where a function leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leads {
    Old,
    New,
    Trampoline,
}

fn leads(guest: &Guest, kernel: &Kernel) -> [Leads; 2] {
    let registry = registry(guest, kernel);
    PATCHED.map(|name| {
        let site = guest.symbol(name) + 4;
        if guest.bytes_at(site, 1) != [0xe9] {
            assert_eq!(guest.bytes_at(site, 5), Guest::new().bytes_at(site, 5));
            return Leads::Old;
        }
        let record = registry.entries[0].record().unwrap();
        let function = record.functions.iter().find(|one| one.name == name).unwrap();
        match target(guest, site) {
            to if to == function.new => Leads::New,
            to => {
                assert_eq!(Some(to), function.trampoline);
                Leads::Trampoline
            }
        }
    })
}

fn begin(guest: &Guest) {
    let bytes = module();
    let mut opened = open(guest);
    let file = PatchFile {
        name: "fix",
        bytes: &bytes,
    };
    let failure = opened.apply(file, &OPTIONS).unwrap_err();
    assert!(matches!(failure, PatchError::InTransition { .. }), "{failure}");
    assert_eq!(failure.guest_state(), GuestState::InTransition);
}

fn begun() -> (Guest, Kernel) {
    let (mut guest, kernel) = with_sleeper();
    begin(&guest);
    guest.ram.take_baseline();
    (guest, kernel)
}

#[test]
fn only_the_task_inside_is_marked_and_the_transition_ends_when_it_has_left() {
    let (guest, kernel) = with_sleeper();
    begin(&guest);
    assert_eq!(states(&guest, &kernel), [State::Transition]);
    assert_eq!(leads(&guest, &kernel), [Leads::Trampoline; 2]);
    assert_eq!(marked(&guest), [process(1).pid]);
    assert_ne!(owner(&guest), 0);
    let told = open(&guest).in_transition().unwrap().unwrap();
    assert_eq!((told.id.as_str(), told.tasks, told.marked.len()), ("fix", 6, 1));
    assert_eq!(told.inside[0].function, PATCHED[0]);
    // The next vmpatch leaves it as it is.
    open(&guest).recover().unwrap();
    assert_eq!(marked(&guest), [process(1).pid]);

    sleep_inside(&guest, false);
    let finished = open(&guest).finish(Duration::ZERO).unwrap().unwrap();
    assert!(finished.by_task);
    assert_eq!(states(&guest, &kernel), [State::Applied]);
    assert_eq!(leads(&guest, &kernel), [Leads::New; 2]);
    assert_eq!((marked(&guest), owner(&guest)), (vec![], 0));
    assert!(open(&guest).finish(Duration::ZERO).unwrap().is_none());

    open(&guest).revert("fix", &OPTIONS).unwrap();
    assert_eq!(leads_old(&guest), [true; 2]);
    assert!(states(&guest, &kernel).is_empty());
}

fn leads_old(guest: &Guest) -> [bool; 2] {
    PATCHED.map(|name| guest.bytes_at(guest.symbol(name) + 4, 1) != [0xe9])
}

#[test]
fn the_same_apply_again_goes_on_with_the_transition() {
    let (guest, kernel) = with_sleeper();
    begin(&guest);
    begin(&guest);
    sleep_inside(&guest, false);
    let bytes = module();
    let file = PatchFile {
        name: "fix",
        bytes: &bytes,
    };
    assert!(open(&guest).apply(file, &OPTIONS).unwrap().by_task);
    assert_eq!(states(&guest, &kernel), [State::Applied]);
}

/// A task that has left, and never returns to user mode, loses its mark while another one still sleeps inside.
#[test]
fn a_marked_task_that_has_left_loses_its_mark_although_another_one_is_inside() {
    let (guest, kernel) = with_sleeper();
    write(
        &guest,
        process(2),
        "stuck",
        &[guest.symbol(PATCHED[1]) + 0x20, START + 1],
    );
    begin(&guest);
    assert_eq!(marked(&guest), [process(1).pid, process(2).pid]);
    sleep_inside(&guest, false);
    let failure = open(&guest).finish(Duration::ZERO).unwrap_err();
    assert_eq!(failure.guest_state(), GuestState::InTransition);
    assert_eq!(marked(&guest), [process(2).pid]);
    assert_eq!(leads(&guest, &kernel), [Leads::Trampoline; 2]);
}

/// The counts of a task that was switched to are those of before: only the CPU tells that it runs, and where.
#[test]
fn a_marked_task_that_begins_to_run_right_before_the_pause_keeps_its_mark() {
    let (guest, kernel) = with_sleeper();
    let inside = guest.symbol(PATCHED[1]) + 0x20;
    write(&guest, process(2), "worker", &[inside, START + 1]);
    begin(&guest);
    write_marked(&guest, process(2), &[START + 1]);
    let plan = finishing(&guest, &kernel);
    let mut vm = Vm::new(&guest);
    let current = per_cpu_area(1) + 0x1400;
    vm.last_write = Some((Gpa(gpa(current)), process(2).at));
    vm.vcpus[1].rip = inside;
    vm.vcpus[1].general[RSP] = process(2).stack + STACK - 0x100;
    let failure = commit(&kernel.live(&guest.ram), &mut vm, &plan, &COMMIT).unwrap_err();
    assert!(matches!(failure, CommitError::NotSafe { .. }), "{failure}");
    assert_eq!(vm.pauses, 1);
    assert_eq!(marked(&guest), [process(1).pid, process(2).pid]);
}

/// The apply of a patch in transition that was cut off while it was reverted is not completed.
#[test]
fn a_revert_that_is_cut_off_is_finished_and_not_turned_into_an_apply() {
    let (guest, kernel) = begun();
    let plan = plan::revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap();
    // A word of the guest's lists is one store.
    let counts = deaths(&guest, &kernel, &plan, false, |guest, at| {
        let states = states(guest, &kernel);
        if states == [State::Transition] {
            assert_eq!(leads(guest, &kernel), [Leads::Trampoline; 2], "{at}");
            return 0;
        }
        assert!(states.is_empty(), "{at}: {states:?}");
        assert_eq!((marked(guest), owner(guest)), (vec![], 0), "{at}");
        assert_eq!(leads_old(guest), [true; 2], "{at}");
        1
    });
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}

/// All of an end was written but its last word, and the guest has begun a transition of its own since.
#[test]
fn the_end_of_a_transition_leaves_the_guests_own_marks() {
    let (guest, kernel) = begun();
    sleep_inside(&guest, false);
    open(&guest).finish(Duration::ZERO).unwrap().unwrap();
    let entry = &registry(&guest, &kernel).entries[0];
    let back = registry(&guest, &kernel).state_change(entry.slot, State::Applied, State::Transition);
    back.make(&guest.ram).unwrap();
    guest.put_u64(guest.symbol("klp_transition_patch"), 0xffff_ffff_c000_1000);
    guest.put(process(2).at + PATCH_STATE, &[0; 4]);
    open(&guest).finish(Duration::ZERO).unwrap().unwrap();
    assert_eq!(states(&guest, &kernel), [State::Applied]);
    assert_eq!(
        (marked(&guest), owner(&guest)),
        (vec![process(2).pid], 0xffff_ffff_c000_1000)
    );
}

#[test]
fn a_patch_in_transition_is_reverted_and_nothing_of_it_is_left() {
    let (guest, kernel) = with_sleeper();
    begin(&guest);
    let bytes = livepatch_with_orc("other", &[Function::returning_one("kfree")]);
    let file = PatchFile {
        name: "other",
        bytes: &bytes,
    };
    let refused = open(&guest).apply(file, &OPTIONS).unwrap_err();
    assert!(matches!(refused, PatchError::Refused { .. }), "{refused}");
    open(&guest).revert("fix", &OPTIONS).unwrap();
    assert!(states(&guest, &kernel).is_empty());
    assert_eq!((marked(&guest), owner(&guest)), (vec![], 0));
    assert!(guest.ram.differences().is_empty());
}

/// The guest's own transition, also one that has ended a moment ago, keeps vmpatch from beginning one.
#[test]
fn the_guests_own_transition_comes_first() {
    for (word, value) in [
        ("klp_transition_patch", 0xffff_8880_0100_0000),
        ("klp_target_state", 1),
        ("klp_transition_work", 1),
    ] {
        let (guest, _) = with_sleeper();
        guest.put_u64(guest.symbol(word), value);
        let bytes = module();
        let file = PatchFile {
            name: "fix",
            bytes: &bytes,
        };
        let failure = open(&guest).apply(file, &OPTIONS).unwrap_err();
        let said = failure.to_string();
        assert!(said.contains("own is in transition"), "{said}");
        assert_eq!((failure.guest_state(), marked(&guest)), (GuestState::AsBefore, vec![]));
    }
}

fn planned(guest: &Guest, kernel: &Kernel) -> Plan {
    let options = ApplyOptions {
        model: "hybrid".to_owned(),
        now: 7,
        in_transition: true,
    };
    plan::apply(&kernel.live(&guest.ram), &registry(guest, kernel), &module(), &options).unwrap()
}

fn finishing(guest: &Guest, kernel: &Kernel) -> Plan {
    let plan = plan::finish(&kernel.live(&guest.ram), &registry(guest, kernel));
    plan.unwrap().unwrap()
}

fn commit_faulty(guest: &Guest, kernel: &Kernel, plan: &Plan, fault: Fault) -> Result<(), CommitError> {
    guest.ram.set_fault(Some(fault));
    let result = commit(&kernel.live(&guest.ram), &mut Vm::new(guest), plan, &COMMIT);
    guest.ram.set_fault(None);
    result.map(drop)
}

/// vmpatch dies at a write, where `torn` also in the middle of one, and perhaps its supervisor, too. Gives how often the guest came to be in each state.
fn deaths(start: &Guest, kernel: &Kernel, plan: &Plan, torn: bool, check: impl Fn(&Guest, &str) -> usize) -> [u32; 2] {
    let journal = journal(&kernel.live(&start.ram), plan).unwrap();
    let mut counts = [0; 2];
    for write in 0.. {
        let mut died = false;
        // A registry that is being created is not looked at here.
        let is_staged = write < plan.staged.len() as u64;
        let torn = (torn && !is_staged).then_some(Fault::TornDeath(write));
        for fault in [Some(Fault::Death(write)), torn].into_iter().flatten() {
            for supervisor in [None, Some(false), Some(true)] {
                let at = format!("{fault:?}, the supervisor: {supervisor:?}");
                let guest = start.clone();
                if commit_faulty(&guest, kernel, plan, fault).is_ok() {
                    continue;
                }
                died = true;
                if let Some(has_run) = supervisor {
                    roll_back(&guest.ram, &mut Stopped::new(&guest), &journal, has_run).unwrap();
                }
                open(&guest).recover().unwrap();
                counts[check(&guest, &at)] += 1;
            }
        }
        if !died {
            return counts;
        }
    }
    counts
}

#[test]
fn a_death_at_any_write_of_a_begin_leaves_all_old_or_a_whole_transition() {
    let (guest, kernel) = with_sleeper();
    let plan = planned(&guest, &kernel);
    let counts = deaths(&guest, &kernel, &plan, true, |guest, at| {
        let states = states(guest, &kernel);
        if states.is_empty() {
            assert_eq!((marked(guest), owner(guest)), (vec![], 0), "{at}");
            assert!(guest.ram.differences().is_empty(), "{at}");
            begin(guest);
            return 0;
        }
        assert_eq!(states, [State::Transition], "{at}");
        assert_eq!(leads(guest, &kernel), [Leads::Trampoline; 2], "{at}");
        assert_eq!(marked(guest), [process(1).pid], "{at}");
        open(guest).revert("fix", &OPTIONS).unwrap();
        assert!(guest.ram.differences().is_empty(), "{at}");
        1
    });
    assert!(counts[0] > 3 && counts[1] > 0, "{counts:?}");
}

#[test]
fn a_death_at_any_write_of_an_end_leaves_a_transition_that_can_end() {
    let (mut guest, kernel) = begun();
    sleep_inside(&guest, false);
    guest.ram.take_baseline();
    let plan = finishing(&guest, &kernel);
    let counts = deaths(&guest, &kernel, &plan, true, |guest, at| {
        let states = states(guest, &kernel);
        let leads = leads(guest, &kernel);
        if states == [State::Applied] {
            assert_eq!(leads, [Leads::New; 2], "{at}");
            assert_eq!((marked(guest), owner(guest)), (vec![], 0), "{at}");
            return 1;
        }
        assert_eq!(states, [State::Transition], "{at}");
        // Where a jump was changed, nobody is marked: all is new.
        assert!(!leads.contains(&Leads::New) || marked(guest).is_empty(), "{at}");
        open(guest).finish(Duration::ZERO).unwrap().unwrap();
        assert_eq!(self::leads(guest, &kernel), [Leads::New; 2], "{at}");
        assert_eq!((marked(guest), owner(guest)), (vec![], 0), "{at}");
        0
    });
    assert!(counts[0] > 3 && counts[1] > 0, "{counts:?}");
}

/// Has a process sleep in the new code of the first function, or not any more.
fn sleep_in_new(guest: &Guest, kernel: &Kernel, is_inside: bool) {
    let registry = registry(guest, kernel);
    let record = registry.entries[0].record().unwrap();
    let function = record.functions.iter().find(|one| one.name == PATCHED[0]).unwrap();
    let returns = [FUNCTIONS + 16, function.new + 5, START + 1];
    write_marked(guest, process(1), if is_inside { &returns } else { &returns[2..] });
}

/// A guest in which the patch is in force, and a process sleeps in its code.
fn applied_with_sleeper() -> (Guest, Kernel) {
    let (mut guest, kernel) = with_sleeper();
    sleep_inside(&guest, false);
    let bytes = module();
    let file = PatchFile {
        name: "fix",
        bytes: &bytes,
    };
    open(&guest).apply(file, &OPTIONS).unwrap();
    sleep_in_new(&guest, &kernel, true);
    guest.ram.take_baseline();
    (guest, kernel)
}

#[track_caller]
fn begin_revert(guest: &Guest) {
    let failure = open(guest).revert("fix", &OPTIONS).unwrap_err();
    assert!(
        matches!(failure, PatchError::InTransition { mark: Mark::New, .. }),
        "{failure}"
    );
    assert_eq!(failure.guest_state(), GuestState::InTransition);
}

/// The mark of the process that sleeps in the new code, and which numbers the trampolines compare marks with.
fn marks_of_revert(guest: &Guest, kernel: &Kernel) -> (u8, [u8; 2]) {
    let registry = registry(guest, kernel);
    let record = registry.entries[0].record().unwrap();
    let pages = registry.entries[0].pages.first;
    let at = |index: usize| {
        let at = record.functions[index].trampoline.unwrap() - registry.mapped(pages).0 + registry.page(pages).0;
        let mut code = [0; 17];
        guest.ram.read(Gpa(at), &mut code).unwrap();
        code[16]
    };
    (guest.bytes_at(process(1).at + PATCH_STATE, 1)[0], [at(0), at(1)])
}

#[test]
fn a_task_in_the_new_code_stays_in_it_while_all_others_get_the_old() {
    let (guest, kernel) = applied_with_sleeper();
    begin_revert(&guest);
    assert_eq!(states(&guest, &kernel), [State::Unpatching]);
    assert_eq!(leads(&guest, &kernel), [Leads::Trampoline; 2]);
    assert_eq!(marked(&guest), [process(1).pid]);
    assert_eq!(marks_of_revert(&guest, &kernel), (1, [1; 2]));
    assert_ne!(owner(&guest), 0);
    let told = open(&guest).in_transition().unwrap().unwrap();
    assert_eq!((told.mark, told.tasks, told.marked.len()), (Mark::New, 6, 1));
    assert_eq!(told.inside.len(), 1);
    // The next vmpatch leaves it as it is, and the same revert goes on with it.
    assert_eq!(open(&guest).recover().unwrap().len(), 0);
    begin_revert(&guest);
    // It is not applied again meanwhile.
    let bytes = module();
    let file = PatchFile {
        name: "fix",
        bytes: &bytes,
    };
    let refused = open(&guest).apply(file, &OPTIONS).unwrap_err();
    assert!(refused.to_string().contains("does not fit"), "{refused}");
    assert_eq!(states(&guest, &kernel), [State::Unpatching]);

    sleep_in_new(&guest, &kernel, false);
    let finished = open(&guest).finish(Duration::ZERO).unwrap().unwrap();
    assert!(finished.by_task && finished.reverted);
    assert!(states(&guest, &kernel).is_empty());
    assert_eq!(leads_old(&guest), [true; 2]);
    assert_eq!((marked(&guest), owner(&guest)), (vec![], 0));
}

/// Nobody is inside: a revert goes at one instant.
#[test]
fn a_revert_of_a_patch_that_nobody_is_in_needs_no_transition() {
    let (guest, kernel) = applied_with_sleeper();
    sleep_in_new(&guest, &kernel, false);
    let reverted = open(&guest).revert("fix", &OPTIONS).unwrap();
    assert!(!reverted.by_task && reverted.reverted);
    assert!(states(&guest, &kernel).is_empty());
}

/// What is not a trampoline that vmpatch has written is not turned around.
#[test]
fn a_trampoline_that_holds_other_code_keeps_a_revert_from_a_transition() {
    let (guest, kernel) = applied_with_sleeper();
    let registry = registry(&guest, &kernel);
    let entry = &registry.entries[0];
    let trampoline = entry.record().unwrap().functions[0].trampoline.unwrap();
    let at = trampoline - registry.mapped(entry.pages.first).0 + registry.page(entry.pages.first).0;
    guest.ram.write(Gpa(at + 20), &[0x90]).unwrap();
    let failure = open(&guest).revert("fix", &OPTIONS).unwrap_err();
    let said = failure.to_string();
    assert!(said.contains("holds other code"), "{said}");
    assert_eq!(failure.guest_state(), GuestState::AsBefore);
    assert_eq!(states(&guest, &kernel), [State::Applied]);
    assert_eq!((marked(&guest), owner(&guest)), (vec![], 0));
}

#[test]
fn a_death_at_any_write_of_a_revert_s_begin_leaves_all_new_or_a_whole_transition() {
    let (guest, kernel) = applied_with_sleeper();
    let plan = plan::begin_revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap();
    let counts = deaths(&guest, &kernel, &plan, true, |guest, at| {
        let states = states(guest, &kernel);
        if states == [State::Applied] {
            assert_eq!(leads(guest, &kernel), [Leads::New; 2], "{at}");
            assert_eq!((marked(guest), owner(guest)), (vec![], 0), "{at}");
            // Trampolines that are turned around already do not keep the next revert from beginning.
            begin_revert(guest);
            return 0;
        }
        assert_eq!(states, [State::Unpatching], "{at}");
        assert_eq!(leads(guest, &kernel), [Leads::Trampoline; 2], "{at}");
        assert_eq!(marked(guest), [process(1).pid], "{at}");
        assert_eq!(marks_of_revert(guest, &kernel), (1, [1; 2]), "{at}");
        sleep_in_new(guest, &kernel, false);
        open(guest).finish(Duration::ZERO).unwrap().unwrap();
        assert_eq!(leads_old(guest), [true; 2], "{at}");
        1
    });
    assert!(counts.iter().all(|count| *count > 3), "{counts:?}");
}

#[test]
fn a_death_at_any_write_of_a_revert_s_end_leaves_a_transition_that_can_end() {
    let (mut guest, kernel) = applied_with_sleeper();
    begin_revert(&guest);
    sleep_in_new(&guest, &kernel, false);
    guest.ram.take_baseline();
    let plan = finishing(&guest, &kernel);
    // A word of the guest's lists is one store.
    let counts = deaths(&guest, &kernel, &plan, false, |guest, at| {
        let left = states(guest, &kernel);
        if left == [State::Unpatching] {
            // Where a jump was changed, nobody is marked: all is old.
            assert!(leads_old(guest) == [false; 2] || marked(guest).is_empty(), "{at}");
            open(guest).finish(Duration::ZERO).unwrap().unwrap();
        }
        let left = (left, states(guest, &kernel));
        assert!(left.1.is_empty(), "{at}: {left:?}");
        assert_eq!((marked(guest), owner(guest)), (vec![], 0), "{at}");
        assert_eq!(leads_old(guest), [true; 2], "{at}");
        usize::from(left.0.is_empty())
    });
    assert!(counts.iter().all(|count| *count > 3), "{counts:?}");
}

/// Under KVM the guest runs as soon as vmpatch is dead: tasks go into the old code before the supervisor comes, and the guest may hold any lock.
#[test]
fn a_revert_s_begin_that_has_led_tasks_to_the_old_code_is_not_turned_into_an_apply() {
    let (start, kernel) = applied_with_sleeper();
    let plan = plan::begin_revert(&kernel.live(&start.ram), &registry(&start, &kernel), "fix").unwrap();
    let journal = journal(&kernel.live(&start.ram), &plan).unwrap();
    let mut begun = 0;
    for write in 0.. {
        let guest = start.clone();
        if commit_faulty(&guest, &kernel, &plan, Fault::Death(write)).is_ok() {
            break;
        }
        if !leads(&guest, &kernel).contains(&Leads::Trampoline) {
            continue;
        }
        begun += 1;
        for has_supervisor in [true, false] {
            let guest = guest.clone();
            write_marked(&guest, process(2), &[guest.symbol(PATCHED[1]) + 0x20, START + 1]);
            if has_supervisor {
                guest.put_u64(guest.symbol("text_mutex"), process(3).at);
                assert!(roll_back(&guest.ram, &mut Stopped::new(&guest), &journal, true).unwrap());
                guest.put_u64(guest.symbol("text_mutex"), 0);
            } else {
                // It has returned to user mode, and has come again.
                guest.put(process(1).at + PATCH_STATE, &[0xff; 4]);
                guest.put(process(1).at + FLAG.0, &[0]);
            }
            open(&guest).recover().unwrap();
            assert_eq!(states(&guest, &kernel), [State::Unpatching], "write {write}");
            assert_eq!(leads(&guest, &kernel), [Leads::Trampoline; 2], "write {write}");
            assert_eq!(marked(&guest), [process(1).pid], "write {write}");
        }
    }
    assert!(begun > 0);
}

/// A write of a trampoline that was cut off in the middle is completed by the next revert.
#[test]
fn a_trampoline_that_was_half_written_is_turned_around() {
    let (guest, kernel) = applied_with_sleeper();
    let plan = plan::begin_revert(&kernel.live(&guest.ram), &registry(&guest, &kernel), "fix").unwrap();
    let trampoline = plan
        .atomic
        .iter()
        .find(|change| change.what().contains("trampoline"))
        .unwrap();
    for written in [17, 20, 28] {
        let guest = guest.clone();
        let mut bytes = trampoline.current(&guest.ram).unwrap();
        bytes[..written].copy_from_slice(&trampoline.prepare(&guest.ram).unwrap()[..written]);
        guest.ram.write(trampoline.gpa(), &bytes).unwrap();
        begin_revert(&guest);
        assert_eq!(marks_of_revert(&guest, &kernel), (1, [1; 2]));
    }
}

/// The guest loads an integrity guard meanwhile, which takes the text as it is for right.
#[test]
fn a_transition_does_not_end_under_a_guard_that_would_stop_the_guest() {
    let (guest, kernel) = with_sleeper();
    begin(&guest);
    sleep_inside(&guest, false);
    // The patch's own module gets the guard's name.
    let registry = registry(&guest, &kernel);
    let entry = &registry.entries[0];
    let module = entry.record().unwrap().registration.as_ref().unwrap().module;
    let start = module - registry.mapped(entry.pages.first).0 + registry.page(entry.pages.first).0;
    let is_name = |at: &u64| {
        let mut name = [0; 4];
        guest.ram.read(Gpa(*at), &mut name).unwrap();
        name == *b"fix\0"
    };
    let at = (start..).find(is_name).unwrap();
    guest.ram.write(Gpa(at), b"lkrg\0").unwrap();
    let failure = open(&guest).finish(Duration::ZERO).unwrap_err();
    let said = format!("{failure:?}");
    assert!(said.contains("Guard"), "{said}");
    assert_eq!(failure.guest_state(), GuestState::InTransition);
    assert_eq!(states(&guest, &kernel), [State::Transition]);
    assert_eq!(leads(&guest, &kernel), [Leads::Trampoline; 2]);
}
