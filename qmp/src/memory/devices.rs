//! The addresses of memory devices: QMP `query-memory-devices`.
//!
//! Seen with QEMU 7.2.22 and 10.0.2; QEMU's `qapi/machine.json`, `MemoryDeviceInfo`. The guest's kernel may use the memory
//! of such a device for anything. But its RAM block may have no name (virtio-pmem), or a name with the device's path (virtio-mem), like video memory.

use guest_core::Gpa;
use serde::Deserialize;

/// The devices whose memory a guest's kernel can use as RAM. `sgx-epc` is not among them, because it cannot be read from outside.
const KINDS: [&str; 5] = ["dimm", "nvdimm", "virtio-pmem", "virtio-mem", "hv-balloon"];

/// The guest-physical range of a memory device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryDevice {
    /// Address of the first byte.
    pub gpa: Gpa,
    /// Length in bytes, with the unplugged part of a virtio-mem device.
    pub len: u64,
}

impl MemoryDevice {
    /// True if all of the `len` bytes at `gpa` belong to the device.
    pub fn holds(&self, gpa: Gpa, len: u64) -> bool {
        gpa.0
            .checked_sub(self.gpa.0)
            .is_some_and(|offset| offset.checked_add(len).is_some_and(|end| end <= self.len))
    }
}

/// An element of the answer.
#[derive(Debug, Deserialize)]
pub struct Answered {
    #[serde(rename = "type")]
    kind: String,
    data: Data,
}

/// A DIMM has `addr` and `size`; virtio devices have `memaddr`, and one that grows has `max-size`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Data {
    addr: Option<u64>,
    memaddr: Option<u64>,
    size: Option<u64>,
    max_size: Option<u64>,
}

/// The devices of an answer, without those of other kinds and those that are not in the guest's memory.
pub fn placed(answer: &[Answered]) -> Vec<MemoryDevice> {
    let known = answer.iter().filter(|device| KINDS.contains(&device.kind.as_str()));
    known
        .filter_map(|Answered { data, .. }| {
            Some(MemoryDevice {
                gpa: Gpa(data.memaddr.or(data.addr)?),
                len: data.max_size.or(data.size)?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// From a QEMU 10.0.2.
    #[test]
    fn dimms_and_virtio_devices_are_found_with_what_they_can_grow_to() {
        let answer = json!([
            {"type": "dimm", "data": {"memdev": "/objects/d0", "hotplugged": false, "addr": 0x1_0000_0000_u64,
             "hotpluggable": true, "size": 0x800_0000, "slot": 0, "node": 0, "id": "dimm0"}},
            {"type": "virtio-mem", "data": {"memdev": "/objects/vm0", "memaddr": 0x1_0c00_0000_u64, "block-size": 2097152,
             "size": 0, "node": 0, "max-size": 0x1000_0000, "requested-size": 0x400_0000, "id": "vmem0"}},
            {"type": "virtio-pmem", "data": {"memdev": "/objects/pm0", "memaddr": 0x1_1c00_0000_u64, "size": 0x400_0000,
             "id": "vpm0"}},
            {"type": "sgx-epc", "data": {"memaddr": 0x1_8000_0000_u64, "size": 0x1000, "node": 0, "memdev": "/objects/e"}},
        ]);
        let device = |gpa, len| MemoryDevice { gpa: Gpa(gpa), len };
        let expected = [
            device(0x1_0000_0000, 0x800_0000),
            device(0x1_0c00_0000, 0x1000_0000),
            device(0x1_1c00_0000, 0x400_0000),
        ];
        let answer: Vec<Answered> = serde_json::from_value(answer).unwrap();
        assert_eq!(placed(&answer), expected);
    }

    #[test]
    fn a_device_holds_what_is_wholly_inside() {
        let device = MemoryDevice {
            gpa: Gpa(0x1000),
            len: 0x1000,
        };
        assert!(device.holds(Gpa(0x1000), 0x1000) && device.holds(Gpa(0x1fff), 1));
        for (gpa, len) in [(0xfff, 1), (0x1000, 0x1001), (0x2000, 1), (0x1001, u64::MAX)] {
            assert!(!device.holds(Gpa(gpa), len), "{gpa:#x}");
        }
    }
}
