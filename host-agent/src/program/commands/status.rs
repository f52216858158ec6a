//! `status`: what the guest itself says, nothing else.

use super::describe::{CODE_KEPT, describe, describe_reverted};
use super::target::open;
use crate::program::cli::Options;
use crate::program::failure::Failure;
use crate::program::report::{Function, Guest, Patch, Patches};
use guest_core::Gva;
use guest_core::kernel::livepatch::{self, Code, Held};
use guest_core::plan::Refusal;
use guest_core::registry::{Entry, PatchedFunction, Record, Redirect, State};
use host_agent::session::{Access, Session};

/// The function runs the patch's code.
const PATCHED: &str = "patched";
/// Another patch has replaced the patch.
const REPLACED: &str = "replaced, code not removed yet";
/// The guest's own livepatch, or a later patch, comes before the redirect.
const OVERRIDDEN: &str = "overridden";
/// The guest's own livepatch comes before the redirect in some tasks.
const IN_TRANSITION: &str = "in transition";

/// Reads the registry, and each function's jump.
pub fn status(options: &Options) -> Result<Patches, Failure> {
    let session = open(options, Access::Read)?;
    Ok(Patches {
        guest: Guest::of(&session),
        patches: patches(&session),
        upgrade_due: None,
    })
}

/// All patches of a guest, oldest first.
pub(in crate::program) fn patches(session: &Session) -> Vec<Patch> {
    let mut entries: Vec<&Entry> = session.registry().entries.iter().collect();
    entries.sort_by_key(|entry| entry.record.as_ref().map(|record| record.order));
    let (own, failure) = match livepatch::held(&session.live()) {
        Ok(own) => (own, None),
        Err(error) => (
            Vec::new(),
            Some(format!("the guest's own livepatches can't be read: {error}")),
        ),
    };
    let shown = |entry| {
        let mut patch = patch(session, entry, &own);
        patch.warnings.extend(failure.clone());
        patch
    };
    entries.into_iter().map(shown).collect()
}

/// One patch of a guest that has livepatches of its `own`.
fn patch(session: &Session, entry: &Entry, own: &[Held]) -> Patch {
    let Some(record) = &entry.record else {
        let mut patch = nameless(entry);
        patch
            .warnings
            .push("vmpatch was killed here; the next apply or revert wipes what is left".to_owned());
        return patch;
    };
    let mut patch = match entry.state {
        State::Kept => describe_reverted(record),
        State::Replaced => describe(record, None, REPLACED, "original"),
        state => describe(record, None, state_name(state), "original"),
    };
    patch.applied_at = Some(record.applied_at);
    patch.pending.retain(|object| !is_patched(session, record, object));
    for (function, shown) in record.functions.iter().zip(&mut patch.functions) {
        shown.state = function_state(session, record, function);
        if let Some(later) = later(session, record, function) {
            shown.state = OVERRIDDEN.to_owned();
            shown.overridden_by = Some(later.id.clone());
        }
        if let Some(held) = Held::last_of(own, Gva(function.old)) {
            patch.warnings.extend(beside(held, shown));
        }
    }
    let lost = !patch.functions.iter().all(is_redirected);
    match entry.state {
        State::Replaced => patch.warnings.extend(replaced_by(session, record)),
        State::Applied if lost => patch
            .warnings
            .push("not every function is redirected any more".to_owned()),
        State::Applied | State::Kept => {}
        _ => patch
            .warnings
            .push("vmpatch was killed here; the next apply or revert takes care of it".to_owned()),
    }
    patch
}

/// The patch that took a function last, if that was after `record`'s, and is in force there.
fn later<'s>(session: &'s Session, record: &Record, function: &PatchedFunction) -> Option<&'s Record> {
    let entries = session
        .registry()
        .entries
        .iter()
        .filter(|entry| entry.state == State::Applied);
    let last = entries
        .filter_map(Entry::record)
        .filter(|other| other.order > record.order);
    let of = |other: &'s Record| Some((other, other.functions.iter().find(|one| one.old == function.old)?));
    let (last, own) = last.filter_map(of).max_by_key(|(other, _)| other.order)?;
    (function_state(session, last, own) == PATCHED).then_some(last)
}

