//! Adapts guest RAM to the trait of the patch core. Blocks in a shared file are mapped where that is possible; all others are read and
//! written through the process that runs the guest.

use guest_core::{Gpa, Hva, MemoryError, PhysMemory};
use process::{Memory, Span};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Why guest RAM can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host forbids reading the process's memory. RAM that can't be mapped is read there.
    #[error("reading block {block} of guest RAM in QEMU process {pid}")]
    Process {
        /// The process.
        pid: i32,
        /// The RAM block.
        block: String,
        /// Why.
        source: io::Error,
    },
}

/// A range of guest RAM, and what holds it.
#[derive(Debug, Clone)]
pub struct RamRegion {
    /// Its first byte, guest-physical.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
    /// Its first byte in the process.
    pub hva: Hva,
    /// What it is part of: regions of one name are in one file.
    pub block: String,
    /// The file that holds it, where what is written there is what the guest sees. None where parts of it may be missing: touching a page
    /// without backing would kill this process (SIGBUS).
    pub file: Option<RamFile>,
}

/// A range of guest RAM in the process that runs the guest, as another process can be told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionInProcess {
    /// Its first byte, guest-physical.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// Its first byte in the process.
    pub hva: u64,
}

impl From<RegionInProcess> for RamRegion {
    fn from(region: RegionInProcess) -> Self {
        Self {
            gpa: Gpa(region.gpa),
            len: region.len,
            hva: Hva(region.hva),
            block: String::new(),
            file: None,
        }
    }
}

/// A place in a file that the process maps shared.
#[derive(Debug, Clone)]
pub struct RamFile {
    /// The file, opened for reading and writing.
    pub file: Arc<File>,
    /// Where in it the region begins, in bytes.
    pub offset: u64,
    /// Bytes of the host's pages that hold it.
    pub page_size: u64,
}

/// Opens the RAM of a guest that the process `pid` runs. The regions are in ascending order, and do not overlap.
///
/// # Errors
///
/// The host forbids it.
pub fn open(pid: i32, regions: &[RamRegion]) -> Result<GuestRam, RamError> {
    GuestRam::open(pid, regions)
}

/// Fewest bytes that are read from the file of mapped memory: a system call then costs less than to map the page, which most such reads
/// are the first and the last to need.
const FILE_READ_BYTES_MIN: usize = 256;

/// All RAM of a guest.
pub struct GuestRam {
    /// The process that runs the guest, whose memory is read and written by system calls.
    process: Memory,
    /// Ascending, not overlapping.
    regions: Vec<Region>,
    ranges: Vec<Range<Gpa>>,
}

/// A contiguous range of guest RAM, of one block.
struct Region {
    gpa: u64,
    len: u64,
    /// Its first byte in the process.
    hva: u64,
    mapped: Option<Mapped>,
}

impl GuestRam {
    fn open(pid: i32, found: &[RamRegion]) -> Result<Self, RamError> {
        let blocks = map_blocks(found);
        let mapped = |region: &RamRegion| {
            let file = region.file.as_ref()?;
            let (start, block) = blocks.get(region.block.as_str())?;
            Some(Mapped {
                block: block.clone(),
                offset: file.offset.checked_sub(*start)?,
            })
        };
        let regions = found.iter().map(|region| Region {
            gpa: region.gpa.0,
            len: region.len,
            hva: region.hva.0,
            mapped: mapped(region),
        });
        let ram = Self {
            process: Memory::of(pid),
            regions: regions.collect(),
            ranges: found
                .iter()
                .map(|region| region.gpa..Gpa(region.gpa.0.saturating_add(region.len)))
                .collect(),
        };
        ram.try_process(pid, found)?;
        Ok(ram)
    }

    /// Reads one byte of each block that is not mapped, to tell "the host forbids it" from "the guest is not understood".
    fn try_process(&self, pid: i32, found: &[RamRegion]) -> Result<(), RamError> {
        let mut last = "";
        for (region, found) in self.regions.iter().zip(found) {
            if region.mapped.is_none() && found.block != last {
                last = &found.block;
                self.process
                    .read(region.hva, &mut [0])
                    .map_err(|errno| RamError::Process {
                        pid,
                        block: found.block.clone(),
                        source: errno.into(),
                    })?;
            }
        }
        Ok(())
    }

