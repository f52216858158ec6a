//! The entry for embedders, on guests made by hand: apply, revert and recover, with a failure and a kill at every step.

mod common;

use common::guest::{Guest as MadeUp, IMAGE, IMAGE_GPA, heap};
use common::machine::{Stopped, Vm};
use common::patch::{patched, target, two, two_with_sections};
use common::ram::{Fault, until_killed};
use guest_core::commit::{Effect, Model, roll_back};
use guest_core::guest::{
    Changed, Embedded, ForCommit, Guest, GuestState, OpenError, PatchError, PatchFile, PatchOptions, Runs, Supervised,
    Vmm,
};
use guest_core::machine::{Journal, Machine, MachineError, PauseTimes, Paused, WriteCode};
use guest_core::registry::State;
use guest_core::transaction::recovery::{Keep, Rest};
use guest_core::{Gpa, PhysMemory, Registers};
use std::cell::RefCell;
use std::mem::discriminant;
use std::time::Duration;

const OPTIONS: PatchOptions = PatchOptions {
    model: Model::CleanCut,
    timeout: Duration::ZERO,
    grace: Duration::ZERO,
};

/// What is done to a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operation {
    Apply,
    Revert,
}

/// A supervisor: it may be killed together with the process that it guards.
struct Supervisor {
    journal: RefCell<Option<Journal>>,
    lives: bool,
    /// The guest runs before the supervisor comes, as under KVM.
    is_late: bool,
}

impl Supervisor {
    fn new(lives: bool) -> Self {
        Self {
            journal: RefCell::new(None),
            lives,
            is_late: false,
        }
    }

    /// Rolls back what is cut off. None where it was killed, too.
    fn take_over(&self, guest: &MadeUp) -> Option<Effect> {
        let journal = self.journal.take().filter(|_| self.lives)?;
        let complete = roll_back(&guest.ram, &mut Stopped::new(guest), &journal, self.is_late).unwrap();
        Some(if complete { Effect::InForce } else { Effect::AsBefore })
    }
}

/// A VMM of which each step is counted: it may fail, or the process may be killed there.
struct Steps<'a> {
    guest: &'a MadeUp,
    supervisor: &'a Supervisor,
}

fn step(guest: &MadeUp, doing: &'static str) -> Result<(), MachineError> {
    guest.ram.step().map_err(|error| MachineError::new(doing, error))
}

impl Vmm for Steps<'_> {
    type Error = MachineError;

    fn memory(&self) -> &dyn PhysMemory {
        &self.guest.ram
    }

    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        Ok(self.guest.vcpus.clone())
    }

    fn require_idle(&self) -> Result<(), MachineError> {
        step(self.guest, "asking for migrations")
    }

    fn remove_leftovers(&mut self) -> Result<(), MachineError> {
        step(self.guest, "removing what is left")
    }

    fn begin(&mut self) -> Result<ForCommit<'_>, MachineError> {
        step(self.guest, "starting the supervisor")?;
        let Self { guest, supervisor } = *self;
        Ok(ForCommit {
            memory: &guest.ram,
            machine: Box::new(StepsOfCommit { guest, supervisor }),
        })
    }
}

struct StepsOfCommit<'a> {
    guest: &'a MadeUp,
    supervisor: &'a Supervisor,
}

impl Machine for StepsOfCommit<'_> {
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError> {
        step(self.guest, "telling the supervisor")?;
        self.supervisor.journal.replace(journal.cloned());
        Ok(())
    }

    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        step(self.guest, "pausing the guest")?;
        Ok(Box::new(StepsOfPause {
            guest: self.guest,
            stopped: Stopped::new(self.guest),
        }))
    }
}

impl Supervised for StepsOfCommit<'_> {
    fn take_over(self: Box<Self>) -> Option<Effect> {
        self.supervisor.take_over(self.guest)
    }
}

struct StepsOfPause<'a> {
    guest: &'a MadeUp,
    stopped: Stopped<'a>,
}

impl WriteCode for StepsOfPause<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        self.stopped.write(writes)
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        step(self.guest, "draining the writes")?;
        self.stopped.drain()
    }
}

impl Paused for StepsOfPause<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        step(self.guest, "reading the registers")?;
        self.stopped.registers()
    }

    fn elapsed(&self) -> Duration {
        self.stopped.elapsed()
    }

    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError> {
        let resumed = step(self.guest, "resuming the guest");
        resumed.map_err(|error| error.left_paused(true))?;
        Ok(PauseTimes::default())
    }
}

