//! The guest's RAM as a whole.

use super::backing::{self, Backing, BackingError, Mapping};
use super::mtree::RamRange;
use super::ramblock::RamBlock;
use super::{gpa2hva, mtree, ramblock};
use crate::addr::{Gpa, Hva};
use crate::client::{Client, CommandError};
use crate::text::TextError;
use serde_json::json;

/// A guest-physical range of RAM and what holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamRegion {
    /// Its first byte, guest-physical.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
    /// The RAM block that it is part of.
    pub block: String,
    /// Where in that block it begins, in bytes.
    pub block_offset: u64,
    /// Its first byte in the QEMU process.
    pub hva: Hva,
    /// What holds it there.
    pub backing: Backing,
}

/// All RAM of a guest: ascending, not overlapping. True until the guest's chipset is set up anew, or memory is plugged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamMap {
    /// The QEMU process.
    pub pid: i32,
    /// The ranges.
    pub regions: Vec<RamRegion>,
}

/// Why the RAM map could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RamMapError {
    /// QEMU did not answer a question.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// QEMU's answer is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The memory of the process is not as QEMU says.
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
    /// /proc of the process could not be read.
    #[error("the memory of process {pid} cannot be looked at")]
    Process {
        /// The process.
        pid: i32,
        /// How it failed.
        #[source]
        cause: BackingError,
    },
    /// A range lies outside its RAM block.
    #[error("{len} bytes at {gpa} are said to lie at offset {offset:#x} of RAM block {block}, which has {used} bytes")]
    OutsideBlock {
        /// The range's first byte.
        gpa: Gpa,
        /// Bytes in the range.
        len: u64,
        /// The block.
        block: String,
        /// Where the range would begin in it.
        offset: u64,
        /// Bytes in the block.
        used: u64,
    },
    /// No range at all.
    #[error("QEMU names no range of guest RAM")]
    NoRam,
}

impl RamMap {
    /// Asks QEMU, and looks at its process `pid`. Does not pause the guest.
    pub async fn read(client: &Client, pid: i32) -> Result<Self, RamMapError> {
        let table: qapi::qmp::HumanReadableText = client.execute_as("x-query-ramblock", json!({})).await?;
        let blocks = ramblock::parse(&table.human_readable_text)?;
        let ranges = mtree::ram_ranges(&client.hmp("info mtree -f").await?)?;
        let mut placed = Vec::new();
        for (range, block) in in_blocks(ranges, &blocks)? {
            let hva = match block.hva {
                Some(hva) => hva.checked_add(range.offset),
                None => Some(gpa2hva::parse(
                    &client.hmp(&format!("gpa2hva {:#x}", range.gpa.0)).await?,
                )?),
            };
            placed.push((hva.ok_or_else(|| outside(&range, block))?, range));
        }
        let mappings = backing::mappings(pid).map_err(|cause| RamMapError::Process { pid, cause })?;
        let regions = placed
            .into_iter()
            .map(|(hva, range)| region(range, hva, pid, &mappings))
            .collect::<Result<_, _>>()?;
        Ok(Self { pid, regions })
    }

    /// The region that holds all of the `len` bytes at `gpa`.
    pub fn region_of(&self, gpa: Gpa, len: u64) -> Option<&RamRegion> {
        let end = gpa.0.checked_add(len)?;
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (end <= region.gpa.0.checked_add(region.len)?).then_some(region)
    }
}

/// The ranges that lie in a RAM block of the same name. Memory of devices is told apart so: its block is named after
/// the device too, its region is not.
fn in_blocks(ranges: Vec<RamRange>, blocks: &[RamBlock]) -> Result<Vec<(RamRange, &RamBlock)>, RamMapError> {
    let mut found = Vec::new();
    for range in ranges {
        let Some(block) = blocks.iter().find(|block| block.name == range.name) else {
            continue;
        };
        if range.offset.checked_add(range.len).is_none_or(|end| end > block.used) {
            return Err(outside(&range, block));
        }
        found.push((range, block));
    }
    if found.is_empty() {
        Err(RamMapError::NoRam)
    } else {
        Ok(found)
    }
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

fn region(range: RamRange, hva: Hva, pid: i32, mappings: &[Mapping]) -> Result<RamRegion, RamMapError> {
    let RamRange {
        gpa,
        len,
        name: block,
        offset: block_offset,
    } = range;
    match backing::find(mappings, hva, len) {
        Ok(backing) => Ok(RamRegion {
            gpa,
            len,
            block,
            block_offset,
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
            used,
            hva: None,
        }
    }

    #[test]
    fn device_memory_has_no_block_of_its_regions_name() {
        let ranges = vec![range(0, 0x1000, "pc.ram", 0), range(0xfd00_0000, 0x1000, "vga.vram", 0)];
        let blocks = [block("pc.ram", 0x1000), block("0000:00:02.0/vga.vram", 0x1000)];
        let found = in_blocks(ranges, &blocks).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0.name, "pc.ram");
    }

    #[test]
    fn a_range_outside_its_block_and_no_ram_at_all_are_refused() {
        let blocks = [block("a", 0x1000)];
        for offset in [0x1, u64::MAX] {
            let found = in_blocks(vec![range(0, 0x1000, "a", offset)], &blocks);
            assert!(matches!(found, Err(RamMapError::OutsideBlock { .. })));
        }
        assert!(matches!(
            in_blocks(vec![range(0, 1, "a", 0)], &[]),
            Err(RamMapError::NoRam)
        ));
    }

    #[test]
    fn a_region_is_found_only_for_bytes_wholly_inside() {
        let region = |gpa, len| RamRegion {
            gpa: Gpa(gpa),
            len,
            block: "a".into(),
            block_offset: gpa,
            hva: Hva(gpa),
            backing: Backing::Private,
        };
        let map = RamMap {
            pid: 1,
            regions: vec![region(0x1000, 0x1000), region(0x3000, 0x1000)],
        };
        assert_eq!(map.region_of(Gpa(0x1000), 0x1000).unwrap().gpa, Gpa(0x1000));
        assert_eq!(map.region_of(Gpa(0x3fff), 1).unwrap().gpa, Gpa(0x3000));
        for (gpa, len) in [(0xfff, 1), (0x1000, 0x1001), (0x2000, 1), (0x4000, 1), (u64::MAX, 2)] {
            assert!(map.region_of(Gpa(gpa), len).is_none(), "{gpa:#x}");
        }
    }
}
