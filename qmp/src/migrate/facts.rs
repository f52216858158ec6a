//! The properties of a QEMU's machine, to compare the old one with the new one.

use super::bound::{self, Bond};
use super::settings::{self, Settings};
use crate::client::{Client, CommandError};
use crate::memory::ramblock;
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A disk, CD or floppy drive, as QMP `query-block` shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockDevice {
    /// Name of the drive, or of the device that it belongs to.
    pub name: String,
    /// The image in it; empty without a medium.
    pub file: String,
}

/// Prefixes of the labels that QEMU or vmpatch gives to character devices. `#` is the prefix of a gdbstub's, which stays (`gdbstub/system.c`,
/// `gdbserver_start`).
const OWN_LABELS: [&str; 9] = [
    "#",
    "compat_monitor",
    "debugcon",
    "gdb",
    "monitor_",
    "parallel",
    "serial",
    "vmpatch",
    "virtcon",
];

/// The properties of a QEMU's machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// Major, minor and micro version.
    pub version: (u64, u64, u64),
    /// The machine type, with its version: `pc-q35-7.2`.
    pub machine: String,
    /// Number of vCPUs.
    pub vcpus: usize,
    /// RAM in bytes, with plugged memory. Virtio-mem devices count with their largest size: their present size migrates with the guest.
    pub ram: u64,
    /// True if some of the RAM belongs to a virtio-mem device.
    pub elastic: bool,
    /// Blocks of memory that a migration sends, with their sizes in bytes, without those that the new QEMU can resize.
    pub blocks: BTreeMap<String, u64>,
    /// Devices with an id.
    pub devices: BTreeSet<String>,
    /// Types of the devices without an id, sorted.
    pub nameless: Vec<String>,
    /// Objects, with their types, without monitors, which are objects in QEMU 11.1.
    pub objects: BTreeSet<String>,
    /// Character devices, without those that QEMU or vmpatch names itself.
    pub characters: BTreeSet<String>,
    /// Block nodes with a name that QEMU did not choose, with their drivers.
    pub nodes: BTreeSet<String>,
    /// Settings that can be changed while the guest runs.
    pub settings: Settings,
    /// What binds the guest to the process.
    pub bonds: Vec<Bond>,
    /// Displays that ask for a password: `vnc`, `spice`.
    pub passwords: Vec<&'static str>,
    /// The identity that a vmgenid device presents to the guest.
    pub generation: Option<String>,
    /// The drives.
    pub drives: BTreeSet<BlockDevice>,
    /// Network backends and their network cards, as QEMU prints them (HMP `info network`).
    pub networks: Vec<String>,
    /// Features of the first vCPU, by CPUID leaf and register.
    pub cpu: BTreeMap<String, u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MemorySize {
    base_memory: u64,
    plugged_memory: Option<u64>,
}

impl Facts {
    /// Queries QEMU.
    pub(super) async fn read(client: &Client) -> Result<Self, CommandError> {
        let vcpus: Vec<Value> = client.execute_as("query-cpus-fast", json!({})).await?;
        let memory: MemorySize = client.execute_as("query-memory-size-summary", json!({})).await?;
        let blocks: Vec<Value> = client.execute_as("query-block", json!({})).await?;
        let table: qapi::qmp::HumanReadableText = client.execute_as("x-query-ramblock", json!({})).await?;
        let memory_devices: Vec<Value> = client.execute_as("query-memory-devices", json!({})).await?;
        let nodes: Vec<Value> = client.execute_as("query-named-block-nodes", json!({})).await?;
        let characters: Vec<Value> = client.execute_as("query-chardev", json!({})).await?;
        let first = vcpus.first().map(|vcpu| text(vcpu, "qom-path"));
        Ok(Self {
            version: client.greeting().version,
            machine: machine_type(client).await?,
            vcpus: vcpus.len(),
            ram: ram(&memory, &memory_devices),
            elastic: memory_devices.iter().any(is_elastic),
            blocks: fixed_blocks(&table.human_readable_text),
            devices: names(children(client, "/machine/peripheral").await?),
            nameless: kinds(children(client, "/machine/peripheral-anon").await?),
            objects: objects(children(client, "/objects").await?),
            characters: characters
                .iter()
                .map(|one| text(one, "label"))
                .filter(|label| !OWN_LABELS.iter().any(|own| label.starts_with(own)))
                .collect(),
            nodes: nodes.iter().filter_map(node).collect(),
            settings: settings::read(client, &blocks).await?,
            bonds: bound::read(client).await?,
            passwords: bound::passwords(client).await?,
            generation: generation(client).await?,
            drives: blocks.iter().map(drive).collect(),
            cpu: features(client, &first.unwrap_or_default()).await?,
            networks: client
                .hmp("info network")
                .await?
                .lines()
                .map(|line| line.trim().trim_start_matches("\\ ").to_owned())
                .collect(),
        })
    }
}

/// The machine type without its suffix `-machine`. An alias such as `q35` is resolved to its class, such as `pc-q35-7.2-machine`.
async fn machine_type(client: &Client) -> Result<String, CommandError> {
    let class: String = client
        .execute_as("qom-get", json!({"path": "/machine", "property": "type"}))
        .await?;
    Ok(class.strip_suffix("-machine").unwrap_or(&class).to_owned())
}

