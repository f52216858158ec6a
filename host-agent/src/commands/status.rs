//! `status`: what the guest itself says, nothing else.

use super::apply::describe;
use crate::cli::Options;
use crate::error::Failure;
use crate::progress::Progress;
use crate::report::{Patch, Patches};
use crate::session::{Session, Target};
use guest_core::place::{Entry, PatchedFunction, Record, State};

/// Reads the registry, and each function's jump.
pub fn status(options: &Options, progress: &Progress) -> Result<Patches, Failure> {
    let session = Session::open(&Target::from_options(options)?, progress)?;
    Ok(Patches {
        guest: session.guest(),
        patches: patches(&session),
        upgrade_due: None,
    })
}

/// All patches of a guest, oldest first.
pub(crate) fn patches(session: &Session) -> Vec<Patch> {
    let mut entries: Vec<&Entry> = session.registry.entries.iter().collect();
    entries.sort_by_key(|entry| entry.record.as_ref().map(|record| record.order));
    entries.into_iter().map(|entry| patch(session, entry)).collect()
}

fn patch(session: &Session, entry: &Entry) -> Patch {
    let Some(record) = &entry.record else {
        let mut patch = nameless(entry);
        patch
            .warnings
            .push("vmpatch was killed here; the next apply or revert wipes what is left".to_owned());
        return patch;
    };
    let mut patch = describe(record, None, state_name(entry.state), "original");
    patch.applied_at = Some(record.applied_at);
    patch.pending.retain(|object| !is_patched(session, record, object));
    for (function, shown) in record.functions.iter().zip(&mut patch.functions) {
        shown.state = function_state(session, record, function);
    }
    let lost = patch.functions.iter().any(|function| function.state != "patched");
    match entry.state {
        State::Applied if lost => patch
            .warnings
            .push("not every function is redirected any more".to_owned()),
        State::Applied => {}
        _ => patch
            .warnings
            .push("vmpatch was killed here; the next apply or revert takes care of it".to_owned()),
    }
    patch
}

/// True where a later part of the same patch is for `object`.
fn is_patched(session: &Session, record: &Record, object: &str) -> bool {
    let mut parts = session.registry.records().filter(|part| part.digest == record.digest);
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
    let memory = session.attached.memory();
    match (jump.verify(memory), jump.undone().verify(memory)) {
        (Ok(()), _) => "patched".to_owned(),
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
        State::Placing => "being laid",
        State::Applying => "half applied",
        State::Applied => "applied",
        State::Reverted => "reverted",
    }
}
