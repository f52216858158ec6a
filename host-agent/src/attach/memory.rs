//! Guest RAM as the patch core wants it: each block by its own kind. What is shared is mapped, where it can be; all else is read
//! and written through the QEMU process.

use guest_core::{Gpa, MemoryError, PhysMemory};
use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use qmp::memory::backing::SharedFile;
use qmp::{Backing, RamMap, RamRegion};
use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::rc::Rc;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

/// Pieces that one system call takes: `UIO_MAXIOV` (include/uapi/linux/uio.h).
const PIECES_MAX: usize = 1024;

/// Why guest RAM can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The host refuses to read it in the process, which is where RAM is read that can't be mapped.
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

/// The RAM of a guest whose process is QEMU's.
pub fn open(map: &RamMap) -> Result<Box<dyn PhysMemory>, RamError> {
    Ok(Box::new(GuestRam::open(map)?))
}

/// All RAM of a guest.
struct GuestRam {
    process: Process,
    /// Ascending, not overlapping.
    regions: Vec<Region>,
    ranges: Vec<Range<Gpa>>,
}

/// A range of it that is held in one piece.
struct Region {
    gpa: u64,
    len: u64,
    /// Its first byte in the QEMU process.
    hva: u64,
    mapped: Option<Mapped>,
}

impl GuestRam {
    fn open(map: &RamMap) -> Result<Self, RamError> {
        let blocks = map_blocks(map);
        let mapped = |region: &RamRegion| {
            let Backing::Shared(file) = &region.backing else {
                return None;
            };
            let (start, block) = blocks.get(region.block.as_str())?;
            Some(Mapped {
                block: block.clone(),
                offset: file.offset.checked_sub(*start)?,
            })
        };
        let regions = map.regions.iter().map(|region| Region {
            gpa: region.gpa.0,
            len: region.len,
            hva: region.hva.0,
            mapped: mapped(region),
        });
        let ram = Self {
            process: Process(Pid::from_raw(map.pid)),
            regions: regions.collect(),
            ranges: map
                .regions
                .iter()
                .map(|region| Gpa(region.gpa.0)..Gpa(region.gpa.0.saturating_add(region.len)))
                .collect(),
        };
        ram.try_process(map)?;
        Ok(ram)
    }

    /// One byte of each block that is not mapped, so that what the host forbids is told apart from a guest that is not understood.
    fn try_process(&self, map: &RamMap) -> Result<(), RamError> {
        let mut last = "";
        for (region, found) in self.regions.iter().zip(&map.regions) {
            if region.mapped.is_none() && found.block != last {
                last = &found.block;
                self.process
                    .read(region.hva, &mut [0])
                    .map_err(|errno| RamError::Process {
                        pid: map.pid,
                        block: found.block.clone(),
                        source: errno.into(),
                    })?;
            }
        }
        Ok(())
    }

    /// Gives `act` each piece of `len` bytes at `at` that lies in one region: the region, the offset in it, and which of the bytes
    /// they are. Nothing is done where not all of them are RAM.
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

    /// The piece that begins at byte `from` of the `len` bytes at `at`.
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
    fn read(&self, process: Process, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        match &self.mapped {
            Some(mapped) => mapped.read(offset, buf),
            None => said(process.read(self.hva.wrapping_add(offset), buf)),
        }
    }

    fn write(&self, process: Process, offset: u64, bytes: &[u8]) -> Result<(), String> {
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
        self.pieces(at, buf.len(), |region, offset, piece| {
            let len = piece.len();
            let buf = buf.get_mut(piece).unwrap_or_default();
            let result = region.read(self.process, offset, buf);
            result.map_err(|cause| MemoryError::Host { at, len, cause })
        })
    }

