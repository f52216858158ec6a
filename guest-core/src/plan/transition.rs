//! Plans transitions, in which each task runs either the old or the new code of all functions of a patch: how one begins, and how it ends.
//!
//! An apply that can't go in at one instant leads its functions to [trampolines](crate::trampoline), and marks the tasks inside an old function in
//! the same pause. They go on in the old code, all others in the new. When nobody is inside an old function any more, the jumps lead to the new
//! functions directly.

use super::redirects::Redirects;
use super::stack::Holders;
use super::{Marks, Plan, Refusal, from_reads, removal, targets};
use crate::addr::Gva;
use crate::change::{Change, ChangeError};
use crate::kernel::patch_state::{self, NoPatchState, PatchState};
use crate::kernel::{KernelError, Live, modules};
use crate::reads::Preconditions;
use crate::registry::{Entry, PatchedFunction, Record, Redirect, Registry, State};
use crate::task;
use crate::trampoline::{TRAMPOLINE_BYTES, TaskAccess, trampoline};
use crate::unwind::{OldFunction, SetupError};
use std::ops::Range;

/// The function in which a new task gets its parent's mark, before it is on a list. A marked task inside it may be making a marked task that nobody
/// sees yet.
pub(crate) const FORK: &str = "copy_process";

/// Why a patch can't be in transition: it can only be applied at one instant.
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
    /// The guest's tasks cannot be read.
    #[error("finding the guest's tasks")]
    Tasks(#[from] SetupError),
}

/// What a kernel must have for transitions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Means {
    access: TaskAccess,
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

/// Gives each of the functions its trampoline, the first one at `start`: writes their code, and notes in the record that the jumps may lead there.
///
/// # Errors
///
/// Inner errors: the patch can't be in transition. It is then as it was.
pub(super) fn give_trampolines(
    means: &Means,
    start: Gva,
    redirects: &mut Redirects,
    mut write: impl FnMut(Gva, &[u8]),
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
    let both = redirects.functions.iter_mut().zip(&redirects.old_code).zip(places);
    let mut jumps = Vec::new();
    for ((function, &old), at) in both {
        let code = trampoline(&function.name, at, means.access, (old, Gva(function.new)))?;
        write(at, &code);
        function.trampoline = Some(at.0);
        jumps.push((function.jump, Gva(function.new), at));
    }
    for (jump, new, at) in jumps {
        lead_via(&mut redirects.changes, jump, (new, at))?;
        lead_via(&mut redirects.recorded, jump, (new, at))?;
    }
    Ok(Ok(()))
}

/// Notes in the fragments of the jump to `new` whose first byte is at `jump` that it may lead to `via` instead.
fn lead_via(changes: &mut [Change], jump: u64, (new, via): (Gva, Gva)) -> Result<(), Refusal> {
    let Some(first) = changes.iter().position(|change| change.gpa().0 == jump) else {
        return Ok(());
    };
    let further = via.0.wrapping_sub(new.0);
    let fragments = || changes.iter().skip(first).take_while(|change| !change.is_of_bits());
    let mut bytes: Vec<u8> = Vec::with_capacity(5);
    let mut count = 0;
    for fragment in fragments() {
        if bytes.len() >= 5 {
            break;
        }
        bytes.extend(fragment.new_bytes());
        count += 1;
    }
    let &[opcode, a, b, c, d] = bytes.as_slice() else {
        return Ok(());
    };
    // Both places are in the arena, 2 MiB: the distance stays in its 32 bits, or the jump could not be planned.
    let distance = i64::from(i32::from_le_bytes([a, b, c, d])).wrapping_add(further.cast_signed());
    let Ok(distance) = i32::try_from(distance) else {
        return Err(Refusal::Redirect(crate::redirect::RedirectError::Distance {
            name: "a trampoline".to_owned(),
            from: new,
            to: via,
        }));
    };
    let [a, b, c, d] = distance.to_le_bytes();
    let all = [opcode, a, b, c, d];
    let mut rest = all.as_slice();
    for fragment in changes.iter_mut().skip(first).take(count) {
        let (own, behind) = rest.split_at_checked(fragment.len()).unwrap_or((rest, &[]));
        rest = behind;
        *fragment = fragment.clone().or_via(own.to_vec());
    }
    Ok(())
}

/// The patch that is in transition, with its entry.
pub fn in_transition(registry: &Registry) -> Option<(&Entry, &Record)> {
    let mut those = registry.entries.iter().filter(|entry| entry.state == State::Transition);
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
    let plan = from_reads::plan(live, |live| {
        let fields = patch_state::find(live)??;
        let mut atomic = Vec::new();
        for jump in record.changes.iter().filter(|change| !change.is_of_bits()) {
            let led = jump.completion(live).map_err(unreadable)?;
            atomic.extend(led);
        }
        for flag in record.changes.iter().filter(|change| change.is_of_bits()) {
            atomic.extend(flag.completion(live).map_err(unreadable)?);
        }
        atomic.extend(release(live, registry, &fields)?);
        atomic.push(registry.state_change(entry.slot, State::Transition, State::Applied));
        Ok::<_, TransitionError>(Plan {
            staged: Vec::new(),
            atomic,
            // Where some of the jumps lead to the new functions and some to trampolines, and nobody is marked, all is new.
            sites: Vec::new(),
            requires: Preconditions::default(),
            must_be_quiescent: must_be_left(live, registry, record)?,
            unreferenced: Gva(0)..Gva(0),
            patch_code: registry.patch_code(),
            marks: Marks::Clear { fields },
            record: record.clone(),
        })
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
        Ok::<_, TransitionError>(Plan {
            staged: Vec::new(),
            atomic: release(live, registry, &fields)?.into_iter().collect(),
            sites: Vec::new(),
            requires: Preconditions::default(),
            must_be_quiescent: forks(live),
            unreferenced: Gva(0)..Gva(0),
            patch_code: registry.patch_code(),
            marks: Marks::Clear { fields },
            record: Record {
                registration: None,
                ..record.clone()
            },
        })
    });
    plan.map(Some)
}

/// The change that lets the guest's own livepatches transit again; `None` where vmpatch does not keep them from it.
fn release(live: &Live<'_>, registry: &Registry, fields: &PatchState) -> Result<Option<Change>, KernelError> {
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

fn forks(live: &Live<'_>) -> Vec<OldFunction> {
    let range = |at: Gva| -> Option<Range<Gva>> {
        let (_, end) = live.kernel.symbols.containing(at)?;
        Some(at..end)
    };
    let code = live.kernel.symbols.unique(FORK).and_then(range);
    let name = FORK.to_owned();
    code.map(|code| OldFunction { name, code }).into_iter().collect()
}

fn unreadable(source: ChangeError) -> KernelError {
    KernelError::Restore {
        what: "a site of a patch in transition",
        source,
    }
}
