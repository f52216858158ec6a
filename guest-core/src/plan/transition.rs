//! Plans transitions, in which each task runs either the old or the new code of all functions of a patch: how that of an apply begins, and how one
//! ends. [`super::unpatch`] has that of a revert.
//!
//! An apply that can't go in at one instant leads its functions to [trampolines](crate::trampoline), and marks the tasks inside an old function in
//! the same pause. They go on in the old code, all others in the new. When nobody is inside an old function any more, the jumps lead to the new
//! functions directly.

use super::redirects::Redirects;
use super::stack::Holders;
use super::{Marks, Plan, Refusal, RevertError, from_reads, guard, removal, targets, unpatch};
use crate::addr::Gva;
use crate::change::{Change, ChangeError};
use crate::kernel::guard::Armed;
use crate::kernel::patch_state::{self, Mark, NoPatchState, PatchState};
use crate::kernel::{KernelError, Live, modules};
use crate::reads::Preconditions;
use crate::redirect::{JUMP_BYTES, RedirectError, jump_bytes};
use crate::registry::{Entry, PatchedFunction, Record, Redirect, Registry, State};
use crate::task;
use crate::trampoline::{TRAMPOLINE_BYTES, TaskAccess, trampoline};
use crate::unwind::{OldFunction, SetupError};
use std::ops::Range;

/// The function in which a new task gets its parent's mark, before it is on a list. A marked task inside it may be making a marked task that nobody
/// sees yet.
pub(crate) const FORK: &str = "copy_process";