fn open<'a>(guest: &'a MadeUp, supervisor: &'a Supervisor) -> Guest<Steps<'a>> {
    Guest::open(Steps { guest, supervisor }).unwrap()
}

type Outcome = Result<Changed, PatchError<MachineError>>;

/// What a process does: it recovers, as every one does first, and then does its own work.
fn operate(opened: &mut Guest<Steps<'_>>, operation: Operation) -> Outcome {
    opened.recover()?;
    match operation {
        Operation::Apply => opened.apply(
            PatchFile {
                name: "fix",
                bytes: &two_with_sections(),
            },
            &OPTIONS,
        ),
        Operation::Revert => opened.revert("fix", &OPTIONS),
    }
}

fn states<V: Vmm>(opened: &Guest<V>) -> Vec<State> {
    opened.registry().entries.iter().map(|entry| entry.state).collect()
}

/// A guest before an operation, and what tells whether the operation was done.
struct Case {
    operation: Operation,
    /// Before the operation.
    start: MadeUp,
    /// Where the guest's tree of modules counts to after a whole revert. One that is cut off and finished may count on.
    sequence: Vec<u8>,
    /// What differs after a whole revert: of the operation's own patch, where it is an apply.
    reverted: Vec<(u64, Vec<u8>)>,
}

impl Case {
    fn new(operation: Operation) -> Self {
        let start = match operation {
            Operation::Apply => MadeUp::new(),
            Operation::Revert => patched().0,
        };
        let guest = start.clone();
        operate(&mut open(&guest, &Supervisor::new(true)), operation).unwrap();
        if operation == Operation::Apply {
            operate(&mut open(&guest, &Supervisor::new(true)), Operation::Revert).unwrap();
        }
        Self {
            operation,
            sequence: guest.bytes_at(guest.symbol("mod_tree"), 4),
            start,
            reverted: guest.ram.differences(),
        }
    }

    /// True where the operation is wholly done in `guest`, false where nothing of it is. `lives` tells of the supervisor.
    fn is_done(&self, guest: &MadeUp, lives: bool, at: &str) -> bool {
        let supervisor = Supervisor::new(true);
        let opened = open(guest, &supervisor);
        let is_patched = match states(&opened).as_slice() {
            [] => false,
            [State::Applied] => true,
            states => panic!("{at}: {states:?}"),
        };
        for entry in &opened.registry().entries {
            for function in &entry.record().unwrap().functions {
                let jump = function.jump - IMAGE_GPA + IMAGE;
                assert_eq!(target(guest, jump), function.new, "{at}: {}", function.name);
            }
        }
        let is_done = is_patched == (self.operation == Operation::Apply);
        match (self.operation, is_done) {
            (_, false) => assert!(self.is_old(&guest.ram.differences(), lives), "{at}: not wholly old"),
            (operation, true) => {
                let guest = guest.clone();
                // The record of an apply tells the time: what it is worth shows in its revert.
                if operation == Operation::Apply {
                    open(&guest, &supervisor).revert("fix", &OPTIONS).unwrap();
                }
                guest.put(guest.symbol("mod_tree"), &self.sequence);
                assert!(guest.ram.differences() == self.reverted, "{at}: not wholly new");
            }
        }
        is_done
    }

    /// True where the guest is as before. Without a supervisor, the bytes may stay that an apply has written to per-CPU memory, which is free
    /// again. A revert leaves them, too.
    fn is_old(&self, differences: &[(u64, Vec<u8>)], lives: bool) -> bool {
        let is_free = |page: u64| self.reverted.iter().any(|(other, _)| *other == page);
        let are_free = self.operation == Operation::Apply && differences.iter().all(|(page, _)| is_free(*page));
        differences.is_empty() || (!lives && are_free)
    }

    /// What the next process does first.
    fn recover(guest: &MadeUp) {
        open(guest, &Supervisor::new(true)).recover().unwrap();
    }
}

