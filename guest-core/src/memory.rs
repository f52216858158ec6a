//! How guest memory is reached. The core never owns it: a VMM, or the host agent, implements [`PhysMemory`].

use crate::addr::{Gpa, Gva};
use std::ops::Range;

/// Why guest memory could not be read or written.
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
    /// The host could not do it: the process is gone, or refuses.
    #[error("cannot reach {len} bytes at {at}: {cause}")]
    Host {
        /// First byte asked for.
        at: Gpa,
        /// Bytes asked for.
        len: usize,
        /// What the host said.
        cause: String,
    },
}

/// Guest-physical memory. All addresses are guest-physical, all lengths in bytes.
///
/// Reads while the guest runs may tear; callers re-check what they act on once the vCPUs are stopped.
pub trait PhysMemory {
    /// Fills `buf` from `at` on. Errors: [`MemoryError::NotRam`], [`MemoryError::Host`]; `buf` is then unspecified.
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError>;

    /// Fills `buf` with the bytes of `pieces`, addresses and lengths, one behind the other. Errors as [`PhysMemory::read`].
    ///
    /// An implementation for which each read is a request of its own makes one of them all.
    fn read_pieces(&self, pieces: &[(Gpa, usize)], buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut rest = buf;
        for (at, len) in pieces {
            let (now, later) = rest.split_at_mut((*len).min(rest.len()));
            self.read(*at, now)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes `bytes` at `at`. The guest sees them as data at once; whether already translated or cached
    /// *code* changes too is the implementation's to guarantee, or to refuse.
    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError>;

    /// The ranges that are RAM, ascending, not overlapping.
    fn ram(&self) -> &[Range<Gpa>];
}

/// Guest-virtual memory: what unwinding and table parsing read through.
pub trait VirtMemory {
    /// Fills `buf` from `at` on. Errors as [`PhysMemory::read`], and [`MemoryError::NotMapped`].
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