/// Why a patch can't be in transition: it can only be applied or reverted at one instant.
#[derive(Debug, thiserror::Error)]
pub enum NoTransition {
    /// The guest's kernel has no fields for it.
    #[error(transparent)]
    Kernel(#[from] NoPatchState),
    /// A function is redirected behind its ftrace site, or has none.
    #[error("{function} is not redirected in an ftrace site")]
    NoSite {
        /// The function.
        function: String,
    },
    /// The module has no ORC entry for a new function.
    #[error("the module has no ORC entry for the first instruction of a new function")]
    NoOrc,
    /// It replaces other patches.
    #[error("it replaces other patches, which is done at one instant")]
    Replaces,
    /// The code of an earlier apply is used again.
    #[error("its code was kept from an earlier apply")]
    Kept,
    /// A transition is under way.
    #[error("{id} is in transition")]
    UnderWay {
        /// The patch.
        id: String,
    },
    /// The function has no trampoline: an older vmpatch has applied it, or the patch could not be in transition then.
    #[error("{function} has no trampoline")]
    NoTrampoline {
        /// The function.
        function: String,
    },
    /// Something else than vmpatch has written to the trampoline.
    #[error("the trampoline of {function} holds other code")]
    OtherCode {
        /// The function.
        function: String,
    },
    /// The patch is not registered as a module of the guest: an older vmpatch has applied it.
    #[error("it is not registered as a module of the guest")]
    NotRegistered,
    /// A revert was cut off.
    #[error("its revert was cut off")]
    CutOff,
}

/// Why a transition can't end, or a mark can't be taken away. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum TransitionError {
    /// The guest's kernel has no fields for it.
    #[error(transparent)]
    NoFields(#[from] NoPatchState),
    /// The guest's kernel cannot be read.
    #[error("reading the guest's kernel")]
    Kernel(#[from] KernelError),
    /// Something else than the patch keeps the guest's own livepatches out, although the patch is in transition.
    #[error(
        "klp_transition_patch is not the patch's any more: a livepatch of the guest's own is in transition; revert the patch"
    )]
    NotOwner,
    /// The guest's integrity guard would or may stop the guest.
    #[error(transparent)]
    Guard(#[from] Armed),
    /// The patch can't be taken out.
    #[error("taking the patch out")]
    Revert(#[source] Box<RevertError>),
    /// The guest's tasks cannot be read.
    #[error("finding the guest's tasks")]
    Tasks(#[from] SetupError),
}

/// What a kernel must have for transitions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means {
    pub access: TaskAccess,
}

impl Means {
    /// Finds them in the guest's kernel.
    pub fn find(live: &Live<'_>) -> Result<Result<Self, NoPatchState>, KernelError> {
        let fields = match patch_state::find(live)? {
            Ok(fields) => fields,
            Err(why) => return Ok(Err(why)),
        };
        let not_understood = |what, found: String| Err(NoPatchState::NotUnderstood { what, found });
        let current = match task::current(live) {
            Ok(current) => current,
            Err(error) => return Ok(not_understood("the current task", error.to_string())),
        };
        if live.kernel.symbols.unique(FORK).is_none() {
            return Ok(not_understood(FORK, "no such function, or several".to_owned()));
        }
        Ok(match TaskAccess::new(current, fields.state) {
            Some(access) => Ok(Self { access }),
            None => not_understood("the current task", current.to_string()),
        })
    }
}

/// Gives each of the functions its trampoline, the first one at `start`: has `write` write their code, which tells whether it has space, and notes in the record that the jumps may lead there.
///
/// # Errors
///
/// Inner errors: the patch can't be in transition. It is then as it was.
pub(super) fn give_trampolines(
    means: &Means,
    start: Gva,
    redirects: &mut Redirects,
    mut write: impl FnMut(Gva, &[u8]) -> bool,
) -> Result<Result<(), NoTransition>, Refusal> {
    let behind = redirects
        .functions
        .iter()
        .find(|function| function.redirect != Redirect::Ftrace);
    if let Some(function) = behind {
        let function = function.name.clone();
        return Ok(Err(NoTransition::NoSite { function }));
    }
    let places = (0..).map(|index| start.wrapping_add(index * TRAMPOLINE_BYTES));
    let both = redirects.functions.iter_mut().zip(&redirects.covered).zip(places);
    for ((function, covered), at) in both {
        let jump = Jump::of(&redirects.changes, function)?;
        let old = covered.unwrap_or(jump.from.wrapping_add(JUMP_BYTES));
        let code = trampoline(&function.name, at, means.access, Mark::Old, (old, Gva(function.new)))?;
        if !write(at, &code) {
            return Ok(Err(NoTransition::NoOrc));
        }
        function.trampoline = Some(at.0);
        jump.lead_via(&mut redirects.changes, function, at)?;
        Jump::of(&redirects.recorded, function)?.lead_via(&mut redirects.recorded, function, at)?;
    }
    Ok(Ok(()))
}

/// The jump of a function to its new code.
pub(super) struct Jump {
    /// Guest-virtual address of the jump.
    pub from: Gva,
    /// Its fragments, by index in the changes: two where it crosses a page boundary.
    fragments: Range<usize>,
}

impl Jump {
    /// Finds it among `changes`.
    pub fn of(changes: &[Change], function: &PatchedFunction) -> Result<Self, RedirectError> {
        let first = changes.iter().position(|change| change.gpa().0 == function.jump);
        let first = first.unwrap_or(changes.len());
        let mut bytes: Vec<u8> = Vec::new();
        let mut end = first;
        for fragment in changes.iter().skip(first).take_while(|change| !change.is_of_bits()) {
            if bytes.len() as u64 >= JUMP_BYTES {
                break;
            }
            bytes.extend(fragment.new_bytes());
            end += 1;
        }
        let &[0xe9, a, b, c, d] = bytes.as_slice() else {
            return Err(no_jump(function, &bytes));
        };
        let distance = i64::from(i32::from_le_bytes([a, b, c, d])).cast_unsigned();
        Ok(Self {
            from: Gva(function.new.wrapping_sub(distance).wrapping_sub(JUMP_BYTES)),
            fragments: first..end,
        })
    }

    /// Notes in its fragments that it may lead to `via` instead.
    fn lead_via(&self, changes: &mut [Change], function: &PatchedFunction, via: Gva) -> Result<(), RedirectError> {
        let all = jump_bytes(&function.name, self.from, via)?;
        let mut rest = all.as_slice();
        for fragment in changes.get_mut(self.fragments.clone()).unwrap_or_default() {
            let cut = rest.split_at_checked(fragment.len());
            let (front, behind) = cut.ok_or_else(|| no_jump(function, fragment.new_bytes()))?;
            rest = behind;
            *fragment = fragment.clone().or_via(front.to_vec());
        }
        Ok(())
    }
}

fn no_jump(function: &PatchedFunction, found: &[u8]) -> RedirectError {
    RedirectError::NoJump {
        name: function.name.clone(),
        id: "the patch".to_owned(),
        found: crate::change::hex::encode(found),
    }
}

/// The patch that is in transition, by its apply or its revert, with its entry.
pub fn in_transition(registry: &Registry) -> Option<(&Entry, &Record)> {
    let is_it = |entry: &&Entry| matches!(entry.state, State::Transition | State::Unpatching);
    let mut those = registry.entries.iter().filter(is_it);
    those.find_map(|entry| Some((entry, entry.record()?)))
}

/// Plans the end of a transition; `None` where none is under way.
///
/// # Errors
///
/// The guest cannot be read.
pub fn finish(live: &Live<'_>, registry: &Registry) -> Result<Option<Plan>, TransitionError> {
    let Some((entry, record)) = in_transition(registry) else {
        return Ok(None);
    };
    if entry.state == State::Unpatching {
        return unpatch::finish(live, registry, entry, record).map(Some);
    }
    let plan = from_reads::plan(live, |live| {
        guard::require_survival::<TransitionError>(live)?;
        let fields = patch_state::find(live)??;
        let mut atomic = Vec::new();
        for jump in record.changes.iter().filter(|change| !change.is_of_bits()) {
            let led = jump.completion(live).map_err(unreadable)?;
            atomic.extend(led);
        }
        for flag in record.changes.iter().filter(|change| change.is_of_bits()) {
            atomic.extend(flag.completion(live).map_err(unreadable)?);
        }
        let Some(release) = release(live, registry, &fields)? else {
            if !atomic.is_empty() {
                return Err(TransitionError::NotOwner);
            }
            // All was done but the last word.
            atomic.push(registry.state_change(entry.slot, State::Transition, State::Applied));
            return Ok(ending(registry, record, atomic, Vec::new(), Marks::Leave));
        };
        atomic.push(release);
        atomic.push(registry.state_change(entry.slot, State::Transition, State::Applied));
        let must_be_left = must_be_left(live, registry, record)?;
        Ok::<_, TransitionError>(ending(registry, record, atomic, must_be_left, Marks::Clear { fields }))
    });
    plan.map(Some)
}

/// Plans to take away the marks that a transition has left which has ended otherwise; `None` where there is none.
///
/// # Errors
///
/// The guest cannot be read.
pub fn unmark(live: &Live<'_>, registry: &Registry) -> Result<Option<Plan>, TransitionError> {
    let with_record = registry.all_records().next();
    let (true, None, Some(record)) = (registry.exists, in_transition(registry), with_record) else {
        return Ok(None);
    };
    let Ok(fields) = patch_state::find(live)? else {
        return Ok(None);
    };
    if release(live, registry, &fields)?.is_none() {
        return Ok(None);
    }
    let plan = from_reads::plan(live, |live| {
        let atomic = release(live, registry, &fields)?.into_iter().collect();
        let marks = Marks::Clear { fields };
        let record = Record {
            registration: None,
            ..record.clone()
        };
        Ok::<_, TransitionError>(ending(registry, &record, atomic, Vec::new(), marks))
    });
    plan.map(Some)
}

/// The plan of an end.
fn ending(
    registry: &Registry,
    record: &Record,
    atomic: Vec<Change>,
    must_be_quiescent: Vec<OldFunction>,
    marks: Marks,
) -> Plan {
    Plan {
        staged: Vec::new(),
        atomic,
        // Where some of the jumps lead to the new functions and some to trampolines, and nobody is marked, all is new.
        sites: Vec::new(),
        requires: Preconditions::default(),
        must_be_quiescent,
        unreferenced: Gva(0)..Gva(0),
        patch_code: registry.patch_code(),
        marks,
        record: record.clone(),
    }
}

/// The change that lets the guest's own livepatches transit again; `None` where vmpatch does not keep them from it.
pub(super) fn release(
    live: &Live<'_>,
    registry: &Registry,
    fields: &PatchState,
) -> Result<Option<Change>, KernelError> {
    let (what, at) = ("klp_transition_patch", fields.owner);
    let live = &live.that_changes_when("applying a livepatch of its own");
    let physical = live.physical(at);
    let (gpa, _) = physical.map_err(|source| KernelError::Unreadable { what, at, source })?;
    let owners = registry.all_records().filter_map(|record| record.registration.as_ref());
    for owner in owners {
        let set = Change::word(what, gpa, 0, owner.module).of_data();
        if let Some(release) = set.restoration(live, what).map_err(unreadable)? {
            return Ok(Some(release));
        }
    }
    Ok(None)
}

/// What nobody may be inside when a transition ends: the code that marked tasks run, and the trampolines, in which a task may have chosen.
fn must_be_left(live: &Live<'_>, registry: &Registry, record: &Record) -> Result<Vec<OldFunction>, KernelError> {
    let earlier = registry.records().filter(|other| other.order < record.order);
    let holders = Holders::of(earlier);
    let mut all = forks(live);
    for function in &record.functions {
        all.extend(old_parts(live, function)?);
        for below in holders.at(function.old) {
            let one = std::slice::from_ref(below.function);
            all.extend(removal::replacements_among(live, below.record, one)?);
        }
        all.extend(removal::trampoline_of(function));
    }
    Ok(all)
}

fn old_parts(live: &Live<'_>, function: &PatchedFunction) -> Result<Vec<OldFunction>, KernelError> {
    let at = Gva(function.old);
    if function.object.is_none() {
        return Ok(targets::image_parts(live, &function.name, at, function.old_len));
    }
    // A module that is gone has nobody inside.
    let Some(module) = modules::containing(live, at)? else {
        return Ok(Vec::new());
    };
    let symbols = modules::symbols(&live.constant(), &module)?;
    Ok(targets::module_parts(&symbols, &function.name, at, function.old_len))
}

/// The code in which a marked task may be making another one.
pub(super) fn forks(live: &Live<'_>) -> Vec<OldFunction> {
    let Some(at) = live.kernel.symbols.unique(FORK) else {
        return Vec::new();
    };
    let len = live
        .kernel
        .symbols
        .containing(at)
        .map_or(0, |(_, end)| end.0.saturating_sub(at.0));
    targets::image_parts(live, FORK, at, len)
}

fn unreadable(source: ChangeError) -> KernelError {
    KernelError::Restore {
        what: "a site of a patch in transition",
        source,
    }
}