    /// Writes in this order through the process, with as few system calls as there can be: should this one be killed meanwhile, the first
    /// writes are made, and none in part.
    pub(super) fn write_through_process(&self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MemoryError> {
        let mut pieces = Vec::with_capacity(writes.len());
        for (at, bytes) in writes {
            self.pieces(*at, bytes.len(), |region, offset, piece| {
                pieces.push((region.hva.wrapping_add(offset), bytes.get(piece).unwrap_or_default()));
                Ok(())
            })?;
        }
        for some in pieces.chunks(Memory::SPANS_MAX) {
            let (at, len) = (
                writes.first().map_or(Gpa(0), |(at, _)| *at),
                some.iter().map(|(_, bytes)| bytes.len()).sum(),
            );
            let result = said(self.process.write_all(some));
            result.map_err(|cause| MemoryError::Host { at, len, cause })?;
        }
        Ok(())
    }

    /// The regions as another process can open them: through the process that runs the guest.
    pub(super) fn regions(&self) -> Vec<RegionInProcess> {
        let regions = self.regions.iter().map(|region| RegionInProcess {
            gpa: region.gpa,
            len: region.len,
            hva: region.hva,
        });
        regions.collect()
    }

    /// Splits `len` bytes at `at` by region and calls `act` for each part, with the region, the offset in it, and the part's range
    /// within the `len` bytes. Does nothing unless all bytes are RAM.
    fn pieces(
        &self,
        at: Gpa,
        len: usize,
        mut act: impl FnMut(&Region, u64, Range<usize>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let outside = || MemoryError::NotRam { at, len };
        let mut covered = 0;
        while covered < len {
            covered += self.piece(at, covered, len).ok_or_else(outside)?.2.len();
        }
        let mut done = 0;
        while done < len {
            let (region, offset, piece) = self.piece(at, done, len).ok_or_else(outside)?;
            done = piece.end;
            act(region, offset, piece)?;
        }
        Ok(())
    }

    /// The part that begins at byte `from` of the `len` bytes at `at`.
    fn piece(&self, at: Gpa, from: usize, len: usize) -> Option<(&Region, u64, Range<usize>)> {
        let at = at.0.checked_add(u64::try_from(from).ok()?)?;
        let after = self.regions.partition_point(|region| region.gpa <= at);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = at - region.gpa;
        let left = region.len.checked_sub(offset).filter(|left| *left > 0)?;
        let end = from
            .saturating_add(usize::try_from(left).unwrap_or(usize::MAX))
            .min(len);
        Some((region, offset, from..end))
    }
}

impl Region {
    fn read(&self, process: Memory, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        match &self.mapped {
            Some(mapped) => mapped.read(offset, buf),
            None => said(process.read(self.hva.wrapping_add(offset), buf)),
        }
    }

    fn write(&self, process: Memory, offset: u64, bytes: &[u8]) -> Result<(), String> {
        match &self.mapped {
            Some(mapped) => mapped.write(offset, bytes),
            None => said(process.write(self.hva.wrapping_add(offset), bytes)),
        }
    }
}

fn said(result: nix::Result<()>) -> Result<(), String> {
    result.map_err(|errno| errno.desc().to_owned())
}

impl PhysMemory for GuestRam {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        // Nearly all reads are of one region.
        if let Some((region, offset, piece)) = self.piece(at, 0, buf.len())
            && piece.len() == buf.len()
        {
            let (len, result) = (buf.len(), region.read(self.process, offset, buf));
            return result.map_err(|cause| MemoryError::Host { at, len, cause });
        }
        self.pieces(at, buf.len(), |region, offset, piece| {
            let len = piece.len();
            let buf = buf.get_mut(piece).unwrap_or_default();
            let result = region.read(self.process, offset, buf);
            result.map_err(|cause| MemoryError::Host { at, len, cause })
        })
    }

    /// Reads memory that is not mapped with few system calls: one call takes about as long for many buffers as for one.
    fn read_ranges(&self, ranges: &[(Gpa, usize)], buf: &mut [u8]) -> Result<(), MemoryError> {
        let (mut far, mut start) = (Vec::new(), 0);
        for (at, len) in ranges {
            self.pieces(*at, *len, |region, offset, piece| {
                let here = start + piece.start..start + piece.end;
                match &region.mapped {
                    None => far.push((region.hva.wrapping_add(offset), here)),
                    Some(mapped) => {
                        let (len, buf) = (piece.len(), buf.get_mut(here).unwrap_or_default());
                        let result = mapped.read(offset, buf);
                        result.map_err(|cause| MemoryError::Host { at: *at, len, cause })?;
                    }
                }
                Ok(())
            })?;
            start += len;
        }
        for some in far.chunks(Memory::SPANS_MAX) {
            let mut bytes = vec![0; some.iter().map(|(_, here)| here.len()).sum()];
            let (at, len) = (ranges.first().map_or(Gpa(0), |(at, _)| *at), bytes.len());
            let spans = some.iter().map(|(hva, here)| Span {
                at: *hva,
                len: here.len(),
            });
            let result = said(self.process.read_all(spans, &mut bytes));
            result.map_err(|cause| MemoryError::Host { at, len, cause })?;
            let mut rest = bytes.as_slice();
            for (_, here) in some {
                let (now, later) = rest.split_at(here.len());
                buf.get_mut(here.clone()).unwrap_or_default().copy_from_slice(now);
                rest = later;
            }
        }
        Ok(())
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        self.pieces(at, bytes.len(), |region, offset, piece| {
            let len = piece.len();
            let bytes = bytes.get(piece).unwrap_or_default();
            let result = region.write(self.process, offset, bytes);
            result.map_err(|cause| MemoryError::Host { at, len, cause })
        })
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &self.ranges
    }
}

/// Where a region lies in a mapping of this process.
struct Mapped {
    block: Arc<MmapRegion>,
    offset: u64,
}

impl Mapped {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let slice = self.slice(offset, buf.len())?;
        if buf.len() >= FILE_READ_BYTES_MIN && self.read_file(offset, buf).is_some() {
            return Ok(());
        }
        slice.read_slice(buf, 0).map_err(|error| error.to_string())
    }