    /// What is not mapped is read with few system calls: one takes about as long for many pieces as for one.
    fn read_pieces(&self, pieces: &[(Gpa, usize)], buf: &mut [u8]) -> Result<(), MemoryError> {
        let (mut far, mut start) = (Vec::new(), 0);
        for (at, len) in pieces {
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
        for some in far.chunks(PIECES_MAX) {
            let mut bytes = vec![0; some.iter().map(|(_, here)| here.len()).sum()];
            let (at, len) = (pieces.first().map_or(Gpa(0), |(at, _)| *at), bytes.len());
            let result = said(
                self.process
                    .read_all(some.iter().map(|(hva, here)| (*hva, here.len())), &mut bytes),
            );
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

/// The QEMU process, whose memory is reached by system calls. A page that is not there is an error, not a signal.
#[derive(Clone, Copy)]
struct Process(Pid);

impl Process {
    fn read(self, hva: u64, buf: &mut [u8]) -> nix::Result<()> {
        let remote = Self::remote(hva, buf.len())?;
        let len = buf.len();
        Self::all(process_vm_readv(self.0, &mut [IoSliceMut::new(buf)], &[remote])?, len)
    }

    /// Reads pieces, by address and length, one behind the other: [`PIECES_MAX`] at the most.
    fn read_all(self, pieces: impl Iterator<Item = (u64, usize)>, buf: &mut [u8]) -> nix::Result<()> {
        let remote = pieces.map(|(hva, len)| Self::remote(hva, len));
        let (remote, len) = (remote.collect::<nix::Result<Vec<_>>>()?, buf.len());
        Self::all(process_vm_readv(self.0, &mut [IoSliceMut::new(buf)], &remote)?, len)
    }

    fn write(self, hva: u64, bytes: &[u8]) -> nix::Result<()> {
        let remote = Self::remote(hva, bytes.len())?;
        Self::all(
            process_vm_writev(self.0, &[IoSlice::new(bytes)], &[remote])?,
            bytes.len(),
        )
    }

    fn remote(hva: u64, len: usize) -> nix::Result<RemoteIoVec> {
        let base = usize::try_from(hva).map_err(|_| Errno::EFAULT)?;
        Ok(RemoteIoVec { base, len })
    }

    /// A transfer ends early at the first page that is not there (`process_vm_readv(2)`).
    fn all(done: usize, len: usize) -> nix::Result<()> {
        if done == len { Ok(()) } else { Err(Errno::EFAULT) }
    }
}

/// Where a region lies in a mapping of this process.
struct Mapped {
    block: Rc<MmapRegion>,
    offset: u64,
}

impl Mapped {
    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), String> {
        let result = self.slice(offset, buf.len())?.read_slice(buf, 0);
        result.map_err(|error| error.to_string())
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

/// The blocks that can be mapped, by name, each with the offset in its file where the mapping begins. A block that may have holes
/// is not mapped: where nothing is behind a page, touching it would end this process.
fn map_blocks(map: &RamMap) -> BTreeMap<&str, (u64, Rc<MmapRegion>)> {
    let mut spans: BTreeMap<&str, (&SharedFile, Range<u64>)> = BTreeMap::new();
    for region in &map.regions {
        let (Backing::Shared(file), Some(page_size)) = (&region.backing, region.page_size) else {
            continue;
        };
        let Some(span) = whole_pages(file.offset, region.len, page_size) else {
            continue;
        };
        let (_, joined) = spans.entry(&region.block).or_insert((file, span.clone()));
        *joined = joined.start.min(span.start)..joined.end.max(span.end);
    }
    spans
        .into_iter()
        .filter_map(|(block, (file, span))| Some((block, (span.start, Rc::new(map_file(file, map.pid, span)?)))))
        .collect()
}

/// What to map for `len` bytes at `offset` of a file: a mapping begins and ends at multiples of the pages that hold it (mm/hugetlb.c
/// and mmap(2)), but the chipset divides RAM at any multiple of 4 KiB.
fn whole_pages(offset: u64, len: u64, page_size: u64) -> Option<Range<u64>> {
    let end = offset.checked_add(len)?.checked_next_multiple_of(page_size)?;
    Some(offset - offset.checked_rem(page_size)?..end)
}

/// None where the file can't be mapped as far as that: it is a device, another user's, or shorter.
fn map_file(file: &SharedFile, pid: i32, span: Range<u64>) -> Option<MmapRegion> {
    let opened = file.open(pid).ok()?;
    if opened.metadata().ok()?.len() < span.end {
        return None;
    }
    let len = usize::try_from(span.end - span.start).ok()?;
    MmapRegion::from_file(FileOffset::new(opened, span.start), len).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two regions that follow one another, one mapped and one of this process as a QEMU's would be, and a third behind a hole.
    fn mixed(own: &mut [u8; 0x1000]) -> GuestRam {
        let block = Rc::new(MmapRegion::new(0x2000).unwrap());
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
            process: Process(Pid::this()),
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
        ram.read_pieces(
            &[(Gpa(0x2008), 4), (Gpa(0x1fe0), 2), (Gpa(0x1ffe), 5), (Gpa(0x2000), 1)],
            &mut read,
        )
        .unwrap();
        assert_eq!(read, [41, 42, 43, 44, 1, 2, 31, 32, 33, 34, 35, 33]);
        let many = vec![(Gpa(0x2000), 1); 2 * PIECES_MAX + 1];
        let mut read = vec![0; many.len()];
        ram.read_pieces(&many, &mut read).unwrap();
        assert!(read.iter().all(|byte| *byte == 33));
        let outside = ram.read_pieces(&[(Gpa(0x2000), 1), (Gpa(0x3000), 1)], &mut read);
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
