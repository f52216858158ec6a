//! What of each patch is in force, as the guest itself says: its registry, the sites of its functions, and its own livepatches.

use super::{Guest, Vmm};
use crate::addr::Gva;
use crate::change::ChangeError;
use crate::kernel::KernelError;
use crate::kernel::livepatch::{self, Code, Held};
use crate::memory::PhysMemory;
use crate::plan;
use crate::registry::{Entry, PatchedFunction, Record, Redirect, Registry, State};
use crate::transaction::recovery::Rest;

/// The patches of a guest.
#[derive(Debug)]
pub struct Status<'g> {
    /// The patches, in the order in which they were applied.
    pub patches: Vec<PatchStatus<'g>>,
    /// Why the guest's own livepatches can't be read, where they can't: what is said of functions then leaves them out.
    pub own_livepatches: Option<KernelError>,
}

/// A patch in the guest.
#[derive(Debug)]
pub struct PatchStatus<'g> {
    /// Index of its slot in the registry.
    pub slot: usize,
    /// The state that the registry gives.
    pub state: State,
    /// What the next operation does with it first, where its commit was cut off or is under way.
    pub rest: Result<Rest, KernelError>,
    /// Its record; `None` where vmpatch was killed while it staged or wiped the patch.
    pub record: Option<&'g Record>,
    /// The functions of the record.
    pub functions: Vec<FunctionStatus<'g>>,
    /// Modules that it is for, too, and that no part of it has patched.
    pub pending: Vec<&'g str>,
}

/// A function that a patch replaces.
#[derive(Debug)]
pub struct FunctionStatus<'g> {
    /// The function.
    pub function: &'g PatchedFunction,
    /// Whose code runs.
    pub runs: Runs,
    /// The livepatch of the guest's own that replaces it, too, also where it has no effect.
    pub own_livepatch: Option<Held>,
}

/// Whose code runs where a function is called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Runs {
    /// The patch's.
    Patch,
    /// The function's own.
    Original,
    /// That of a livepatch of the guest's own, which comes before the redirect.
    OwnLivepatch,
    /// That of a later patch, of that name, which has taken the function.
    LaterPatch(String),
    /// The livepatch's or the patch's, by task: the guest is in a transition.
    Transition,
    /// The patch's or the one that it replaces, by task: the patch is in transition.
    ByTask,
    /// Not known: something else is in place of the jump.
    Else(ChangeError),
    /// Not known: the record has no jump for the function.
    NoJump,
}

impl FunctionStatus<'_> {
    /// True where the jump is in place, or that of a later patch.
    pub fn is_redirected(&self) -> bool {
        match self.runs {
            Runs::Patch | Runs::OwnLivepatch | Runs::Transition | Runs::ByTask | Runs::LaterPatch(_) => true,
            Runs::Original | Runs::Else(_) | Runs::NoJump => false,
        }
    }
}

impl<V: Vmm> Guest<V> {
    /// What of each patch is in force, as the guest says now. The registry is that of the last operation.
    pub fn status(&self) -> Status<'_> {
        let (live, registry) = (self.live(), &self.registry);
        let (own, own_livepatches) = match livepatch::held(&live) {
            Ok(own) => (own, None),
            Err(error) => (Vec::new(), Some(error)),
        };
        let of = |entry| patch(registry, entry, plan::rest(&live, registry, entry), live.memory, &own);
        let mut patches: Vec<_> = registry.entries.iter().map(of).collect();
        patches.sort_by_key(|patch| patch.record.map(|record| record.order));
        Status {
            patches,
            own_livepatches,
        }
    }
}

fn patch<'g>(
    registry: &Registry,
    entry: &'g Entry,
    rest: Result<Rest, KernelError>,
    memory: &dyn PhysMemory,
    own: &[Held],
) -> PatchStatus<'g> {
    let record = entry.record();
    let functions = record.into_iter().flat_map(|record| {
        let of = |function| FunctionStatus::of(registry, record, function, memory, own);
        record.functions.iter().map(of)
    });
    let pending = record.into_iter().flat_map(|record| {
        let is_pending = |object: &&String| !is_patched(registry, record, object);
        record.pending.iter().filter(is_pending).map(String::as_str)
    });
    PatchStatus {
        slot: entry.slot,
        state: entry.state,
        rest,
        record,
        functions: functions.collect(),
        pending: pending.collect(),
    }
}

impl<'g> FunctionStatus<'g> {
    fn of(
        registry: &Registry,
        record: &Record,
        function: &'g PatchedFunction,
        memory: &dyn PhysMemory,
        own: &[Held],
    ) -> Self {
        let own_livepatch = Held::last_of(own, Gva(function.old)).cloned();
        let in_place = match later(registry, record, function, memory) {
            Some(later) => Runs::LaterPatch(later.id.clone()),
            None => in_site(record, function, memory),
        };
        let runs = match (in_place, &own_livepatch, function.redirect) {
            // ftrace leaves a function alone that is redirected in its site. Behind the site, the guest's livepatch comes first.
            (Runs::Patch, Some(held), Redirect::Body) => match held.code {
                Code::Livepatch => Runs::OwnLivepatch,
                Code::Transition => Runs::Transition,
                Code::BehindSite => Runs::Patch,
            },
            (runs, ..) => runs,
        };
        Self {
            function,
            runs,
            own_livepatch,
        }
    }
}

/// The patch that took a function last, if that was after `record`'s, and is in force there.
fn later<'r>(
    registry: &'r Registry,
    record: &Record,
    function: &PatchedFunction,
    memory: &dyn PhysMemory,
) -> Option<&'r Record> {
    let entries = registry.entries.iter().filter(|entry| entry.state.is_in_force());
    let later = entries
        .filter_map(Entry::record)
        .filter(|other| other.order > record.order);
    let of = |other: &'r Record| Some((other, other.functions.iter().find(|one| one.old == function.old)?));
    let (last, own) = later.filter_map(of).max_by_key(|(other, _)| other.order)?;
    matches!(in_site(last, own, memory), Runs::Patch | Runs::ByTask).then_some(last)
}

/// What the place of the jump holds.
fn in_site(record: &Record, function: &PatchedFunction, memory: &dyn PhysMemory) -> Runs {
    let Some(jump) = record.changes.iter().find(|change| change.gpa().0 == function.jump) else {
        return Runs::NoJump;
    };
    match (jump.verify(memory), jump.undone().verify(memory)) {
        (Ok(()), _) => Runs::Patch,
        (_, Ok(())) => Runs::Original,
        _ if jump.by_way().is_some_and(|via| via.verify(memory).is_ok()) => Runs::ByTask,
        (Err(error), _) => Runs::Else(error),
    }
}

/// True where a part of the same patch is for `object`.
fn is_patched(registry: &Registry, record: &Record, object: &str) -> bool {
    let parts = registry.records().filter(|part| part.digest == record.digest);
    let mut functions = parts.flat_map(|part| &part.functions);
    functions.any(|function| function.object.as_deref() == Some(object))
}
