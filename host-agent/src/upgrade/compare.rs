//! Whether two QEMUs make the same machine: what was plugged in, taken out or exchanged after the start is not on the
//! command line.

use super::error::UpgradeError;
use qmp::migrate::{BlockDevice, Facts};
use serde_json::Value;
use std::collections::BTreeSet;

const CHANGED_LATER: &str = "it was changed after the old one's start, which its command line does not tell";

/// Compares what matters to the guest.
pub(super) fn same_machine(old: &Facts, new: &Facts) -> Result<(), UpgradeError> {
    let differs = |what, old: String, new: String, reason| Err(UpgradeError::Differs { what, old, new, reason });
    if old.machine != new.machine {
        let reason = "it does not know the old one's";
        return differs("machine type", old.machine.clone(), new.machine.clone(), reason);
    }
    if old.vcpus != new.vcpus {
        return differs(
            "number of vCPUs",
            old.vcpus.to_string(),
            new.vcpus.to_string(),
            CHANGED_LATER,
        );
    }
    if old.ram != new.ram {
        return differs("amount of RAM", old.ram.to_string(), new.ram.to_string(), CHANGED_LATER);
    }
    let only = |these: &BTreeSet<String>, others: &BTreeSet<String>| {
        let some: Vec<_> = these.difference(others).cloned().collect();
        if some.is_empty() {
            "no other".to_owned()
        } else {
            some.join(", ")
        }
    };
    if old.devices != new.devices {
        let (old, new) = (only(&old.devices, &new.devices), only(&new.devices, &old.devices));
        return differs("device", old, new, CHANGED_LATER);
    }
    let (olds, news) = (drives(old), drives(new));
    if olds != news {
        return differs("disk image", only(&olds, &news), only(&news, &olds), CHANGED_LATER);
    }
    match lost_features(old, new).as_slice() {
        [] => Ok(()),
        lost => Err(UpgradeError::unfit(
            format!(
                "the new process's CPU lacks what the guest may use ({})",
                lost.join(", ")
            ),
            "choose a QEMU that has it, or start the guest anew with a CPU model that both know",
        )),
    }
}

/// Each drive with the files that its image lies in.
fn drives(facts: &Facts) -> BTreeSet<String> {
    let drive = |drive: &BlockDevice| format!("{}={}", drive.name, files(&drive.file).join("+"));
    facts.drives.iter().map(drive).collect()
}

/// The files of an image: its name, or, where QEMU describes it as JSON, the file names in there. How it is described
/// otherwise differs with QEMU's version.
fn files(image: &str) -> Vec<String> {
    let Some(json) = image.strip_prefix("json:") else {
        return vec![image.to_owned()];
    };
    let mut found = Vec::new();
    let mut open = vec![serde_json::from_str::<Value>(json).unwrap_or_default()];
    while let Some(value) = open.pop() {
        if let Value::Object(members) = value {
            for (name, member) in members {
                match member {
                    Value::String(path) if name == "filename" => found.push(path),
                    member => open.push(member),
                }
            }
        }
    }
    found.sort();
    found
}

/// A feature that no CPU ever had: `pcommit`, which QEMU's emulation dropped after 7.2. Losing it takes nothing from a guest.
const PCOMMIT: (&str, u64) = ("CPUID 0x7.0 EBX", 1 << 22);

/// Bits of CPUID that the old CPU has and the new one lacks, by leaf.
fn lost_features(old: &Facts, new: &Facts) -> Vec<String> {
    let lost = |(leaf, bits): (&String, &u64)| {
        let ignored = if leaf == PCOMMIT.0 { PCOMMIT.1 } else { 0 };
        let missing = bits & !new.cpu.get(leaf).unwrap_or(&0) & !ignored;
        (missing != 0).then(|| format!("{leaf} bits {missing:#x}"))
    };
    old.cpu.iter().filter_map(lost).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let drive = BlockDevice {
            name: "disk0".to_owned(),
            file: "/a.qcow2".to_owned(),
        };
        Facts {
            version: (7, 2, 0),
            machine: "pc-q35-7.2".to_owned(),
            vcpus: 2,
            ram: 1 << 30,
            devices: ["net0".to_owned()].into(),
            drives: [drive].into(),
            networks: Vec::new(),
            cpu: [("CPUID 7 EBX".to_owned(), 0b1010)].into(),
        }
    }

    fn message(change: impl FnOnce(&mut Facts)) -> String {
        let mut new = facts();
        change(&mut new);
        same_machine(&facts(), &new).map_or_else(|error| error.to_string(), |()| "the same".to_owned())
    }

    #[test]
    fn the_same_machine_in_a_newer_qemu_is_the_same() {
        assert_eq!(message(|new| new.version = (10, 0, 2)), "the same");
        assert_eq!(
            message(|new| new.cpu = [("CPUID 7 EBX".to_owned(), 0b1111)].into()),
            "the same"
        );
    }

    #[test]
    fn what_differs_is_named_with_both_sides() {
        let text = message(|new| new.drives.clear());
        assert!(
            text.starts_with("the new process has another disk image than the old one (no other, not disk0=/a.qcow2)")
        );
        let text = message(|new| new.devices.extend(["hot".to_owned()]));
        assert!(
            text.contains("another device than the old one (hot, not no other)"),
            "{text}"
        );
        let text = message(|new| new.vcpus = 4);
        assert!(text.contains("number of vCPUs than the old one (4, not 2)"), "{text}");
        let text = message(|new| new.cpu.clear());
        assert!(
            text.contains("lacks what the guest may use (CPUID 7 EBX bits 0xa)"),
            "{text}"
        );
    }

    #[test]
    fn an_image_described_as_json_is_known_by_its_files() {
        let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/b"},"filename":"/a"}"#;
        assert_eq!(files(json), ["/a", "/b"]);
        assert_eq!(files("/a"), ["/a"]);
    }
}
