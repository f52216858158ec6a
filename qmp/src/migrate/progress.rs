//! The progress of a migration: QMP `query-migrate`.

use serde_json::Value;

/// The state of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// No migration since the start of the process.
    None,
    /// In progress: any state that is not one of the others, unknown ones included.
    UnderWay,
    /// All has been sent, or has arrived. The guest is paused.
    Completed,
    /// Given up by QEMU, or cancelled. The guest runs on in the old process.
    GivenUp,
}

impl Status {
    fn from_name(name: Option<&str>) -> Self {
        match name {
            None | Some("none") => Self::None,
            Some("completed") => Self::Completed,
            Some("failed" | "cancelled") => Self::GivenUp,
            Some(_) => Self::UnderWay,
        }
    }
}

/// The progress of a migration at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// The state.
    pub status: Status,
    /// QEMU's own word for the state.
    pub state: String,
    /// Why it failed, if QEMU tells.
    pub reason: Option<String>,
    /// RAM of the guest, in bytes.
    pub total: u64,
    /// RAM still to be sent, in bytes.
    pub remaining: u64,
    /// Bytes sent.
    pub transferred: u64,
    /// Bytes a second.
    pub rate: u64,
    /// How often QEMU has searched for pages that were written after they were sent.
    pub rounds: u64,
    /// Downtime if the guest were paused now, in milliseconds, as QEMU estimates it.
    pub downtime_expected_ms: Option<u64>,
    /// Downtime of the guest in milliseconds, as the old QEMU measured it.
    pub downtime_ms: Option<u64>,
    /// Reasons that forbid a migration.
    pub blockers: Vec<String>,
}

impl Progress {
    /// Decodes QEMU's reply. Missing numbers are 0.
    pub(super) fn of(reply: &Value) -> Self {
        let state = reply.get("status").and_then(Value::as_str);
        let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64);
        let ram = reply.get("ram").unwrap_or(&Value::Null);
        let in_ram = |name| number(ram, name).unwrap_or(0);
        let megabits = ram.get("mbps").and_then(Value::as_f64).unwrap_or(0.0);
        let blockers = reply.get("blocked-reasons").and_then(Value::as_array);
        Self {
            status: Status::from_name(state),
            state: state.unwrap_or("none").to_owned(),
            reason: reply.get("error-desc").and_then(Value::as_str).map(str::to_owned),
            total: in_ram("total"),
            remaining: in_ram("remaining"),
            transferred: in_ram("transferred"),
            rate: bytes_a_second(megabits),
            rounds: in_ram("dirty-sync-count"),
            downtime_expected_ms: number(reply, "expected-downtime"),
            downtime_ms: number(reply, "downtime"),
            blockers: blockers
                .into_iter()
                .flatten()
                .filter_map(|reason| Some(reason.as_str()?.to_owned()))
                .collect(),
        }
    }
}

/// Converts QEMU's 10^6 bits a second to bytes a second. A number that makes no sense becomes 0.
fn bytes_a_second(megabits: f64) -> u64 {
    let bytes = (megabits * 125_000.0).round();
    if bytes.is_finite() && bytes >= 0.0 {
        // The conversion saturates. The number is only shown.
        bytes as u64
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_answer_in_the_middle_of_it_is_read() {
        // QEMU 10.0.2, shortened.
        let reply = json!({"status": "active", "expected-downtime": 300, "blocked-reasons": ["a device"], "ram":
            {"total": 537_403_392, "remaining": 4096, "transferred": 7, "mbps": 1059.5, "dirty-sync-count": 3}});
        let progress = Progress::of(&reply);
        assert_eq!((progress.status, progress.state.as_str()), (Status::UnderWay, "active"));
        assert_eq!(
            (progress.total, progress.remaining, progress.transferred),
            (537_403_392, 4096, 7)
        );
        assert_eq!((progress.rate, progress.rounds), (132_437_500, 3));
        assert_eq!((progress.downtime_expected_ms, progress.downtime_ms), (Some(300), None));
        assert_eq!(progress.blockers, ["a device"]);
    }

    #[test]
    fn before_the_first_migration_there_is_none() {
        let progress = Progress::of(&json!({}));
        assert_eq!((progress.status, progress.total, progress.rate), (Status::None, 0, 0));
    }

    #[test]
    fn a_state_that_is_not_known_counts_as_under_way() {
        for (state, status) in [
            ("completed", Status::Completed),
            ("failed", Status::GivenUp),
            ("cancelled", Status::GivenUp),
            ("cancelling", Status::UnderWay),
            ("not-yet-invented", Status::UnderWay),
        ] {
            assert_eq!(Progress::of(&json!({"status": state})).status, status);
        }
    }

    #[test]
    fn a_rate_that_makes_no_sense_is_nothing() {
        for megabits in [f64::NAN, f64::INFINITY, -1.0] {
            assert_eq!(bytes_a_second(megabits), 0);
        }
    }
}
