//! Whether two QEMUs make the same machine: what was plugged in, taken out or exchanged after the start is not on the
//! command line.

use super::error::UpgradeError;
use qmp::migrate::{BlockDevice, Facts, lost};
use serde_json::Value;
use std::collections::BTreeSet;

const CHANGED_LATER: &str = "it was changed after the old one's start, which its command line does not tell";

/// Compares what matters to the guest.
///
/// # Errors
///
/// The first difference.
pub(super) fn same_machine(old: &Facts, new: &Facts) -> Result<(), UpgradeError> {
    same_size(old, new)?;
    same_devices(old, new)?;
    same_settings(old, new)?;
    same_cpu(old, new)
}

fn differs(what: &'static str, old: String, new: String, reason: &'static str) -> Result<(), UpgradeError> {
    Err(UpgradeError::Differs { what, old, new, reason })
}

/// Compares machine type, number of vCPUs and amount of RAM.
fn same_size(old: &Facts, new: &Facts) -> Result<(), UpgradeError> {
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
    Ok(())
}

/// Compares devices, what they are connected to, and their memory.
fn same_devices(old: &Facts, new: &Facts) -> Result<(), UpgradeError> {
    let only = |these: &BTreeSet<String>, others: &BTreeSet<String>| {
        let some: Vec<_> = these.difference(others).cloned().collect();
        if some.is_empty() {
            "no other".to_owned()
        } else {
            some.join(", ")
        }
    };
    for (what, olds, news) in [
        ("device", &old.devices, &new.devices),
        ("object", &old.objects, &new.objects),
        ("character device", &old.characters, &new.characters),
        ("block node", &old.nodes, &new.nodes),
        ("disk image", &drives(old), &drives(new)),
        ("network", &networks(old), &networks(new)),
    ] {
        if olds != news {
            return differs(what, only(olds, news), only(news, olds), CHANGED_LATER);
        }
    }
    if old.nameless != new.nameless {
        let (old, new) = (old.nameless.join(", "), new.nameless.join(", "));
        return differs("list of devices without an id", old, new, CHANGED_LATER);
    }
    for (name, size) in &old.blocks {
        let found = new.blocks.get(name);
        if found != Some(size) {
            let new = found.map_or("none".to_owned(), u64::to_string);
            let reason = "its firmware is another one; choose the old one's with --data-dir, or start the guest anew";
            return differs("size of a block of memory", format!("{name} {size}"), new, reason);
        }
    }
    Ok(())
}

/// Compares what was set through QMP, and the generation ID.
fn same_settings(old: &Facts, new: &Facts) -> Result<(), UpgradeError> {
    if let Some((what, old, new)) = lost(&old.settings, &new.settings).next() {
        let new = new.map_or("none".to_owned(), |new| new.value.to_string());
        let reason = "it was set through QMP, and can't be set in the new one";
        return differs("setting", format!("{what}: {}", old.value), new, reason);
    }
    if old.generation != new.generation {
        let word = |id: &Option<String>| id.clone().unwrap_or_default();
        return differs(
            "VM generation id",
            word(&old.generation),
            word(&new.generation),
            CHANGED_LATER,
        );
    }
    Ok(())
}

