//! The guest's RAM as a whole.

use super::backing::{self, Backing, BackingError, Mapping};
use super::devices::{self, Answered, MemoryDevice};
use super::mtree::RamRange;
use super::ramblock::RamBlock;
use super::{gpa2hva, mtree, ramblock};
use crate::client::{Client, CommandError};
use crate::text::TextError;
use guest_core::{Gpa, Hva};
use serde_json::json;

/// How often the map is read if its parts do not fit together: a device may be plugged or unplugged between two questions.
const READ_TRIES: usize = 3;

/// A guest-physical range of RAM, and the memory that holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamRegion {
    /// Guest-physical address of the first byte.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Name of its memory region. It is also the name of the RAM block, except for some memory devices.
    pub block: String,
    /// Offset in that block, in bytes.
    pub block_offset: u64,
    /// Size of the host's pages that hold it, in bytes; `None` if the RAM block is not found by its name (virtio-mem, virtio-pmem). Such a block may have
    /// holes, as the unplugged part of virtio-mem.
    pub page_size: Option<u64>,
    /// Address of the first byte in the QEMU process.
    pub hva: Hva,
    /// The memory that holds it there.
    pub backing: Backing,
}

impl RamRegion {
    /// Where it is, for the guest.
    pub(crate) fn range(&self) -> RamRange {
        RamRange {
            gpa: self.gpa,
            len: self.len,
            name: self.block.clone(),
            offset: self.block_offset,
        }
    }
}

/// All RAM of a guest, ascending and not overlapping. It is valid until the guest's chipset is reconfigured or memory is plugged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamMap {
    /// The QEMU process.
    pub pid: i32,
    /// The ranges.
    pub regions: Vec<RamRegion>,
}

/// Why there is no map of the RAM.
#[derive(Debug, thiserror::Error)]
pub enum RamMapError {
    /// A question to QEMU has no answer.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// QEMU's answer is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The memory of the process does not agree with QEMU's answer.
    #[error("the RAM block {block} was not found in process {pid}")]
    Backing {
        /// The RAM block.
        block: String,
        /// The process.
        pid: i32,
        /// How it failed.
        #[source]
        cause: BackingError,
    },
    /// /proc of the process cannot be read.
    #[error("the memory of process {pid} cannot be looked at")]
    Process {
        /// The process.
        pid: i32,
        /// How it failed.
        #[source]
        cause: BackingError,
    },
    /// A range is outside of its RAM block.
    #[error("{len} bytes at {gpa} are said to lie at offset {offset:#x} of RAM block {block}, which has {used} bytes")]
    OutsideBlock {
        /// The range's first byte.
        gpa: Gpa,
        /// Bytes in the range.
        len: u64,
        /// The block.
        block: String,
        /// Offset of the range in the block.
        offset: u64,
        /// Bytes in the block.
        used: u64,
    },
    /// QEMU lists no range of RAM.
    #[error("QEMU names no range of guest RAM")]
    NoRam,
}

impl RamMap {
    /// Reads the map from QEMU and its process `pid`. Does not pause the guest.
    pub async fn read(client: &Client, pid: i32) -> Result<Self, RamMapError> {
        let mut tries = 1;
        loop {
            match Self::read_once(client, pid).await {
                Ok(map) => return Ok(map),
                Err(error @ RamMapError::Command(_)) => return Err(error),
                Err(error) if tries == READ_TRIES => return Err(error),
                Err(_) => tries += 1,
            }
        }
    }

    /// The blocks are read after the ranges, so that a range always has its block, even if memory is being plugged.
    async fn read_once(client: &Client, pid: i32) -> Result<Self, RamMapError> {
        let ranges = mtree::ram_ranges(&client.hmp("info mtree -f").await?)?;
        let (table, answer) = tokio::try_join!(
            client.execute_as::<qapi::qmp::HumanReadableText>("x-query-ramblock", json!({})),
            client.execute_as::<Vec<Answered>>("query-memory-devices", json!({})),
        )?;
        let blocks = ramblock::parse(&table.human_readable_text)?;
        let mut placed = Vec::new();
        for found in in_blocks(ranges, &blocks, &devices::placed(&answer))? {
            let hva = match found.hva {
                Some(hva) => hva,
                None => gpa2hva::parse(&client.hmp(&format!("gpa2hva {:#x}", found.range.gpa.0)).await?)?,
            };
            placed.push((hva, found));
        }
        let mappings = backing::mappings(pid).map_err(|cause| RamMapError::Process { pid, cause })?;
        let regions = placed
            .into_iter()
            .map(|(hva, found)| region(found, hva, pid, &mappings))
            .collect::<Result<_, _>>()?;
        Ok(Self { pid, regions })
    }
}