/// What is still to be done with a patch that another one has replaced.
fn replaced_by(session: &Session, record: &Record) -> Option<String> {
    let mut records = session.registry().records();
    let by = records.find(|other| other.replaces.contains(&record.id))?;
    Some(format!(
        "{} has replaced it: no function leads to its code, which the next apply or revert tries to remove",
        by.id
    ))
}

fn is_redirected(function: &Function) -> bool {
    [PATCHED, OVERRIDDEN, IN_TRANSITION].contains(&function.state.as_str())
}

/// The patch `id`, which is applied. Errors: something else is in place of a redirect, in any part of it.
pub(super) fn active(session: &Session, id: &str) -> Result<Patch, Refusal> {
    let mut parts = patches(session);
    parts.retain(|patch| ![CODE_KEPT, REPLACED].contains(&patch.state.as_str()));
    let digest = parts
        .iter()
        .find(|patch| patch.id == id)
        .map(|patch| patch.digest.clone());
    parts.retain(|patch| Some(&patch.digest) == digest.as_ref());
    for part in &parts {
        if let Some(lost) = part.functions.iter().find(|function| !is_redirected(function)) {
            return Err(Refusal::NotActive {
                id: part.id.clone(),
                function: lost.name.clone(),
                found: lost.state.clone(),
            });
        }
    }
    let patch = parts.into_iter().find(|patch| patch.id == id);
    patch.ok_or_else(|| Refusal::AlreadyApplied { id: id.to_owned() })
}

/// A function for which the guest has loaded a livepatch of its own since it was patched: says which code runs, and gives what the
/// operator should know.
///
/// ftrace leaves a function alone that is redirected in its site, so that one is never reached by the guest's livepatch. Behind the
/// site it comes first.
fn beside(held: &Held, function: &mut Function) -> Option<String> {
    let Held { livepatch, code, .. } = held;
    function.livepatch = Some(livepatch.clone());
    let name = &function.name;
    match (function.redirect, code) {
        _ if function.state != PATCHED => None,
        (Redirect::Ftrace, _) => Some(format!(
            "{name} runs this patch's code: {livepatch}, a livepatch of the guest's own, has no effect on it; to let it take effect, disable it in the guest, revert this patch, and load it again"
        )),
        (Redirect::Body, Code::Livepatch) => {
            function.state = OVERRIDDEN.to_owned();
            Some(format!(
                "{name} runs the code of {livepatch}, a livepatch of the guest's own, not this patch's"
            ))
        }
        (Redirect::Body, Code::Transition) => {
            function.state = IN_TRANSITION.to_owned();
            Some(format!(
                "{name} runs the code of {livepatch}, a livepatch of the guest's own, or this patch's, by task: the guest is in a transition"
            ))
        }
        (Redirect::Body, Code::BehindSite) => None,
    }
}

/// True where a later part of the same patch is for `object`.
fn is_patched(session: &Session, record: &Record, object: &str) -> bool {
    let mut parts = session.registry().records().filter(|part| part.digest == record.digest);
    parts.any(|part| {
        part.functions
            .iter()
            .any(|function| function.object.as_deref() == Some(object))
    })
}

/// What the jump's place holds.
fn function_state(session: &Session, record: &Record, function: &PatchedFunction) -> String {
    let Some(jump) = record.changes.iter().find(|change| change.gpa().0 == function.jump) else {
        return "unknown".to_owned();
    };
    let memory = session.memory();
    match (jump.verify(memory), jump.undone().verify(memory)) {
        (Ok(()), _) => PATCHED.to_owned(),
        (_, Ok(())) => "original".to_owned(),
        (Err(error), _) => error.to_string(),
    }
}

fn nameless(entry: &Entry) -> Patch {
    Patch {
        id: format!("slot {}", entry.slot),
        state: state_name(entry.state).to_owned(),
        ..Patch::default()
    }
}

fn state_name(state: State) -> &'static str {
    match state {
        State::Staging => "staging",
        State::Applying | State::Reapplying => "half applied",
        State::Reverting => "half reverted",
        State::Applied => "applied",
        State::Reverted => "reverted",
        State::Kept => CODE_KEPT,
        State::Replaced => REPLACED,
    }
}
