//! Settings that may have been changed through QMP since the start of a QEMU, so that its command line does not tell them.
//!
//! Commands: QEMU's `qapi/block-core.json`, `qapi/qom.json`, `qapi/machine.json` (7.2 and 10.0).

use super::facts::{children, text};
use crate::client::{Client, CommandError};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// Limits of a drive that every QEMU reports.
const LIMITS: [&str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
/// Further limits, which QEMU reports if they are set.
const MORE_LIMITS: [&str; 14] = [
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "bps_max_length",
    "bps_rd_max_length",
    "bps_wr_max_length",
    "iops_max_length",
    "iops_rd_max_length",
    "iops_wr_max_length",
    "iops_size",
    "group",
];
/// Other properties of a drive that the host may choose.
const OF_DRIVES: [&str; 6] = [
    "/ro",
    "/detect_zeroes",
    "/backing_file_depth",
    "/cache/writeback",
    "/cache/direct",
    "/cache/no-flush",
];
/// Properties of objects and devices that may be set while the guest runs, with a part of the type's name.
const PROPERTIES: [(&str, &str); 7] = [
    ("balloon", "guest-stats-polling-interval"),
    ("iothread", "poll-max-ns"),
    ("iothread", "poll-grow"),
    ("iothread", "poll-shrink"),
    ("iothread", "aio-max-batch"),
    ("iothread", "thread-pool-max"),
    ("throttle-group", "limits"),
];
/// Those properties for which zero lets QEMU choose. 10.0 reports the zero; 11.1 reports its choice, also after the zero was set (seen with 10.0.2 and
/// 11.1.3).
const ZERO_IS_QEMUS_CHOICE: [&str; 2] = ["poll-grow", "poll-shrink"];
/// Folders of the object tree with objects that the command line or QMP has created.
const FOLDERS: [&str; 3] = ["/objects", "/machine/peripheral", "/machine/peripheral-anon"];

/// One setting.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The value.
    pub value: Value,
    how: How,
}

impl Setting {
    fn is_qemus_choice(&self) -> bool {
        self.value == json!(0)
            && matches!(&self.how, How::Property(_, name) if ZERO_IS_QEMUS_CHOICE.contains(&name.as_str()))
    }
}

/// How it is set.
#[derive(Debug, Clone, PartialEq)]
enum How {
    /// It cannot be set.
    Never,
    /// By the limits of a drive: the argument that names the drive, and its name.
    Throttle(&'static str, String),
    /// By a property: its path and name.
    Property(String, String),
}

/// Settings, by names for people.
pub type Settings = BTreeMap<String, Setting>;

/// Queries all settings of a QEMU that can be queried. `blocks` is its reply to `query-block`.
pub(super) async fn read(client: &Client, blocks: &[Value]) -> Result<Settings, CommandError> {
    let mut found = Settings::new();
    for block in blocks {
        of_drive(block, &mut found);
    }
    for folder in FOLDERS {
        for (name, kind) in children(client, folder).await? {
            for (_, property) in PROPERTIES.iter().filter(|(part, _)| kind.contains(part)) {
                let path = format!("{folder}/{name}");
                // QEMU 7.2 does not have all of them.
                let arguments = json!({"path": path, "property": property});
                let value: Value = match client.execute_as("qom-get", arguments).await {
                    Err(CommandError::Refused { .. }) => continue,
                    other => other?,
                };
                let how = How::Property(path.clone(), (*property).to_owned());
                found.insert(format!("{property} of {path}"), Setting { value, how });
            }
        }
    }
    Ok(found)
}

fn of_drive(block: &Value, found: &mut Settings) {
    let Some(inserted) = block.get("inserted") else { return };
    let (argument, name) = match text(block, "device") {
        empty if empty.is_empty() => ("id", text(block, "qdev")),
        name => ("device", name),
    };
    let mut limits = Map::new();
    for key in LIMITS.iter().chain(&MORE_LIMITS) {
        if let Some(value) = inserted.get(key).filter(|value| **value != json!(0)) {
            limits.insert((*key).to_owned(), value.clone());
        }
    }
    let how = How::Throttle(argument, name.clone());
    let value = Value::Object(limits);
    found.insert(format!("limits of drive {name}"), Setting { value, how });
    for pointer in OF_DRIVES {
        if let Some(value) = inserted.pointer(pointer) {
            let value = value.clone();
            let how = How::Never;
            found.insert(format!("{pointer} of drive {name}"), Setting { value, how });
        }
    }
}

/// The settings of the old QEMU that differ or are missing in the new one, with both values.
fn differences<'a>(
    old: &'a Settings,
    new: &'a Settings,
) -> impl Iterator<Item = (&'a str, &'a Setting, Option<&'a Setting>)> {
    old.iter().filter_map(|(what, setting)| {
        let found = new.get(what);
        let same = found.is_some_and(|found| found.value == setting.value);
        (!same).then_some((what.as_str(), setting, found))
    })
}