/// A range that is RAM of the guest.
struct Found {
    range: RamRange,
    /// Address of the first byte in the QEMU process, if it is known already.
    hva: Option<Hva>,
    page_size: Option<u64>,
}

/// The ranges in a RAM block of the same name, or in a memory device. This leaves out the memory of other devices: the name of their block has the
/// device's path, the name of their region does not.
fn in_blocks(ranges: Vec<RamRange>, blocks: &[RamBlock], devices: &[MemoryDevice]) -> Result<Vec<Found>, RamMapError> {
    let mut found = Vec::new();
    for range in ranges {
        let block = blocks.iter().find(|block| block.name == range.name);
        let (hva, page_size) = match block {
            Some(block) => (place_in(&range, block)?, Some(block.page_size)),
            None if devices.iter().any(|device| device.holds(range.gpa, range.len)) => (None, None),
            None => continue,
        };
        found.push(Found { range, hva, page_size });
    }
    if found.is_empty() {
        Err(RamMapError::NoRam)
    } else {
        Ok(found)
    }
}

/// The address in the QEMU process of a range of that block, if QEMU tells it.
fn place_in(range: &RamRange, block: &RamBlock) -> Result<Option<Hva>, RamMapError> {
    if range.offset.checked_add(range.len).is_none_or(|end| end > block.used) {
        return Err(outside(range, block));
    }
    let Some(hva) = block.hva else { return Ok(None) };
    let hva = hva.checked_add(range.offset).ok_or_else(|| outside(range, block))?;
    Ok(Some(hva))
}

fn outside(range: &RamRange, block: &RamBlock) -> RamMapError {
    let RamRange { gpa, len, offset, .. } = *range;
    RamMapError::OutsideBlock {
        gpa,
        len,
        block: block.name.clone(),
        offset,
        used: block.used,
    }
}

fn region(found: Found, hva: Hva, pid: i32, mappings: &[Mapping]) -> Result<RamRegion, RamMapError> {
    let RamRange {
        gpa,
        len,
        name: block,
        offset: block_offset,
    } = found.range;
    match backing::find(mappings, hva, len) {
        Ok(backing) => Ok(RamRegion {
            gpa,
            len,
            block,
            block_offset,
            page_size: found.page_size,
            hva,
            backing,
        }),
        Err(cause) => Err(RamMapError::Backing { block, pid, cause }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(gpa: u64, len: u64, name: &str, offset: u64) -> RamRange {
        RamRange {
            gpa: Gpa(gpa),
            len,
            name: name.into(),
            offset,
        }
    }

    fn block(name: &str, used: u64) -> RamBlock {
        RamBlock {
            name: name.into(),
            page_size: 4096,
            used,
            hva: None,
        }
    }

    #[test]
    fn device_memory_has_no_block_of_its_regions_name() {
        let ranges = vec![range(0, 0x1000, "pc.ram", 0), range(0xfd00_0000, 0x1000, "vga.vram", 0)];
        let blocks = [block("pc.ram", 0x1000), block("0000:00:02.0/vga.vram", 0x1000)];
        let found = in_blocks(ranges, &blocks, &[]).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].range.name, "pc.ram");
    }

    #[test]
    fn memory_of_a_memory_device_is_ram_whatever_its_block_is_called() {
        let ranges = vec![
            range(0, 0x1000, "pc.ram", 0),
            range(0xfd00_0000, 0x1000, "vga.vram", 0),
            range(0x1_0000_0000, 0x1000, "vm0", 0x3000),
        ];
        let blocks = [block("pc.ram", 0x1000), block("0000:00:01.0/vm0", 0x10_0000)];
        let device = MemoryDevice {
            gpa: Gpa(0xffff_d000),
            len: 0x10_0000,
        };
        let found = in_blocks(ranges, &blocks, &[device]).unwrap();
        let seen: Vec<_> = found
            .iter()
            .map(|found| (found.range.name.as_str(), found.page_size))
            .collect();
        assert_eq!(seen, [("pc.ram", Some(4096)), ("vm0", None)]);
    }

    #[test]
    fn a_range_outside_its_block_and_no_ram_at_all_are_refused() {
        let blocks = [block("a", 0x1000)];
        for offset in [0x1, u64::MAX] {
            let found = in_blocks(vec![range(0, 0x1000, "a", offset)], &blocks, &[]);
            assert!(matches!(found, Err(RamMapError::OutsideBlock { .. })));
        }
        assert!(matches!(
            in_blocks(vec![range(0, 1, "a", 0)], &[], &[]),
            Err(RamMapError::NoRam)
        ));
    }
}
