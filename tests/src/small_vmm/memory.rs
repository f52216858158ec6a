//! The guest's RAM: three pieces, of which the last is above 4 GiB.

use super::Result;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    MmapRegion,
};

/// How the guest's RAM is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Memory of the process alone.
    Private,
    /// A memfd for all of it, whose pieces are in the wrong order there, too.
    Shared,
}

/// Where the first region ends: within what the kernel is unpacked to.
const FIRST_END: u64 = 24 << 20;
/// Where the last region begins.
const HIGH: u64 = 4 << 30;

/// The pieces for so many bytes: first address and length.
fn pieces(len: u64) -> [(u64, u64); 3] {
    let low = len / 8 * 5;
    [(0, FIRST_END), (FIRST_END, low - FIRST_END), (HIGH, len - low)]
}

/// Maps RAM of so many bytes, a multiple of 32 MiB, each region by itself.
pub(super) fn map(len: u64, backing: Backing) -> Result<GuestMemoryMmap> {
    let pieces = pieces(len);
    let file = match backing {
        Backing::Private => None,
        Backing::Shared => {
            let file = File::from(memfd_create(c"small-vmm-ram", MFdFlags::MFD_CLOEXEC)?);
            file.set_len(len)?;
            Some(file)
        }
    };
    let mut end = len;
    let mut regions = Vec::new();
    for (start, len) in pieces {
        end -= len;
        let size = usize::try_from(len)?;
        let mapped = match &file {
            None => MmapRegion::new(size)?,
            Some(file) => MmapRegion::from_file(FileOffset::new(file.try_clone()?, end), size)?,
        };
        let region = GuestRegionMmap::new(mapped, GuestAddress(start));
        regions.push(region.ok_or("a piece of RAM ends behind all addresses")?);
    }
    Ok(GuestMemoryMmap::from_regions(regions)?)
}

/// Gives it to the VM, a slot for each region.
pub(super) fn give(vm: &VmFd, ram: &GuestMemoryMmap) -> Result<()> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping lives for as long as the process, as `run` keeps it until all vCPUs have ended.
        unsafe { vm.set_user_memory_region(region)? };
    }
    Ok(())
}
