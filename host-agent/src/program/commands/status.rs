//! `status`: what the guest itself says, nothing else.

use super::describe::{CODE_KEPT, describe, describe_reverted};
use super::target::open;
use crate::program::cli::Options;
use crate::program::failure::Failure;
use crate::program::report::{Guest, Patch, Patches};
use guest_core::guest::{FunctionStatus, PatchStatus, Runs, Status};
use guest_core::kernel::KernelError;
use guest_core::plan::Refusal;
use guest_core::registry::{Redirect, State};
use guest_core::transaction::recovery::Rest;
use host_agent::session::{Access, Session};

/// Another patch has replaced the patch.
const REPLACED: &str = "replaced, code not removed yet";

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
    let status = session.status();
    status.patches.iter().map(|patch| shown(&status, patch)).collect()
}

fn shown(status: &Status<'_>, of: &PatchStatus<'_>) -> Patch {
    let mut patch = patch(of);
    let failure = status.own_livepatches.as_ref();
    let warning = failure.map(|error| format!("the guest's own livepatches can't be read: {error}"));
    patch.warnings.extend(warning);
    patch.warnings.extend(replaced_by(status, of));
    patch
}

/// What is still to be done with a patch that another one has replaced.
fn replaced_by(status: &Status<'_>, patch: &PatchStatus<'_>) -> Option<String> {
    let id = &patch.record.filter(|_| patch.state == State::Replaced)?.id;
    let mut others = status.patches.iter().filter_map(|other| other.record);
    let by = others.find(|other| other.replaces.contains(id))?;
    Some(format!(
        "{} has replaced it: no function leads to its code, which the next apply or revert tries to remove",
        by.id
    ))
}

fn patch(status: &PatchStatus<'_>) -> Patch {
    let mut patch = match (status.record, status.state) {
        (None, _) => Patch {
            id: format!("slot {}", status.slot),
            state: state_name(status).to_owned(),
            ..Patch::default()
        },
        (Some(record), State::Kept) => describe_reverted(record),
        (Some(record), _) => describe(record, None, state_name(status), "original"),
    };
    patch.applied_at = status.record.map(|record| record.applied_at);
    patch.pending = status.pending.iter().map(ToString::to_string).collect();
    for (function, shown) in status.functions.iter().zip(&mut patch.functions) {
        shown.state = function_state(&function.runs);
        if let Runs::LaterPatch(id) = &function.runs {
            shown.overridden_by = Some(id.clone());
        }
        shown.livepatch = function.own_livepatch.as_ref().map(|held| held.livepatch.clone());
        patch.warnings.extend(beside(function));
    }
    let is_lost = status.state == State::Applied && !status.functions.iter().all(FunctionStatus::is_redirected);
    if is_lost {
        patch
            .warnings
            .push("not every function is redirected any more".to_owned());
    }
    patch.warnings.extend(left_to_do(&status.rest));
    patch
}

/// What the next command that changes the guest does first, where vmpatch was killed.
fn left_to_do(rest: &Result<Rest, KernelError>) -> Option<String> {
    let what = match rest {
        Ok(Rest::Nothing | Rest::Discard) => return None,
        Ok(Rest::Wipe) => "wipes what is left",
        Ok(Rest::Reinstate) => "records that the patch is in force, and not reverted",
        Ok(Rest::Remove(_)) => "takes the patch out",
        Err(error) => return Some(format!("what vmpatch has left can't be read: {error}")),
    };
    Some(format!("vmpatch was killed here; the next apply or revert {what}"))
}

/// The patch `id`, which is applied. Errors: something else is in place of a redirect, in any part of it.
pub(super) fn active(session: &Session, id: &str) -> Result<Patch, Refusal> {
    let status = session.status();
    let in_force = status.patches.iter().filter(|patch| !patch.state.is_off());
    let parts: Vec<_> = in_force.filter_map(|patch| Some((patch, patch.record?))).collect();
    let Some((patch, record)) = parts.iter().find(|(_, record)| record.id == id) else {
        return Err(Refusal::AlreadyApplied { id: id.to_owned() });
    };
    for (part, of) in parts.iter().filter(|(_, part)| part.digest == record.digest) {
        if let Some(lost) = part.functions.iter().find(|function| !function.is_redirected()) {
            return Err(Refusal::NotActive {
                id: of.id.clone(),
                function: lost.function.name.clone(),
                found: function_state(&lost.runs),
            });
        }
    }
    Ok(shown(&status, patch))
}

/// What the operator should know of a function for which the guest has loaded a livepatch of its own since it was patched.
fn beside(status: &FunctionStatus<'_>) -> Option<String> {
    let livepatch = &status.own_livepatch.as_ref()?.livepatch;
    let name = &status.function.name;
    match (&status.runs, status.function.redirect) {
        (Runs::Patch, Redirect::Ftrace) => Some(format!(
            "{name} runs this patch's code: {livepatch}, a livepatch of the guest's own, has no effect on it; to let it take effect, disable it in the guest, revert this patch, and load it again"
        )),
        (Runs::OwnLivepatch, _) => Some(format!(
            "{name} runs the code of {livepatch}, a livepatch of the guest's own, not this patch's"
        )),
        (Runs::Transition, _) => Some(format!(
            "{name} runs the code of {livepatch}, a livepatch of the guest's own, or this patch's, by task: the guest is in a transition"
        )),
        _ => None,
    }
}

fn function_state(runs: &Runs) -> String {
    match runs {
        Runs::Patch => "patched".to_owned(),
        Runs::Original => "original".to_owned(),
        Runs::OwnLivepatch | Runs::LaterPatch(_) => "overridden".to_owned(),
        Runs::Transition => "in transition".to_owned(),
        Runs::NoJump => "unknown".to_owned(),
        Runs::Else(error) => error.to_string(),
    }
}

fn state_name(status: &PatchStatus<'_>) -> &'static str {
    match (status.state, &status.rest) {
        (State::Staging, _) => "staging",
        (State::Applying | State::Reapplying, _) => "half applied",
        (State::Applied, _) | (State::Reverting, Ok(Rest::Reinstate)) => "applied",
        (State::Reverting, _) => "half reverted",
        (State::Reverted, _) => "reverted",
        (State::Kept, _) => CODE_KEPT,
        (State::Replaced, _) => REPLACED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_core::transaction::recovery::Keep;

    #[test]
    fn a_revert_that_was_cut_off_is_half_reverted_and_one_that_has_not_begun_is_applied() {
        for (rest, state, next) in [
            (Rest::Remove(Keep::IfHandedOut), "half reverted", "takes the patch out"),
            (
                Rest::Reinstate,
                "applied",
                "records that the patch is in force, and not reverted",
            ),
        ] {
            let status = PatchStatus {
                slot: 2,
                state: State::Reverting,
                rest: Ok(rest),
                record: None,
                functions: Vec::new(),
                pending: Vec::new(),
            };
            let patch = patch(&status);
            assert_eq!((patch.id.as_str(), patch.state.as_str()), ("slot 2", state));
            let warning = format!("vmpatch was killed here; the next apply or revert {next}");
            assert_eq!(patch.warnings, [warning]);
        }
    }
}
