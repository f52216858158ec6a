//! Finds what binds a guest to its QEMU process: jobs and services that were started through QMP and would end with the process.
//!
//! Commands: QEMU's `qapi/job.json`, `qapi/block-core.json`, `qapi/block-export.json`, `qapi/migration.json`, `qapi/ui.json` (7.2 and 10.0).

use super::facts::text;
use crate::client::{Client, CommandError};
use serde_json::{Value, json};

/// Migration capabilities that vmpatch sets itself, or that make no difference to it.
const OWN_CAPABILITIES: [&str; 3] = ["events", "x-ignore-shared", "late-block-activate"];

/// One job, service or setting that binds the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bond {
    /// What it is, with its name.
    pub what: String,
    /// Why it cannot be migrated, and what the operator can do.
    pub reason: &'static str,
}

impl Bond {
    fn new(what: impl Into<String>, reason: &'static str) -> Self {
        Self {
            what: what.into(),
            reason,
        }
    }
}

/// Queries a QEMU for all of them.
pub(super) async fn read(client: &Client) -> Result<Vec<Bond>, CommandError> {
    let mut found = Vec::new();
    for job in list(client, "query-jobs").await? {
        let what = format!(
            "the job `{}` ({}, {})",
            text(&job, "id"),
            text(&job, "type"),
            text(&job, "status")
        );
        found.push(Bond::new(
            what,
            "it works on disks of the old process; wait for its end, or cancel it",
        ));
    }
    for export in list(client, "query-block-exports").await? {
        let what = format!(
            "the {} export `{}` of `{}`",
            text(&export, "type"),
            text(&export, "id"),
            text(&export, "node-name")
        );
        found.push(Bond::new(
            what,
            "those who use it would be cut off; take it away with block-export-del",
        ));
    }
    for node in list(client, "query-named-block-nodes").await? {
        let name = text(&node, "node-name");
        for bitmap in node
            .get("dirty-bitmaps")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            if bitmap.get("persistent") != Some(&Value::Bool(true)) {
                let what = format!("the dirty bitmap `{}` of `{name}`", text(bitmap, "name"));
                found.push(Bond::new(
                    what,
                    "it is in the old process's memory alone; remove it, and begin the backup anew",
                ));
            }
        }
        if node
            .get("write_threshold")
            .is_some_and(|threshold| *threshold != json!(0))
        {
            let what = format!("the write threshold of `{name}`");
            found.push(Bond::new(
                what,
                "it was set through QMP; set it to 0, and anew after the move",
            ));
        }
    }
    for capability in list(client, "query-migrate-capabilities").await? {
        let name = text(&capability, "capability");
        if capability.get("state") == Some(&Value::Bool(true)) && !OWN_CAPABILITIES.contains(&name.as_str()) {
            let what = format!("the capability `{name}` of migration");
            found.push(Bond::new(
                what,
                "it was set through QMP, and vmpatch's moves go without; set it to false",
            ));
        }
    }
    Ok(found)
}

/// The displays of the guest that ask for a password.
pub(super) async fn passwords(client: &Client) -> Result<Vec<&'static str>, CommandError> {
    let mut found = Vec::new();
    for (command, auth, name) in [("query-vnc", "vnc", "vnc"), ("query-spice", "spice", "spice")] {
        let answer = match client.execute_as::<Value>(command, json!({})).await {
            // QEMU was built without it.
            Err(CommandError::Refused { .. }) => continue,
            other => other?,
        };
        if text(&answer, "auth") == auth {
            found.push(name);
        }
    }
    Ok(found)
}

async fn list(client: &Client, command: &str) -> Result<Vec<Value>, CommandError> {
    client.execute_as(command, json!({})).await
}
