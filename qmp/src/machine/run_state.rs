//! The state of the guest: QMP `query-status`.

use crate::client::{Client, CommandError};
use serde::Deserialize;
use serde_json::json;
use std::fmt;

/// The state of a guest in QEMU. Only the first two can be patched: in the others, QEMU is busy with the guest's state, or the guest is broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunState {
    /// The vCPUs run.
    Running,
    /// Paused by an operator, or not started yet (`-S`).
    Paused,
    /// Any other state, with QEMU's name for it: `inmigrate`, `postmigrate`, `guest-panicked`, `io-error`, …
    Other(String),
}

#[derive(Deserialize)]
struct Status {
    status: String,
}

impl RunState {
    /// Asks QEMU. The `qapi` crate's own type refuses states that a newer QEMU may have.
    pub(crate) async fn query(client: &Client) -> Result<Self, CommandError> {
        let Status { status } = client.execute_as("query-status", json!({})).await?;
        Ok(Self::from_name(status))
    }

    fn from_name(name: String) -> Self {
        match name.as_str() {
            "running" => Self::Running,
            "paused" | "prelaunch" => Self::Paused,
            _ => Self::Other(name),
        }
    }
}

impl fmt::Display for RunState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Other(name) => name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_running_and_paused_by_an_operator_are_states_to_patch_in() {
        assert_eq!(RunState::from_name("running".into()), RunState::Running);
        assert_eq!(RunState::from_name("paused".into()), RunState::Paused);
        for name in [
            "inmigrate",
            "finish-migrate",
            "postmigrate",
            "save-vm",
            "suspended",
            "not-yet-invented",
        ] {
            let state = RunState::from_name(name.into());
            assert_eq!(state, RunState::Other(name.into()));
            assert_eq!(state.to_string(), name);
        }
    }
}
