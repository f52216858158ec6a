//! Operations of QEMU on the whole guest memory: migration, snapshot, dump. QEMU's dirty log does not record a write from outside, so that QEMU's copy could
//! hold half a patch.

use crate::client::{Client, CommandError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::fmt;

/// States without a migration in progress. All others, and unknown ones, count as busy.
const MIGRATION_AT_REST: [&str; 4] = ["none", "completed", "failed", "cancelled"];

/// Jobs that copy disks and do not use guest memory. All others (`snapshot-save`, …), and unknown ones, count as busy.
const DISK_JOBS: [&str; 6] = ["commit", "stream", "mirror", "backup", "create", "amend"];

/// States of a job that is not in progress.
const JOB_AT_REST: [&str; 3] = ["concluded", "null", "undefined"];

/// An operation in progress that forbids patching.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Busy {
    /// A migration in either direction, or a background snapshot, with its state.
    Migration(String),
    /// A job on the guest's memory, with its type, such as `snapshot-save`.
    Job(String),
    /// A dump of guest memory.
    Dump,
}

impl fmt::Display for Busy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Migration(status) => write!(f, "a migration or background snapshot is under way ({status})"),
            Self::Job(kind) => write!(f, "a {kind} job is under way"),
            Self::Dump => f.write_str("a dump of guest memory is under way"),
        }
    }
}

#[derive(Deserialize)]
struct Job {
    #[serde(rename = "type")]
    kind: String,
    status: String,
}

impl Busy {
    /// Asks QEMU, all questions at once. `None` if no such operation is in progress.
    pub(crate) async fn query(client: &Client) -> Result<Option<Self>, CommandError> {
        let (migration, jobs, dump) = tokio::try_join!(
            client.execute_as::<Value>("query-migrate", json!({})),
            client.execute_as::<Vec<Job>>("query-jobs", json!({})),
            client.execute_as::<Value>("query-dump", json!({})),
        )?;
        Ok(Self::of_migration(&migration)
            .or_else(|| Self::of_jobs(&jobs))
            .or_else(|| Self::of_dump(&dump)))
    }

    fn of_migration(reply: &Value) -> Option<Self> {
        let status = reply.get("status")?.as_str().unwrap_or("of unknown state");
        (!MIGRATION_AT_REST.contains(&status)).then(|| Self::Migration(status.to_owned()))
    }

    fn of_jobs(jobs: &[Job]) -> Option<Self> {
        let busy = |job: &&Job| !DISK_JOBS.contains(&job.kind.as_str()) && !JOB_AT_REST.contains(&job.status.as_str());
        jobs.iter().find(busy).map(|job| Self::Job(job.kind.clone()))
    }

    fn of_dump(reply: &Value) -> Option<Self> {
        (reply.get("status").and_then(Value::as_str) == Some("active")).then_some(Self::Dump)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_migration_is_busy_in_every_state_but_those_at_rest() {
        // QEMU 10.0.2 answers {} before the first migration.
        assert_eq!(Busy::of_migration(&json!({})), None);
        for status in MIGRATION_AT_REST {
            assert_eq!(Busy::of_migration(&json!({"status": status})), None);
        }
        for status in [
            "setup",
            "active",
            "pre-switchover",
            "device",
            "postcopy-active",
            "cancelling",
            "not-yet-invented",
        ] {
            assert_eq!(
                Busy::of_migration(&json!({"status": status})),
                Some(Busy::Migration(status.into()))
            );
        }
    }

    #[test]
    fn disk_jobs_and_ended_ones_do_not_count() {
        let job = |kind: &str, status: &str| Job {
            kind: kind.into(),
            status: status.into(),
        };
        assert_eq!(
            Busy::of_jobs(&[job("mirror", "running"), job("snapshot-save", "concluded")]),
            None
        );
        let jobs = [job("backup", "running"), job("snapshot-load", "running")];
        assert_eq!(Busy::of_jobs(&jobs), Some(Busy::Job("snapshot-load".into())));
    }

    #[test]
    fn only_an_active_dump_counts() {
        assert_eq!(Busy::of_dump(&json!({"status": "none"})), None);
        assert_eq!(
            Busy::of_dump(&json!({"status": "active", "completed": 5})),
            Some(Busy::Dump)
        );
    }
}