#[test]
fn an_embedder_applies_and_reverts_with_a_memory_and_a_machine() {
    let guest = MadeUp::new();
    let mut opened = Guest::open(Embedded {
        memory: &guest.ram,
        machine: Vm::new(&guest),
    })
    .unwrap();
    opened.recover().unwrap();
    let file = PatchFile {
        name: "fix",
        bytes: &two(),
    };
    let planned = opened.check(file, &OPTIONS).unwrap();
    assert!(guest.ram.differences().is_empty());
    let applied = opened.apply(file, &OPTIONS).unwrap();
    assert_eq!((applied.record.id.as_str(), applied.committed.tries), ("fix", 1));
    assert_eq!(applied.record.functions, planned.record.functions);
    assert_eq!(states(&opened), [State::Applied]);
    opened.revert("fix", &OPTIONS).unwrap();
    assert_eq!(states(&opened), []);
    assert!(guest.ram.differences().is_empty());
}

#[test]
fn a_vmm_that_gives_no_registers_opens_no_guest() {
    let guest = MadeUp::new();
    let mut machine = Vm::new(&guest);
    machine.stays_paused = true;
    let memory = &guest.ram;
    let error = Guest::open(Embedded { memory, machine }).map(|_| ()).unwrap_err();
    assert!(matches!(error, OpenError::Vmm(error) if error.left_paused));
}

#[test]
fn status_says_whose_code_runs_and_what_the_next_operation_does_first() {
    let (guest, _) = patched();
    let supervisor = Supervisor::new(true);
    let opened = open(&guest, &supervisor);
    let record = opened.registry().entries[0].record().unwrap().clone();
    let reverting = opened.registry().state_change(0, State::Applied, State::Reverting);
    let function = record
        .functions
        .iter()
        .find(|function| function.name == "victim")
        .unwrap();
    let mut changes = record.changes.iter();
    let jump = changes.find(|change| change.gpa().0 == function.jump).unwrap();
    let said = || {
        let opened = open(&guest, &supervisor);
        let status = opened.status();
        assert!(status.own_livepatches.is_none());
        let [patch] = status.patches.as_slice() else { panic!() };
        let runs: Vec<_> = patch.functions.iter().map(|function| function.runs.clone()).collect();
        (patch.state, *patch.rest.as_ref().unwrap(), runs)
    };
    let recover = || {
        let removed = open(&guest, &supervisor).recover().unwrap();
        removed.into_iter().map(|record| record.id).collect::<Vec<_>>()
    };
    let both = || vec![Runs::Patch, Runs::Patch];
    assert_eq!(said(), (State::Applied, Rest::Nothing, both()));
    // Killed with its supervisor before the pause of a revert, and in it.
    reverting.make(&guest.ram).unwrap();
    assert_eq!(said(), (State::Reverting, Rest::Reinstate, both()));
    assert!(recover().is_empty());
    assert_eq!(said(), (State::Applied, Rest::Nothing, both()));
    reverting.make(&guest.ram).unwrap();
    jump.undone().make(&guest.ram).unwrap();
    let rest = Rest::Remove(Keep::IfHandedOut);
    assert_eq!(said(), (State::Reverting, rest, vec![Runs::Original, Runs::Patch]));
    assert_eq!(recover(), ["fix"]);
    assert!(open(&guest, &supervisor).status().patches.is_empty());
}

#[test]
fn status_says_where_a_livepatch_of_the_guests_own_comes_first() {
    let (guest, _) = patched();
    let (patch, object) = (heap(0x1000), heap(0x2000));
    let functions = [("victim", heap(0x3000)), ("notrace_victim", heap(0x4000))];
    guest.link(guest.symbol("klp_patches"), &[patch + 32]);
    guest.link(patch + 48, &[object + 72]);
    guest.link(object + 56, &functions.map(|(_, at)| at + 40));
    for (name, at) in functions {
        guest.put_u64(at + 24, guest.symbol(name));
        guest.put(at + 73, &[1]);
    }
    guest.put_u64(patch, heap(0x800));
    guest.put(heap(0x800) + 24, b"own_fix\0");
    let supervisor = Supervisor::new(true);
    let opened = open(&guest, &supervisor);
    let status = opened.status();
    let functions = status.patches[0].functions.iter();
    let said: Vec<_> = functions
        .map(|function| {
            let own = function.own_livepatch.as_ref().unwrap();
            (function.runs.clone(), own.livepatch.as_str())
        })
        .collect();
    // One is redirected in its site, which ftrace leaves alone, and one behind it.
    assert_eq!(said, [(Runs::Patch, "own_fix"), (Runs::OwnLivepatch, "own_fix")]);
}

