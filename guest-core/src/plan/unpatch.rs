//! Plans the transition of a revert: tasks inside a patch's new code stay in it until they leave, all others run the old code.
//!
//! It uses the trampolines that the apply has written. Nobody is inside one of them while the patch is in force, so that the pause of the begin can
//! turn them around: a marked task then goes on in the new code, any other one in the old. When nobody is inside the new code any more, the patch is
//! taken out as it is at one instant.

use super::removal::Removal;
use super::stack::Holders;
use super::transition::{self, Jump, Means, NoTransition, TransitionError};
use super::{Marks, Plan, RevertError, from_reads, revert};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::patch_state::{self, Mark, NoPatchState, PatchState};
use crate::kernel::{KernelError, Live};
use crate::redirect::JUMP_BYTES;
use crate::registry::{Entry, PatchedFunction, Record, Registry, State};
use crate::trampoline::{TRAMPOLINE_BYTES, trampoline};
use crate::transaction::recovery::{Keep, Sites};

/// Plans the begin of a transition that reverts the patch `id`.
///
/// # Errors
///
/// [`RevertError::NoTransition`] where it can only be reverted at one instant; else as [`revert`](super::revert).
pub fn begin_revert(live: &Live<'_>, registry: &Registry, id: &str) -> Result<Plan, RevertError> {
    from_reads::plan(live, |live| {
        let (entry, record) = revert::find(registry, id)?;
        if let Some((_, other)) = transition::in_transition(registry) {
            let id = other.id.clone();
            return Err(NoTransition::UnderWay { id }.into());
        }
        begin(live, registry, entry, record)
    })
}

/// The same for a patch in force, and for one of which a begin was cut off: then what is left of it, with marks for the tasks that are inside now.
pub(super) fn begin(live: &Live<'_>, registry: &Registry, entry: &Entry, record: &Record) -> Result<Plan, RevertError> {
    let patch = Patch {
        live,
        registry,
        entry,
        record,
    };
    let mut staged = Vec::new();
    match entry.state {
        State::Applied => {
            staged.extend(registry.upgrade());
            staged.push(registry.state_change(entry.slot, State::Applied, State::StartUnpatching));
        }
        State::StartUnpatching => {}
        _ => return Err(NoTransition::CutOff.into()),
    }
    let means = Means::find(live)?.map_err(NoTransition::from)?;
    let fields = patch.fields()?;
    let registration = record.registration.as_ref().ok_or(NoTransition::NotRegistered)?;
    let below = Holders::of(registry.records().filter(|other| other.order < record.order));
    let mut atomic = Vec::new();
    for function in &record.functions {
        atomic.extend(patch.turned(&means, &below, function)?);
    }
    for jump in jumps_of(record) {
        match Leads::of(live, jump)? {
            Leads::New => atomic.extend(to_trampoline(jump)),
            Leads::Trampoline => {}
            Leads::Elsewhere => return Err(NoTransition::CutOff.into()),
        }
    }
    atomic.push(registry.state_change(entry.slot, State::StartUnpatching, State::Unpatching));
    // What keeps a patch from being taken out does so now, and not when tasks have moved over.
    let removal = patch.removal().plan(State::Reverting, Keep::IfHandedOut)?;
    let marks = Marks::Set {
        fields,
        owner: Gva(registration.module),
        mark: Mark::New,
    };
    Ok(Plan {
        staged,
        atomic,
        // A supervisor finishes what has begun, and restores none.
        sites: Vec::new(),
        unreferenced: Gva(0)..Gva(0),
        marks,
        ..removal
    })
}

/// What the sites of a patch hold of which a begin may have been cut off: all jumps to the new code, some to trampolines, or anything else.
pub(super) fn sites(live: &Live<'_>, record: &Record) -> Result<Sites, KernelError> {
    let mut sites = Sites::New;
    for jump in jumps_of(record) {
        match Leads::of(live, jump)? {
            Leads::New => {}
            Leads::Trampoline => sites = Sites::Mixed,
            Leads::Elsewhere => return Ok(Sites::Old),
        }
    }
    Ok(sites)
}

/// Where a jump leads.
enum Leads {
    New,
    Trampoline,
    Elsewhere,
}

impl Leads {
    fn of(live: &Live<'_>, jump: &Change) -> Result<Self, KernelError> {
        let is_made = |change: &Change| {
            change.is_made_now(live).map_err(|source| KernelError::Restore {
                what: "a site of a patch in transition",
                source,
            })
        };
        if is_made(jump)? {
            return Ok(Self::New);
        }
        match jump.by_way() {
            Some(via) if is_made(&via)? => Ok(Self::Trampoline),
            _ => Ok(Self::Elsewhere),
        }
    }
}