/// Requires that the new CPU has all features of the old one.
fn same_cpu(old: &Facts, new: &Facts) -> Result<(), UpgradeError> {
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

/// Network cards, with their models and addresses, and what they are connected to, by its kind: how that is reached differs.
fn networks(facts: &Facts) -> BTreeSet<String> {
    let network = |line: &String| {
        let (name, rest) = line.split_once(": ").unwrap_or((line, ""));
        let is_nic = rest.contains("type=nic");
        let mut kept = rest.split(',').filter(|word| {
            word.starts_with("type=") || is_nic && (word.starts_with("model=") || word.starts_with("macaddr="))
        });
        let first = kept.next().map(str::to_owned);
        let words = kept.fold(first.unwrap_or_default(), |all, word| format!("{all},{word}"));
        format!("{name} ({words})")
    };
    facts.networks.iter().map(network).collect()
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

/// Bits that a QEMU may not name although the guest loses nothing: by leaf.
const UNSAID: [(&str, u64); 3] = [
    // `pcommit`: no CPU ever had it, and QEMU's emulation dropped it after 7.2.
    ("CPUID 0x7.0 EBX", 1 << 22),
    // HTT and CmpLegacy: both follow from the number of cores and threads. QEMU 7.2 sets them when the guest asks (`cpu_x86_cpuid`), 10.0
    // among the features that it names (`x86_cpu_expand_features`; both in target/i386/cpu.c).
    ("CPUID 0x1 EDX", 1 << 28),
    ("CPUID 0x80000001 ECX", 1 << 1),
];

/// Bits of CPUID that the old CPU has and the new one lacks, by leaf.
fn lost_features(old: &Facts, new: &Facts) -> Vec<String> {
    let lost = |(leaf, bits): (&String, &u64)| {
        let unsaid = UNSAID
            .iter()
            .filter(|(of, _)| of == leaf)
            .fold(0, |all, (_, bit)| all | bit);
        let missing = bits & !new.cpu.get(leaf).unwrap_or(&0) & !unsaid;
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
            elastic: false,
            blocks: [("pc.bios".to_owned(), 1 << 18)].into(),
            devices: ["net0".to_owned()].into(),
            nameless: vec!["isa-debugcon".to_owned()],
            objects: BTreeSet::new(),
            characters: BTreeSet::new(),
            nodes: BTreeSet::new(),
            settings: Default::default(),
            bonds: Vec::new(),
            passwords: Vec::new(),
            generation: None,
            drives: [drive].into(),
            networks: vec!["net0: index=0,type=tap,fd=31".to_owned()],
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
    fn cpu_bits_that_follow_from_the_number_of_cores_are_not_lost_where_a_qemu_does_not_name_them() {
        let cpu = |bits: [u64; 2]| {
            let [features, extended] = bits;
            [
                ("CPUID 0x1 EDX".to_owned(), features),
                ("CPUID 0x80000001 ECX".to_owned(), extended),
            ]
            .into()
        };
        let with = |bits| Facts {
            cpu: cpu(bits),
            ..facts()
        };
        let by_10_0 = with([1 << 28 | 1, 1 << 1 | 1]);
        assert!(same_machine(&by_10_0, &with([1, 1])).is_ok());
        assert!(same_machine(&by_10_0, &with([1 << 28, 1])).is_err());
    }

    #[test]
    fn how_a_network_is_reached_may_differ_and_what_it_is_may_not() {
        let lines = |lines: [&str; 2]| lines.map(str::to_owned).to_vec();
        let old = lines([
            "card0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56",
            "net0: index=0,type=tap,ifname=tap0,script=no",
        ]);
        let mut facts = facts();
        facts.networks = old;
        let other = Facts {
            networks: lines([&facts.networks[0], "net0: index=0,type=tap,fd=31"]),
            ..facts.clone()
        };
        assert!(same_machine(&facts, &other).is_ok());
        let other = Facts {
            networks: lines([&facts.networks[0].replace("56", "57"), &facts.networks[1]]),
            ..facts.clone()
        };
        assert!(same_machine(&facts, &other).is_err());
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
        let text = message(|new| new.nameless.clear());
        assert!(
            text.contains("another list of devices without an id than the old one (, not isa-debugcon)"),
            "{text}"
        );
        let text = message(|new| new.blocks = [("pc.bios".to_owned(), 1 << 17)].into());
        assert!(
            text.contains("another size of a block of memory than the old one (131072, not pc.bios 262144)"),
            "{text}"
        );
        let text = message(|new| new.networks.clear());
        assert!(
            text.contains("another network than the old one (no other, not net0 (type=tap))"),
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