/// A step fails, of the VMM or a write, and perhaps the one behind it, which may be the first of the rollback. The error says what the guest is
/// like, and the next process finds it wholly old or wholly new.
#[test]
fn after_a_failure_at_any_step_the_guest_is_wholly_old_or_wholly_new() {
    for case in [Operation::Apply, Operation::Revert].map(Case::new) {
        for (lives, fault) in [
            (true, Fault::Once as fn(u64) -> Fault),
            (false, Fault::Once),
            (true, Fault::Twice),
            (false, Fault::Twice),
        ] {
            let (mut states, mut rollbacks) = (Vec::new(), 0);
            for at in 0.. {
                let fault = fault(at);
                let name = format!("{:?}, {fault:?}, the supervisor lives: {lives}", case.operation);
                let (guest, supervisor) = (case.start.clone(), Supervisor::new(lives));
                let mut opened = open(&guest, &supervisor);
                guest.ram.set_fault(Some(fault));
                let outcome = operate(&mut opened, case.operation);
                let left = guest.ram.fault();
                guest.ram.set_fault(None);
                if left.is_some_and(|left| discriminant(&left) == discriminant(&fault)) {
                    outcome.unwrap();
                    break;
                }
                let error = outcome.err();
                let state = error.as_ref().map_or(GuestState::InForce, PatchError::guest_state);
                let rolled_back = matches!(error, Some(PatchError::RolledBack { .. }));
                rollbacks += u32::from(rolled_back);
                // This process could not roll back in its pause, and the supervisor does not know of the commit any more.
                let lives = lives && !rolled_back && state != GuestState::HalfPatched;
                // Nothing is left to do.
                if state == GuestState::AsBefore {
                    assert!(!case.is_done(&guest, lives, &name), "{name}");
                }
                Case::recover(&guest);
                let told = match state {
                    GuestState::AsBefore => Some(false),
                    GuestState::InForce => Some(true),
                    GuestState::HalfPatched | GuestState::InTransition => None,
                    GuestState::Paused { change } => match change {
                        Effect::AsBefore => Some(false),
                        Effect::InForce => Some(true),
                        Effect::HalfPatched => None,
                    },
                };
                let is_done = case.is_done(&guest, lives, &name);
                assert_eq!(told.unwrap_or(is_done), is_done, "{name}: {state:?}");
                states.push(state);
            }
            let name = format!("{:?}, {:?}: {states:?}", case.operation, fault(0));
            let told = |state| states.contains(&state);
            assert!(told(GuestState::AsBefore) && told(GuestState::InForce), "{name}");
            let change = Effect::InForce;
            assert_eq!(told(GuestState::Paused { change }), !lives, "{name}");
            // Of a revert, the rest is done.
            let is_recovered = matches!(fault(0), Fault::Twice(_)) && case.operation == Operation::Apply;
            assert_eq!(rollbacks != 0, is_recovered, "{name}");
        }
    }
}

/// The process is killed at a step, of the VMM or a write, and perhaps its supervisor, too.
#[test]
fn after_a_kill_at_any_step_the_guest_is_wholly_old_or_wholly_new() {
    for case in [Operation::Apply, Operation::Revert].map(Case::new) {
        for (lives, is_late) in [(true, false), (true, true), (false, false)] {
            let mut done = Vec::new();
            for at in 0.. {
                let name = format!(
                    "{:?}, step {at}, the supervisor lives: {lives}, is late: {is_late}",
                    case.operation
                );
                let guest = case.start.clone();
                let supervisor = Supervisor {
                    is_late,
                    ..Supervisor::new(lives)
                };
                let mut opened = open(&guest, &supervisor);
                guest.ram.set_fault(Some(Fault::Kill(at)));
                let outcome = until_killed(move || operate(&mut opened, case.operation));
                guest.ram.set_fault(None);
                if let Some(outcome) = outcome {
                    outcome.unwrap();
                    break;
                }
                supervisor.take_over(&guest);
                Case::recover(&guest);
                // A late supervisor leaves memory that the guest may have met to the next process.
                done.push(case.is_done(&guest, lives && !is_late, &name));
            }
            assert!(
                done.len() > 20 && done.contains(&true) && done.contains(&false),
                "{done:?}"
            );
        }
    }
}