fn jumps_of(record: &Record) -> impl Iterator<Item = &Change> {
    record.changes.iter().filter(|change| !change.is_of_bits())
}

/// Plans the end of a transition that reverts a patch.
///
/// # Errors
///
/// The guest uses the patch, or cannot be read.
pub(super) fn finish(
    live: &Live<'_>,
    registry: &Registry,
    entry: &Entry,
    record: &Record,
) -> Result<Plan, TransitionError> {
    from_reads::plan(live, |live| {
        let fields = patch_state::find(live)??;
        let patch = Patch {
            live,
            registry,
            entry,
            record,
        };
        // What a killed vmpatch has done of it is left as it is, so that nothing need be recorded before.
        let removal = patch.removal().plan(State::Unpatching, Keep::IfHandedOut);
        let mut plan = removal.map_err(|error| TransitionError::Revert(Box::new(error)))?;
        // Where something else has taken the fields, the marks in them are not vmpatch's.
        if let Some(release) = transition::release(live, registry, &fields)? {
            plan.atomic.insert(plan.atomic.len().saturating_sub(1), release);
            plan.must_be_quiescent.extend(transition::forks(live));
            plan.marks = Marks::Clear { fields };
        }
        Ok(plan)
    })
}

/// The change of the jump that `change` has made to one that leads to the trampoline.
fn to_trampoline(change: &Change) -> Option<Change> {
    let via = change.by_way()?;
    Some(change.followed_by(via.new_bytes().to_vec()))
}

#[derive(Clone, Copy)]
struct Patch<'a> {
    live: &'a Live<'a>,
    registry: &'a Registry,
    entry: &'a Entry,
    record: &'a Record,
}

impl<'a> Patch<'a> {
    fn removal(self) -> Removal<'a> {
        Removal {
            live: self.live,
            registry: self.registry,
            entry: self.entry,
            record: self.record,
        }
    }

    /// Where marks are. No transition of the guest's own is under way; one of this patch may have begun.
    fn fields(self) -> Result<PatchState, RevertError> {
        let unused = patch_state::find_unused(self.live)?;
        let found = match unused {
            Err(NoPatchState::OwnTransition) if self.entry.state == State::StartUnpatching => {
                let fields = patch_state::find(self.live)?.map_err(NoTransition::from)?;
                let is_own = transition::release(self.live, self.registry, &fields)?.is_some();
                is_own.then_some(fields).ok_or(NoPatchState::OwnTransition)
            }
            found => found,
        };
        Ok(found.map_err(NoTransition::from)?)
    }

    /// The change that turns the trampoline of a function around; `None` where an earlier revert has, which did not begin. One that was cut off may
    /// have left some of its bytes: nobody is inside a trampoline of a patch in force.
    fn turned(
        &self,
        means: &Means,
        below: &Holders<'_>,
        function: &PatchedFunction,
    ) -> Result<Option<Change>, RevertError> {
        let name = &function.name;
        let missing = || NoTransition::NoTrampoline { function: name.clone() };
        let at = Gva(function.trampoline.ok_or_else(missing)?);
        let text = self.registry.mapped(self.entry.pages.first);
        let offset = at.0.checked_sub(text.0).filter(|offset| {
            let end = offset.checked_add(TRAMPOLINE_BYTES);
            end.is_some_and(|end| end <= self.record.text.len.min(self.entry.pages.len()))
        });
        let gpa = self
            .registry
            .page(self.entry.pages.first)
            .wrapping_add(offset.ok_or_else(missing)?);
        let mut now = vec![0; TRAMPOLINE_BYTES as usize];
        let what = "a trampoline";
        let read = self.live.read_physical(gpa, &mut now);
        read.map_err(|source| KernelError::Unreadable { what, at, source })?;
        let jump = Jump::of(&self.record.changes, function).map_err(|_| missing())?;
        let below = below.at(function.old).last();
        let old = below.map_or(jump.from.wrapping_add(JUMP_BYTES), |below| Gva(below.function.new));
        let code = |mark| trampoline(name, at, means.access, mark, (old, Gva(function.new))).map_err(|_| missing());
        let (for_apply, for_revert) = (code(Mark::Old)?, code(Mark::New)?);
        if now == for_revert {
            return Ok(None);
        }
        let mut bytes = now.iter().zip(for_apply.iter().zip(&for_revert));
        if !bytes.all(|(now, (before, after))| now == before || now == after) {
            return Err(NoTransition::OtherCode { function: name.clone() }.into());
        }
        let what = format!("the trampoline of {name}");
        Ok(Some(Change::replace(what, gpa, now, for_revert)))
    }
}
