//! `status`: what the guest itself says, nothing else.

use super::describe::{CODE_KEPT, describe, describe_reverted};
use super::steps::IN_TRANSITION;
use super::target::open;
use crate::program::cli::Options;
use crate::program::failure::Failure;
use crate::program::report::{Guest, Patch, Patches};
use guest_core::Gva;
use guest_core::guest::{FunctionStatus, InTransition, PatchStatus, Runs, Status};
use guest_core::kernel::KernelError;
use guest_core::plan::Refusal;
use guest_core::registry::{Redirect, State};
use guest_core::task::TaskId;
use guest_core::transaction::recovery::Rest;
use host_agent::chain::chain;
use host_agent::session::{Access, Session};

/// Most tasks that are named which have not moved over.
const MARKED_TASKS_MAX: usize = 16;
/// Most frames that are shown of each of them.
const FRAMES_MAX: usize = 8;
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
    let shown = |patch: &PatchStatus<'_>| {
        let mut report = shown(&status, patch);
        if matches!(patch.state, State::Transition | State::Unpatching) {
            report.warnings.extend(marked_tasks(session));
        }
        report
    };
    status.patches.iter().map(shown).collect()
}

/// The patch of a guest that is in transition.
pub(super) fn patches_in_transition(session: &Session) -> Vec<Patch> {
    let mut patches = patches(session);
    patches.retain(|patch| patch.state == IN_TRANSITION);
    patches
}

/// How many tasks run the code that a transition leads away from, and who they are.
fn marked_tasks(session: &Session) -> Vec<String> {
    let transition = match session.in_transition() {
        Ok(Some(transition)) => transition,
        Ok(None) => return Vec::new(),
        Err(error) => return vec![format!("the tasks that have not moved over can't be read: {error}")],
    };
    let (tasks, marked, mark) = (transition.tasks, &transition.marked, transition.mark);
    let mut said = vec![format!(
        "in transition: {} of {tasks} tasks still run the {mark} code; vmpatch finish waits for them",
        marked.len()
    )];
    let named = marked.iter().take(MARKED_TASKS_MAX);
    said.extend(named.map(|task| format!("{task} runs the {mark} code{}", place(session, &transition, task))));
    if marked.len() > MARKED_TASKS_MAX {
        said.push(format!("and {} tasks more", marked.len() - MARKED_TASKS_MAX));
    }
    said
}

/// Where a task is that has not moved over.
fn place(session: &Session, transition: &InTransition, task: &TaskId) -> String {
    let is_it = |other: &TaskId| other.at == task.at;
    if let Some(blocker) = transition.inside.iter().find(|blocker| is_it(&blocker.task)) {
        let frames = blocker.stack.iter().take(FRAMES_MAX);
        let stack: Vec<_> = frames.map(|frame| symbol(session, frame.ip)).collect();
        return format!(" inside {} ({})", blocker.function, stack.join(" < "));
    }
    let mut unsure = transition.unsure.iter();
    match unsure.find(|unsure| unsure.task.as_ref().is_some_and(is_it)) {
        Some(unsure) => format!(": {}", chain(&unsure.why).join(": ")),
        None => String::new(),
    }
}

fn symbol(session: &Session, at: Gva) -> String {
    match session.kernel().symbols.containing(at) {
        Some((symbol, _)) => format!("{}+{:#x}", symbol.name, at.0.wrapping_sub(symbol.address.0)),
        None => at.to_string(),
    }
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
        Ok(Rest::Complete) => "goes on with the revert, task by task",
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
        Runs::Transition | Runs::ByTask => IN_TRANSITION.to_owned(),
        Runs::NoJump => "unknown".to_owned(),
        Runs::Else(error) => error.to_string(),
    }
}

fn state_name(status: &PatchStatus<'_>) -> &'static str {
    match (status.state, &status.rest) {
        (State::Staging, _) => "staging",
        (State::Applying | State::Reapplying, _) => "half applied",
        (State::Applied, _) | (State::Reverting | State::StartUnpatching, Ok(Rest::Reinstate)) => "applied",
        (State::Reverting, _) => "half reverted",
        (State::Reverted, _) => "reverted",
        (State::Kept, _) => CODE_KEPT,
        (State::Replaced, _) => REPLACED,
        (State::Transition | State::Unpatching | State::StartUnpatching, _) => IN_TRANSITION,
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