/// The CPUID bits of a vCPU (`X86CPUFeatureWordInfo`); empty for another architecture.
async fn features(client: &Client, vcpu: &str) -> Result<BTreeMap<String, u64>, CommandError> {
    let arguments = json!({"path": vcpu, "property": "feature-words"});
    let words: Vec<Value> = match client.execute_as("qom-get", arguments).await {
        Err(CommandError::Refused { .. }) => Vec::new(),
        other => other?,
    };
    let word = |word: &Value| {
        let number = |name: &str| word.get(name).and_then(Value::as_u64);
        let subleaf = number("cpuid-input-ecx").map_or(String::new(), |ecx| format!(".{ecx}"));
        let leaf = number("cpuid-input-eax")?;
        let name = format!("CPUID {leaf:#x}{subleaf} {}", text(word, "cpuid-register"));
        Some((name, number("features")?))
    };
    Ok(words.iter().filter_map(word).collect())
}

/// The objects in a folder of the object tree: names and types.
pub(super) async fn children(client: &Client, path: &str) -> Result<Vec<(String, String)>, CommandError> {
    let all: Vec<Value> = client.execute_as("qom-list", json!({"path": path})).await?;
    let child = |one: &Value| {
        let kind = text(one, "type");
        let kind = kind.strip_prefix("child<")?.strip_suffix('>')?.to_owned();
        Some((text(one, "name"), kind))
    };
    Ok(all.iter().filter_map(child).collect())
}

fn names(children: Vec<(String, String)>) -> BTreeSet<String> {
    children.into_iter().map(|(name, _)| name).collect()
}

fn kinds(children: Vec<(String, String)>) -> Vec<String> {
    let mut kinds: Vec<String> = children.into_iter().map(|(_, kind)| kind).collect();
    kinds.sort();
    kinds
}

fn objects(children: Vec<(String, String)>) -> BTreeSet<String> {
    let of_guest = children.into_iter().filter(|(_, kind)| !kind.starts_with("monitor-"));
    of_guest.map(|(name, kind)| format!("{name} ({kind})")).collect()
}

fn is_elastic(device: &Value) -> bool {
    text(device, "type") == "virtio-mem"
}

fn ram(memory: &MemorySize, devices: &[Value]) -> u64 {
    let all = memory.base_memory.saturating_add(memory.plugged_memory.unwrap_or(0));
    let elastic = devices.iter().filter(|device| is_elastic(device));
    let number = |device: &Value, pointer: &str| device.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
    elastic.fold(all, |all, device| {
        let (now, most) = (number(device, "/data/size"), number(device, "/data/max-size"));
        all.saturating_sub(now).saturating_add(most)
    })
}

/// QEMU itself creates the blocks of ACPI tables, and adopts the size that comes with the guest. Unknown blocks are left to QEMU.
fn fixed_blocks(table: &str) -> BTreeMap<String, u64> {
    let blocks = ramblock::parse(table).unwrap_or_default();
    let fixed = blocks.into_iter().filter(|block| !block.name.starts_with("/rom@"));
    fixed.map(|block| (block.name, block.used)).collect()
}

/// A block node with a name of its own, as `d0 (qcow2)`.
fn node(node: &Value) -> Option<String> {
    let name = text(node, "node-name");
    (!name.starts_with('#')).then(|| format!("{name} ({})", text(node, "drv")))
}

async fn generation(client: &Client) -> Result<Option<String>, CommandError> {
    match client.execute_as::<Value>("query-vm-generation-id", json!({})).await {
        // The machine has no such device.
        Err(CommandError::Refused { .. }) => Ok(None),
        answer => Ok(Some(text(&answer?, "guid"))),
    }
}

fn drive(block: &Value) -> BlockDevice {
    let name = match text(block, "device") {
        empty if empty.is_empty() => text(block, "qdev"),
        name => name,
    };
    let file = block.pointer("/inserted/file").and_then(Value::as_str);
    BlockDevice {
        name,
        file: file.unwrap_or_default().to_owned(),
    }
}

pub(super) fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn how_much_a_virtio_mem_device_has_just_now_does_not_count() {
        let memory = |plugged| MemorySize {
            base_memory: 256,
            plugged_memory: Some(plugged),
        };
        let device =
            |size| json!({"type": "virtio-mem", "data": {"size": size, "max-size": 128, "requested-size": 64}});
        let dimm = json!({"type": "dimm", "data": {"size": 32}});
        assert_eq!(ram(&memory(64 + 32), &[device(64), dimm]), 256 + 128 + 32);
        assert_eq!(ram(&memory(0), &[device(0)]), 256 + 128);
    }

    #[test]
    fn monitors_are_no_objects_of_the_guest() {
        let child = |name: &str, kind: &str| (name.to_owned(), kind.to_owned());
        let of_11_1 = vec![
            child("compat_monitor0", "monitor-qmp"),
            child("ram0", "memory-backend-ram"),
        ];
        assert_eq!(objects(of_11_1), ["ram0 (memory-backend-ram)".to_owned()].into());
    }

    #[test]
    fn a_drive_is_named_by_its_backend_or_its_device() {
        let named = drive(&json!({"device": "disk0", "qdev": "/x", "inserted": {"file": "/a.qcow2"}}));
        assert_eq!((named.name.as_str(), named.file.as_str()), ("disk0", "/a.qcow2"));
        let by_device = drive(&json!({"device": "", "qdev": "/machine/peripheral/d0/virtio-backend"}));
        assert_eq!(by_device.name, "/machine/peripheral/d0/virtio-backend");
        assert_eq!(by_device.file, "");
    }
}
