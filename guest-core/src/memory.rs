//! The traits through which the core reads and writes guest memory. A VMM, or the host agent, implements [`PhysMemory`].

use crate::addr::{Gpa, Gva};
use std::ops::Range;

/// Why guest memory cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// The range is not guest RAM (a hole, a device, or past the end).
    #[error("{len} bytes at {at} are not guest RAM")]
    NotRam {
        /// First byte asked for.
        at: Gpa,
        /// Bytes asked for.
        len: usize,
    },
    /// The guest's page tables do not map the address.
    #[error("{at} is not mapped: level {level} entry {entry:#x}")]
    NotMapped {
        /// The guest-virtual address.
        at: Gva,
        /// Level of the entry that ended the walk: 1 is the page table, 5 the top of five.
        level: u8,
        /// That entry as read.
        entry: u64,
    },
    /// The host failed: the VMM's process is gone, or does not permit it.
    #[error("cannot reach {len} bytes at {at}: {cause}")]
    Host {
        /// First byte asked for.
        at: Gpa,
        /// Bytes asked for.
        len: usize,
        /// The host's error.
        cause: String,
    },
}

/// Guest-physical memory. All addresses are guest-physical, all lengths in bytes.
///
/// A read may tear while the guest runs. Callers check again, when the vCPUs are paused, what they act on.
pub trait PhysMemory {
    /// Fills `buf` from `at` on.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NotRam`] or [`MemoryError::Host`]. The contents of `buf` are then unspecified.
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Fills `buf` with the bytes of `ranges` (addresses and lengths in bytes), one behind the other. An implementation for which each read is a
    /// request should make one request of them all.
    ///
    /// # Errors
    ///
    /// As [`PhysMemory::read`].
    fn read_ranges(&self, ranges: &[(Gpa, usize)], buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = buf;
        for (at, len) in ranges {
            let (now, later) = rest.split_at_mut((*len).min(rest.len()));
            self.read(*at, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes `bytes` at `at`. The guest sees them as data at once. Code that a VMM has translated or cached may stay as it was.
    ///
    /// # Errors
    ///
    /// As [`PhysMemory::read`].
    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError>;

    /// Makes these writes (addresses and bytes), in this order. An implementation for which each write is a request should make one request of
    /// them all.
    ///
    /// # Errors
    ///
    /// As [`PhysMemory::read`]. The first of them may have been made.
    fn write_all(&self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MemoryError> {
        writes.iter().try_for_each(|(at, bytes)| self.write(*at, bytes))
    }

    /// The guest-physical ranges that are RAM, ascending and not overlapping.
    fn ram(&self) -> &[Range<Gpa>];
}

impl<M: PhysMemory + ?Sized> PhysMemory for &M {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        (**self).read(at, buf)
    }

    fn read_ranges(&self, ranges: &[(Gpa, usize)], buf: &mut [u8]) -> Result<(), MemoryError> {
        (**self).read_ranges(ranges, buf)
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        (**self).write(at, bytes)
    }

    fn write_all(&self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MemoryError> {
        (**self).write_all(writes)
    }

    fn ram(&self) -> &[Range<Gpa>] {
        (**self).ram()
    }
}

/// Guest-virtual memory, as the unwinder and the parsers of tables read it.
pub trait VirtMemory {
    /// Fills `buf` from the guest-virtual address `at` on.
    ///
    /// # Errors
    ///
    /// As [`PhysMemory::read`], and [`MemoryError::NotMapped`].
    fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Reads a little-endian u64 at `at`.
    fn read_u64(&self, at: Gva) -> Result<u64, MemoryError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads a little-endian u32 at `at`.
    fn read_u32(&self, at: Gva) -> Result<u32, MemoryError> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }
}
