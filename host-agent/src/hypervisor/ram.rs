//! Adapts guest RAM to the trait of the patch core. Blocks in a shared file are mapped where that is possible; all others are read and
//! written through the process that runs the guest.

use guest_core::{Gpa, Hva, MemoryError, PhysMemory};
use process::{Memory, Span};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Why guest RAM can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host forbids reading the process's memory. RAM that can't be mapped is read there.
    #[error("reading block {block} of guest RAM in process {pid}")]
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

/// How many bytes may lie between two ranges that are read from the process's file as one: less than a system call costs.
const FILE_GAP_BYTES_MAX: u64 = 4096;
/// Most bytes of one such read.
const FILE_READ_BYTES_MAX: u64 = 256 << 10;

/// All RAM of a guest.
pub struct GuestRam {
    /// The process that runs the guest, whose memory is read and written by system calls.
    process: ProcessMemory,
    /// Ascending, not overlapping.
    regions: Vec<Region>,
    ranges: Vec<Range<Gpa>>,
}

/// A process's memory.
#[derive(Debug, Clone)]
enum ProcessMemory {
    /// By calls that name the process. The host looks at this process's rights at each of them.
    Calls(Memory),
    /// By `/proc/PID/mem`, opened for reading alone. The host looked at this process's rights when that was opened (`proc_mem_open()`,
    /// fs/proc/base.c, Linux 6.12).
    File(Arc<File>),
}

impl ProcessMemory {
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Calls(memory) => said(memory.read(at, buf)),
            Self::File(file) => file.read_exact_at(buf, at).map_err(|error| error.to_string()),
        }
    }

    fn write_all(&self, writes: &[(u64, &[u8])]) -> Result<(), String> {
        match self {
            Self::Calls(memory) => said(memory.write_all(writes)),
            Self::File(_) => Err("it was opened for reading".to_owned()),
        }
    }

    /// Reads consecutive parts of the buffer, with few system calls.
    fn read_all(&self, spans: &[Span], buf: &mut [u8]) -> Result<(), String> {
        match self {
            Self::Calls(memory) => said(memory.read_all(spans.iter().copied(), buf)),
            Self::File(_) => self.read_near(spans, buf),
        }
    }

    /// Reads ranges that follow closely as one, with what lies in between.
    fn read_near(&self, spans: &[Span], mut buf: &mut [u8]) -> Result<(), String> {
        let mut rest = spans;
        let mut bytes = Vec::new();
        while let Some(first) = rest.first() {
            let (mut count, len) = near(rest);
            bytes.resize(len, 0);
            let mut read = self.read(first.at, &mut bytes);
            if read.is_err() && count > 1 {
                // What lies in between may be missing.
                count = 1;
                bytes.truncate(first.len);
                read = self.read(first.at, &mut bytes);
            }
            read?;
            let (now, later) = rest.split_at(count);
            for span in now {
                let from = usize::try_from(span.at.wrapping_sub(first.at)).map_err(|error| error.to_string())?;
                let part = from.checked_add(span.len).and_then(|end| bytes.get(from..end));
                let (to, behind) = buf.split_at_mut(span.len.min(buf.len()));
                match part {
                    Some(part) if part.len() == to.len() => to.copy_from_slice(part),
                    _ => return Err("more was asked for than there is room for".to_owned()),
                }
                buf = behind;
            }
            rest = later;
        }
        Ok(())
    }
}

/// How many of the ranges, at least one, are read as one, and how many bytes that is.
fn near(spans: &[Span]) -> (usize, usize) {
    let Some(first) = spans.first() else { return (0, 0) };
    let end_of = |span: &Span| span.at.checked_add(u64::try_from(span.len).ok()?);
    let (mut count, mut end) = (1, end_of(first).unwrap_or(first.at));
    for span in spans.iter().skip(1) {
        let Some(next) = end_of(span) else { break };
        let is_near = span.at >= end && span.at - end <= FILE_GAP_BYTES_MAX;
        if !is_near || next - first.at > FILE_READ_BYTES_MAX {
            break;
        }
        (count, end) = (count + 1, next);
    }
    let len = usize::try_from(end.saturating_sub(first.at)).unwrap_or(usize::MAX);
    (count, len.max(first.len))
}

