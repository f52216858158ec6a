//! What a guest is like after a failure, in words.

use guest_core::commit::Effect;
use host_agent::outcome::GuestState;

/// For JSON, see `docs/json.md`.
pub fn name(state: GuestState) -> &'static str {
    match state {
        GuestState::AsBefore => Effect::AsBefore.name(),
        GuestState::InForce => Effect::InForce.name(),
        GuestState::PartlyDone => "partly done",
        GuestState::InTransition => "in transition",
        GuestState::HalfPatched => Effect::HalfPatched.name(),
        GuestState::Paused { .. } => "paused",
        GuestState::Lost => "lost",
    }
}

/// How much of the change is in a guest that is paused: the name alone does not tell.
pub fn change(state: GuestState) -> Option<&'static str> {
    match state {
        GuestState::Paused { change } => Some(change.name()),
        _ => None,
    }
}

/// For a person; none where nothing has changed.
pub fn sentence(state: GuestState) -> Option<String> {
    Some(match state {
        GuestState::AsBefore => return None,
        GuestState::InForce => "the change is in force".to_owned(),
        GuestState::PartlyDone => "what is reported as done is in force, and nothing else".to_owned(),
        GuestState::InTransition => {
            "it runs, and is valid: each task runs either the old code or the new; vmpatch status names the tasks, vmpatch finish waits longer".to_owned()
        }
        GuestState::HalfPatched => "it may be half patched".to_owned(),
        GuestState::Paused { change } => format!("paused, and not known to run again; the change is {change}"),
        GuestState::Lost => "it can go on in neither process".to_owned(),
    })
}