    /// Reads from the block's file, without a page fault and without a page more in this process. None where the file can't be read.
    fn read_file(&self, offset: u64, buf: &mut [u8]) -> Option<()> {
        let file = self.block.file_offset()?;
        let start = file.start().checked_add(self.offset)?.checked_add(offset)?;
        file.file().read_exact_at(buf, start).ok()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), String> {
        let result = self.slice(offset, bytes.len())?.write_slice(bytes, 0);
        result.map_err(|error| error.to_string())
    }

    fn slice(&self, offset: u64, len: usize) -> Result<VolatileSlice<'_>, String> {
        let start = self.offset.saturating_add(offset);
        let start = usize::try_from(start).map_err(|error| error.to_string())?;
        let slice = self.block.get_slice(start, len);
        slice.map_err(|error| error.to_string())
    }
}

/// The blocks that can be mapped, by name, each with the offset in its file where the mapping begins.
fn map_blocks(regions: &[RamRegion]) -> BTreeMap<&str, (u64, Arc<MmapRegion>)> {
    let mut spans: BTreeMap<&str, (&File, Range<u64>)> = BTreeMap::new();
    for region in regions {
        let Some(file) = &region.file else { continue };
        let Some(span) = whole_pages(file.offset, region.len, file.page_size) else {
            continue;
        };
        let (_, joined) = spans.entry(&region.block).or_insert((&file.file, span.clone()));
        *joined = joined.start.min(span.start)..joined.end.max(span.end);
    }
    spans
        .into_iter()
        .filter_map(|(block, (file, span))| Some((block, (span.start, Arc::new(map_file(file, span)?)))))
        .collect()
}

/// What to map for `len` bytes at `offset` of a file: a mapping begins and ends at multiples of the pages that hold it (mm/hugetlb.c
/// and mmap(2)), but the chipset divides RAM at any multiple of 4 KiB.
fn whole_pages(offset: u64, len: u64, page_size: u64) -> Option<Range<u64>> {
    let end = offset.checked_add(len)?.checked_next_multiple_of(page_size)?;
    Some(offset - offset.checked_rem(page_size)?..end)
}

