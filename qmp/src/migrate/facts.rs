//! What can be compared between two QEMUs that are to be one machine.

use crate::client::{Client, CommandError};
use serde::Deserialize;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A disk, CD or floppy drive, as QMP `query-block` shows it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockDevice {
    /// Its name, or the device that it belongs to.
    pub name: String,
    /// The image in it; empty where there is no medium.
    pub file: String,
}

/// What a QEMU says of the machine that it makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Major, minor and micro version.
    pub version: (u64, u64, u64),
    /// The machine type, with its version: `pc-q35-7.2`.
    pub machine: String,
    /// vCPUs.
    pub vcpus: usize,
    /// RAM in bytes, with what was plugged.
    pub ram: u64,
    /// Devices with an id.
    pub devices: BTreeSet<String>,
    /// Drives.
    pub drives: BTreeSet<BlockDevice>,
    /// Network backends and the network cards at them, in QEMU's words (HMP `info network`).
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
    /// Asks QEMU.
    pub(super) async fn read(client: &Client) -> Result<Self, CommandError> {
        let vcpus: Vec<Value> = client.execute_as("query-cpus-fast", json!({})).await?;
        let memory: MemorySize = client.execute_as("query-memory-size-summary", json!({})).await?;
        let blocks: Vec<Value> = client.execute_as("query-block", json!({})).await?;
        let first = vcpus.first().map(|vcpu| text(vcpu, "qom-path"));
        Ok(Self {
            version: client.greeting().version,
            machine: machine_type(client).await?,
            vcpus: vcpus.len(),
            ram: memory.base_memory.saturating_add(memory.plugged_memory.unwrap_or(0)),
            devices: children(client, "/machine/peripheral").await?,
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

/// `pc-q35-7.2-machine`, the class that an alias such as `q35` stood for when QEMU began, without its suffix.
async fn machine_type(client: &Client) -> Result<String, CommandError> {
    let class: String = client
        .execute_as("qom-get", json!({"path": "/machine", "property": "type"}))
        .await?;
    Ok(class.strip_suffix("-machine").unwrap_or(&class).to_owned())
}

/// The CPUID bits of a vCPU (`X86CPUFeatureWordInfo`); nothing where it is no x86 one.
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

async fn children(client: &Client, path: &str) -> Result<BTreeSet<String>, CommandError> {
    let all: Vec<Value> = client.execute_as("qom-list", json!({"path": path})).await?;
    let is_child = |one: &&Value| text(one, "type").starts_with("child<");
    Ok(all.iter().filter(is_child).map(|one| text(one, "name")).collect())
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

fn text(value: &Value, name: &str) -> String {
    value.get(name).and_then(Value::as_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drive_is_named_by_its_backend_or_its_device() {
        let named = drive(&json!({"device": "disk0", "qdev": "/x", "inserted": {"file": "/a.qcow2"}}));
        assert_eq!((named.name.as_str(), named.file.as_str()), ("disk0", "/a.qcow2"));
        let by_device = drive(&json!({"device": "", "qdev": "/machine/peripheral/d0/virtio-backend"}));
        assert_eq!(by_device.name, "/machine/peripheral/d0/virtio-backend");
        assert_eq!(by_device.file, "");
    }
}