/// A contiguous range of guest RAM, of one block.
#[derive(Clone)]
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
            process: ProcessMemory::Calls(Memory::of(pid)),
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
        let (process, mut last) = (Memory::of(pid), "");
        for (region, found) in self.regions.iter().zip(found) {
            if region.mapped.is_none() && found.block != last {
                last = &found.block;
                process.read(region.hva, &mut [0]).map_err(|errno| RamError::Process {
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
            let result = self.process.write_all(some);
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

    /// The same RAM for a process that may open nothing and name no other process: what is not mapped is read from a file that is opened
    /// now, and can't be written.
    pub(crate) fn without_rights(&self, pid: i32) -> io::Result<Self> {
        let process = match self.regions.iter().all(|region| region.mapped.is_some()) {
            true => self.process.clone(),
            false => ProcessMemory::File(Arc::new(File::open(format!("/proc/{pid}/mem"))?)),
        };
        Ok(Self {
            process,
            regions: self.regions.clone(),
            ranges: self.ranges.clone(),
        })
    }

    /// The files that it reads.
    pub(crate) fn files(&self) -> Vec<RawFd> {
        let mapped = self.regions.iter().filter_map(|region| region.mapped.as_ref());
        let mut files: Vec<_> = mapped
            .filter_map(|mapped| Some(mapped.block.file_offset()?.file().as_raw_fd()))
            .collect();
        if let ProcessMemory::File(file) = &self.process {
            files.push(file.as_raw_fd());
        }
        files
    }

    /// Whether all of these bytes are mapped here, and so written without a system call.
    pub(crate) fn is_mapped(&self, at: Gpa, len: usize) -> bool {
        let mut is_mapped = true;
        let split = self.pieces(at, len, |region, _, _| {
            is_mapped &= region.mapped.is_some();
            Ok(())
        });
        split.is_ok() && is_mapped
    }

    /// The regions as they were found, without their blocks.
    pub(super) fn found(&self) -> Vec<RamRegion> {
        self.regions().into_iter().map(Into::into).collect()
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
    fn read(&self, process: &ProcessMemory, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        match &self.mapped {
            Some(mapped) => mapped.read(offset, buf),
            None => process.read(self.hva.wrapping_add(offset), buf),
        }
    }

    fn write(&self, process: &ProcessMemory, offset: u64, bytes: &[u8]) -> Result<(), String> {
        match &self.mapped {
            Some(mapped) => mapped.write(offset, bytes),
            None => process.write_all(&[(self.hva.wrapping_add(offset), bytes)]),
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
            let (len, result) = (buf.len(), region.read(&self.process, offset, buf));
            return result.map_err(|cause| MemoryError::Host { at, len, cause });
        }
        self.pieces(at, buf.len(), |region, offset, piece| {
            let len = piece.len();
            let buf = buf.get_mut(piece).unwrap_or_default();
            let result = region.read(&self.process, offset, buf);
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
            let spans: Vec<_> = some
                .iter()
                .map(|(hva, here)| Span {
                    at: *hva,
                    len: here.len(),
                })
                .collect();
            let result = self.process.read_all(&spans, &mut bytes);
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
            let result = region.write(&self.process, offset, bytes);
            result.map_err(|cause| MemoryError::Host { at, len, cause })
        })
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &self.ranges
    }
}

/// Where a region lies in a mapping of this process.
#[derive(Clone)]
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
            process: ProcessMemory::Calls(Memory::of(std::process::id().cast_signed())),
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
    fn without_rights_the_same_is_read_and_only_what_is_mapped_is_written() {
        let mut own = [0; 0x1000];
        let ram = mixed(&mut own);
        let bytes: Vec<u8> = (1..=64).collect();
        ram.write(Gpa(0x1fe0), &bytes).unwrap();
        let ram = ram.without_rights(std::process::id().cast_signed()).unwrap();
        let mut read = [0; 9];
        let ranges = [
            (Gpa(0x2008), 4),
            (Gpa(0x1fe0), 2),
            (Gpa(0x2010), 1),
            (Gpa(0x2012), 1),
            (Gpa(0x2010), 1),
        ];
        ram.read_ranges(&ranges, &mut read).unwrap();
        assert_eq!(read, [41, 42, 43, 44, 1, 2, 49, 51, 49]);
        assert!(ram.is_mapped(Gpa(0x1fe0), 0x20) && !ram.is_mapped(Gpa(0x1fe0), 0x21));
        ram.write(Gpa(0x1fe0), &[7]).unwrap();
        assert!(ram.write(Gpa(0x2000), &[7]).is_err());
        assert_eq!(own[0], 33);
    }

    #[test]
    fn ranges_that_follow_closely_are_read_as_one() {
        let spans = |places: &[(u64, usize)]| {
            places
                .iter()
                .map(|(at, len)| Span { at: *at, len: *len })
                .collect::<Vec<_>>()
        };
        for (places, expected) in [
            (&[(0x1000, 8)][..], (1, 8)),
            (&[(0x1000, 8), (0x1008, 8), (0x2010, 8), (0x4000, 8)], (3, 0x1018)),
            (&[(0x1000, 8), (0xff8, 8)], (1, 8)),
            (&[(0x1000, 8), (0x1004, 8)], (1, 8)),
            (&[(0x1000, 1 << 20), (0x1000 + (1 << 20), 8)], (1, 1 << 20)),
            (&[(u64::MAX - 7, 8)], (1, 8)),
        ] {
            assert_eq!(near(&spans(places)), expected, "{places:x?}");
        }
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