/// The [`differences`] that are left after [`carry_over`], without settings that the old QEMU was free to choose.
pub fn lost<'a>(
    old: &'a Settings,
    new: &'a Settings,
) -> impl Iterator<Item = (&'a str, &'a Setting, Option<&'a Setting>)> {
    differences(old, new).filter(|(_, setting, found)| found.is_none() || !setting.is_qemus_choice())
}

/// Sets in a QEMU what differs from the old one, as far as it can be set. The caller must check the result.
pub(super) async fn carry_over(client: &Client, old: &Settings, new: &Settings) -> Result<(), CommandError> {
    for (_, Setting { value, how }, _) in differences(old, new) {
        let (command, arguments) = match how {
            How::Never => continue,
            How::Throttle(argument, name) => ("block_set_io_throttle", throttle(argument, name, value)),
            How::Property(path, property) => ("qom-set", json!({"path": path, "property": property, "value": value})),
        };
        match client.execute_as::<Value>(command, arguments).await {
            // A setting that was refused still differs, and is reported with both values.
            Err(CommandError::Refused { .. }) | Ok(_) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn throttle(argument: &str, name: &str, limits: &Value) -> Value {
    let mut arguments = limits.as_object().cloned().unwrap_or_default();
    for key in LIMITS {
        arguments.entry(key).or_insert(json!(0));
    }
    arguments.insert(argument.to_owned(), json!(name));
    Value::Object(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drives_limits_are_read_and_made_into_a_command() {
        // QEMU 10.0.2, shortened.
        let block = json!({"device": "d1", "qdev": "/x", "inserted": {"iops": 100, "bps": 0, "iops_rd": 0, "group": "d1",
            "ro": false, "cache": {"direct": true}}});
        let mut found = Settings::new();
        of_drive(&block, &mut found);
        let limits = &found["limits of drive d1"];
        assert_eq!(limits.value, json!({"iops": 100, "group": "d1"}));
        assert_eq!(found["/cache/direct of drive d1"].value, json!(true));
        let arguments = throttle("device", "d1", &limits.value);
        let all = json!({"device": "d1", "iops": 100, "group": "d1", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops_rd": 0, "iops_wr": 0});
        assert_eq!(arguments, all);
    }

    #[test]
    fn what_the_old_one_left_to_qemu_is_not_lost_whatever_the_new_one_chose() {
        let set = |property: &str, value| {
            let how = How::Property("/objects/io0".to_owned(), property.to_owned());
            let value = json!(value);
            Settings::from([(property.to_owned(), Setting { value, how })])
        };
        assert_eq!(lost(&set("poll-grow", 0), &set("poll-grow", 2)).count(), 0);
        assert_eq!(lost(&set("poll-grow", 3), &set("poll-grow", 2)).count(), 1);
        // Zero nanoseconds mean no polling.
        assert_eq!(lost(&set("poll-max-ns", 0), &set("poll-max-ns", 32768)).count(), 1);
    }

    #[test]
    fn what_only_the_new_one_has_is_no_difference() {
        let setting = |value| Setting {
            value: json!(value),
            how: How::Never,
        };
        let old = Settings::from([("a".to_owned(), setting(1)), ("b".to_owned(), setting(2))]);
        let new = Settings::from([("b".to_owned(), setting(3)), ("c".to_owned(), setting(4))]);
        let found: Vec<_> = differences(&old, &new).map(|(what, ..)| what).collect();
        assert_eq!(found, ["a", "b"]);
    }
}
