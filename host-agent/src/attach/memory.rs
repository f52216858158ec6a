//! Guest RAM as the patch core wants it: mapped through vm-memory where it is shared, through the process where not.

use guest_core::{Gpa, MemoryError, PhysMemory};
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use qmp::{Backing, RamMap, RamRegion};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Why guest RAM can't be reached.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The file that holds it can't be opened.
    #[error("opening the shared memory of QEMU process {pid}")]
    Open {
        /// The process.
        pid: i32,
        /// Why.
        source: qmp::memory::BackingError,
    },
    /// It can't be mapped.
    #[error("mapping {bytes} bytes of guest RAM of process {pid}: {cause}")]
    Map {
        /// The process.
        pid: i32,
        /// Bytes asked for.
        bytes: u64,
        /// Why.
        cause: String,
    },
    /// RAM of both kinds in one guest.
    #[error(
        "the guest's RAM is partly shared and partly private (blocks {shared} and {private}), which is not supported"
    )]
    Mixed {
        /// A block that is shared.
        shared: String,
        /// A block that is not.
        private: String,
    },
}

/// The RAM of a guest whose process is QEMU's.
pub fn open(map: &RamMap) -> Result<Box<dyn PhysMemory>, RamError> {
    let is_shared = |region: &&RamRegion| matches!(region.backing, Backing::Shared(_));
    let shared = map.regions.iter().find(is_shared);
    let private = map.regions.iter().find(|region| !is_shared(region));
    match (shared, private) {
        (Some(shared), Some(private)) => Err(RamError::Mixed {
            shared: shared.block.clone(),
            private: private.block.clone(),
        }),
        (Some(_), None) => Ok(Box::new(SharedRam::map(map)?)),
        _ => Ok(Box::new(ProcessRam::new(map))),
    }
}

/// RAM reached through any [`vm_memory::GuestMemory`]; a rust-vmm VMM can hand in its own.
pub struct SharedRam<M> {
    memory: M,
    ranges: Vec<Range<Gpa>>,
}

impl SharedRam<GuestMemoryMmap<()>> {
    /// Maps the files that hold the RAM of QEMU's process.
    fn map(map: &RamMap) -> Result<Self, RamError> {
        let pid = map.pid;
        let bytes = map.regions.iter().map(|region| region.len).sum();
        let failed = |cause: String| RamError::Map { pid, bytes, cause };
        let mut ranges = Vec::new();
        for region in &map.regions {
            let Backing::Shared(file) = &region.backing else {
                continue;
            };
            let opened = file.open(pid).map_err(|source| RamError::Open { pid, source })?;
            let len = usize::try_from(region.len).map_err(|error| failed(error.to_string()))?;
            ranges.push((
                GuestAddress(region.gpa.0),
                len,
                Some(FileOffset::new(opened, file.offset)),
            ));
        }
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(|error| failed(error.to_string()))?;
        Ok(Self {
            memory,
            ranges: ranges_of(map),
        })
    }
}

impl<M: GuestMemory> PhysMemory for SharedRam<M> {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let len = buf.len();
        self.memory
            .read_slice(buf, GuestAddress(at.0))
            .map_err(|_| MemoryError::NotRam { at, len })
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let outside = |_| MemoryError::NotRam { at, len: bytes.len() };
        self.memory.write_slice(bytes, GuestAddress(at.0)).map_err(outside)
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &self.ranges
    }
}

/// RAM that is the QEMU process's own: each access is a system call on that process.
struct ProcessRam {
    pid: Pid,
    regions: Vec<RamRegion>,
    ranges: Vec<Range<Gpa>>,
}

impl ProcessRam {
    fn new(map: &RamMap) -> Self {
        Self {
            pid: Pid::from_raw(map.pid),
            regions: map.regions.clone(),
            ranges: ranges_of(map),
        }
    }

    /// The host-virtual address of `len` bytes at `at`, all in one region.
    fn remote(&self, at: Gpa, len: usize) -> Result<RemoteIoVec, MemoryError> {
        let outside = MemoryError::NotRam { at, len };
        let end = at.0.checked_add(len as u64).ok_or(outside.clone())?;
        let after = self.regions.partition_point(|region| region.gpa.0 <= at.0);
        let region = after
            .checked_sub(1)
            .and_then(|index| self.regions.get(index))
            .ok_or(outside.clone())?;
        let offset = at.0 - region.gpa.0;
        let base = usize::try_from(region.hva.0.wrapping_add(offset)).map_err(|_| outside.clone())?;
        if end > region.gpa.0.saturating_add(region.len) {
            return Err(outside);
        }
        Ok(RemoteIoVec { base, len })
    }

    fn done(at: Gpa, len: usize, result: nix::Result<usize>) -> Result<(), MemoryError> {
        match result {
            Ok(done) if done == len => Ok(()),
            Ok(done) => Err(MemoryError::Host {
                at,
                len,
                cause: format!("only {done} bytes were transferred"),
            }),
            Err(errno) => Err(MemoryError::Host {
                at,
                len,
                cause: errno.desc().to_owned(),
            }),
        }
    }
}

impl PhysMemory for ProcessRam {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let remote = self.remote(at, buf.len())?;
        let len = buf.len();
        Self::done(
            at,
            len,
            process_vm_readv(self.pid, &mut [IoSliceMut::new(buf)], &[remote]),
        )
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let remote = self.remote(at, bytes.len())?;
        Self::done(
            at,
            bytes.len(),
            process_vm_writev(self.pid, &[IoSlice::new(bytes)], &[remote]),
        )
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &self.ranges
    }
}

fn ranges_of(map: &RamMap) -> Vec<Range<Gpa>> {
    map.regions
        .iter()
        .map(|region| Gpa(region.gpa.0)..Gpa(region.gpa.0.saturating_add(region.len)))
        .collect()
}