/// None if the file can't be mapped up to there: it is shorter, or the host refuses.
fn map_file(file: &File, span: Range<u64>) -> Option<MmapRegion> {
    if file.metadata().ok()?.len() < span.end {
        return None;
    }
    let len = usize::try_from(span.end - span.start).ok()?;
    MmapRegion::from_file(FileOffset::new(file.try_clone().ok()?, span.start), len).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two regions that follow one another, one mapped and one of this process as a QEMU's would be, and a third behind a hole.
    fn mixed(own: &mut [u8; 0x1000]) -> GuestRam {
        let block = Arc::new(MmapRegion::new(0x2000).unwrap());
        let hva = own.as_mut_ptr() as u64;
        let region = |gpa, mapped, hva| Region {
            gpa,
            len: 0x1000,
            hva,
            mapped,
        };
        let mapped = |offset| {
            let block = block.clone();
            Some(Mapped { block, offset })
        };
        GuestRam {
            process: Memory::of(std::process::id().cast_signed()),
            regions: vec![
                region(0x1000, mapped(0x1000), 0),
                region(0x2000, None, hva),
                region(0x8000, mapped(0), 0),
            ],
            ranges: Vec::new(),
        }
    }

    #[test]
    fn each_region_is_reached_by_its_own_kind_also_across_their_border() {
        let mut own = [0; 0x1000];
        let ram = mixed(&mut own);
        let bytes: Vec<u8> = (1..=64).collect();
        ram.write(Gpa(0x1fe0), &bytes).unwrap();
        let mut read = [0; 64];
        ram.read(Gpa(0x1fe0), &mut read).unwrap();
        assert_eq!(read[..], bytes);
        ram.read(Gpa(0x2000), &mut read[..32]).unwrap();
        assert_eq!(read[..32], bytes[32..]);
        assert_eq!(own[..32], bytes[32..]);
    }

    #[test]
    fn many_pieces_of_each_kind_are_read_in_their_order() {
        let mut own = [0; 0x1000];
        let ram = mixed(&mut own);
        let bytes: Vec<u8> = (1..=64).collect();
        ram.write(Gpa(0x1fe0), &bytes).unwrap();
        let mut read = [0; 12];
        ram.read_ranges(
            &[(Gpa(0x2008), 4), (Gpa(0x1fe0), 2), (Gpa(0x1ffe), 5), (Gpa(0x2000), 1)],
            &mut read,
        )
        .unwrap();
        assert_eq!(read, [41, 42, 43, 44, 1, 2, 31, 32, 33, 34, 35, 33]);
        let many = vec![(Gpa(0x2000), 1); 2 * Memory::SPANS_MAX + 1];
        let mut read = vec![0; many.len()];
        ram.read_ranges(&many, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 33));
        let outside = ram.read_ranges(&[(Gpa(0x2000), 1), (Gpa(0x3000), 1)], &mut read);
        assert!(matches!(
            outside,
            Err(MemoryError::NotRam {
                at: Gpa(0x3000),
                len: 1
            })
        ));
    }

    #[test]
    fn what_is_not_all_ram_is_neither_read_nor_written() {
        let mut own = [0; 0x1000];
        let ram = mixed(&mut own);
        for (at, len) in [(0xfff, 2), (0x2fff, 2), (0x3000, 1), (0x1000, 0x2001), (u64::MAX, 2)] {
            let expected = Err(MemoryError::NotRam { at: Gpa(at), len });
            assert_eq!(ram.read(Gpa(at), &mut vec![0; len]), expected, "{at:#x}");
            assert_eq!(ram.write(Gpa(at), &vec![1; len]), expected, "{at:#x}");
        }
        let mut all = [7; 0x2000];
        ram.read(Gpa(0x1000), &mut all).unwrap();
        assert_eq!(all, [0; 0x2000]);
    }

    #[test]
    fn a_page_that_the_process_does_not_have_is_an_error() {
        let mut own = [0; 0x1000];
        let mut ram = mixed(&mut own);
        ram.regions[1].hva = 0x1000;
        let error = ram.read(Gpa(0x2000), &mut [0]).unwrap_err();
        assert_eq!(error.to_string(), "cannot reach 1 bytes at GPA 0x2000: Bad address");
    }

    #[test]
    fn long_reads_of_the_file_and_short_ones_of_the_mapping_give_the_same() {
        let path = std::env::temp_dir().join(format!("vmpatch-ram-{}", std::process::id()));
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        file.set_len(0x4000).unwrap();
        let block = Arc::new(map_file(&file, 0x1000..0x4000).unwrap());
        let mapped = Mapped { block, offset: 0x1000 };
        let bytes: Vec<u8> = (0..FILE_READ_BYTES_MIN).map(|at| (at % 251) as u8).collect();
        mapped.write(8, &bytes).unwrap();
        let (mut long, mut short) = (bytes.clone(), [0; 16]);
        long.fill(0);
        mapped.read(8, &mut long).unwrap();
        mapped.read(8, &mut short).unwrap();
        assert!(long == bytes && short[..] == bytes[..16]);
        file.write_all_at(&[0xee; 0x1000], 0x2008).unwrap();
        mapped.read(8, &mut long).unwrap();
        mapped.read(8, &mut short).unwrap();
        assert!(long.iter().chain(&short).all(|byte| *byte == 0xee));
        // Behind the block's end there may be more of the file, or nothing.
        mapped.read(0x1f00, &mut long).unwrap();
        mapped.read(0x1f01, &mut long).unwrap_err();
    }

    #[test]
    fn what_is_mapped_begins_and_ends_at_whole_pages() {
        let huge = 2 << 20;
        for (offset, len, page_size, expected) in [
            (0, 0xc_0000, 4096, 0..0xc_0000),
            (0, 0xc_0000, huge, 0..huge),
            (0x10_0000, 63 << 20, huge, 0..64 << 20),
            (0x8000_0000, 1, 1 << 30, 0x8000_0000..0xc000_0000),
        ] {
            assert_eq!(whole_pages(offset, len, page_size), Some(expected), "{offset:#x}");
        }
        for (offset, len, page_size) in [(u64::MAX, 1, 4096), (u64::MAX - 1, 1, 4096), (0, 1, 0)] {
            assert_eq!(whole_pages(offset, len, page_size), None, "{offset:#x}");
        }
    }
}
