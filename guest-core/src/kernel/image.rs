//! Where the kernel image lies: from a vCPU's interrupt descriptor table to the image's mapping.
//!
//! x86-64 Linux maps its image into the 1 GiB from `__START_KERNEL_map` on (arch/x86/include/asm/page_64_types.h,
//! since 2.6.x; KASLR moves it within that window since 3.14).

use crate::addr::{Gpa, Gva};
use crate::memory::{MemoryError, PhysMemory, VirtMemory};
use crate::paging::{AddressSpace, MappedMemory};
use crate::vcpu::Registers;
use std::ops::Range;

/// `__START_KERNEL_map`, and the end of the 1 GiB that a KASLR kernel may use.
pub const WINDOW: Range<Gva> = Gva(0xffff_ffff_8000_0000)..Gva(0xffff_ffff_c000_0000);
/// With page-table isolation the user tables lie one page above the kernel's: CR3 bit 12
/// (`PTI_USER_PGTABLE_BIT`, arch/x86/entry/calling.h, since 4.15).
const PTI_USER_BIT: u64 = 1 << 12;
/// EFER.LMA: long mode is active.
const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: page tables can forbid instruction fetch. The kernel sets it on every CPU that has it, before its first C code
/// (arch/x86/kernel/head_64.S), also with `noexec=off`.
const EFER_NXE: u64 = 1 << 11;
/// A Linux image is larger than this; the few pages of entry code that user tables map are not.
const IMAGE_BYTES_MIN: u64 = 8 << 20;
/// Bytes of the image that are read at once.
const READ_BYTES: usize = 16 << 20;
/// Gates looked at; the first 32 are the CPU's own exceptions and always set.
const GATES: u64 = 32;

/// Why no kernel image was found. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No vCPU runs in 64-bit mode.
    #[error(
        "no vCPU is in 64-bit mode (CR0 {cr0:#x}, EFER {efer:#x}): the guest is in firmware, a boot loader or early boot, or its vCPUs run nested guests"
    )]
    NotLongMode {
        /// CR0 of the first vCPU.
        cr0: u64,
        /// EFER of the first vCPU.
        efer: u64,
    },
    /// The interrupt table does not lead into the window where Linux lives.
    #[error(
        "the interrupt table at {idt} leads to {handler}, outside of Linux's kernel window {:#x}-{:#x}: no running Linux kernel, one that has only begun to start, or a nested guest",
        WINDOW.start.0, WINDOW.end.0
    )]
    NotLinux {
        /// Base of the table.
        idt: Gva,
        /// Its first handler.
        handler: Gva,
    },
    /// The table or the mapping could not be read.
    #[error("reading the interrupt table at {idt}, which is no Linux kernel's, or a nested guest's")]
    Unreadable {
        /// Base of the table.
        idt: Gva,
        /// Why.
        source: MemoryError,
    },
    /// Two vCPUs run different kernels.
    #[error(
        "vCPU {vcpu} runs a kernel at {at} and vCPU {other_vcpu} another one at {other_at} (guest-physical): after a crash or a \
         kexec, vCPUs stay halted in the kernel that is gone; such a guest is not patched"
    )]
    Different {
        /// Index of the first vCPU.
        vcpu: usize,
        /// Where its image lies.
        at: Gpa,
        /// Index of the other vCPU.
        other_vcpu: usize,
        /// Where that one's image lies.
        other_at: Gpa,
    },
    /// What is mapped around the handler is too small for a kernel.
    #[error(
        "only {bytes} bytes are mapped around the handler {handler}; a kernel image has more than {IMAGE_BYTES_MIN}"
    )]
    TooSmall {
        /// The interrupt handler.
        handler: Gva,
        /// Bytes mapped with the handler's own distance to guest-physical addresses.
        bytes: u64,
    },
    /// The CPU can't forbid instruction fetch: the bit by which vmpatch's own mappings do so is a reserved one there, and a fault.
    #[error(
        "the guest's CPU model has no NX (EFER {efer:#x}), without which vmpatch maps nothing; start the guest with a CPU model that has it"
    )]
    NoExecuteDisable {
        /// EFER of the vCPU.
        efer: u64,
    },
}

/// A stretch of the image with one set of permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub start: Gva,
    /// One past the last byte.
    pub end: Gva,
    /// The guest may write there.
    pub writable: bool,
    /// The guest may run it.
    pub executable: bool,
}

/// The kernel image as the guest's page tables map it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The page tables it was found through.
    pub space: AddressSpace,
    /// What is mapped, ascending, not overlapping.
    pub segments: Vec<Segment>,
    /// Guest-virtual minus guest-physical: one distance for the whole image.
    pub distance: u64,
}

impl Image {
    /// Finds the image through the vCPUs that are in 64-bit mode.
    ///
    /// A vCPU that leads to no image does not count as long as another one does: it may be in firmware, not started yet, or run
    /// a nested guest, whose tables are the nested guest's. Those that lead to an image must all lead to the same one. In a kdump
    /// kernel the vCPUs that did not crash are halted in the kernel that did (`nmi_shootdown_cpus`, arch/x86/kernel/reboot.c), so
    /// that neither can be told to be the guest's.
    ///
    /// Each vCPU's tables are tried as they are and with the PTI user bit cleared, and the larger mapping wins: user
    /// tables map the entry code only. Errors: [`ImageError`], for the vCPU that came furthest.
    pub fn find(memory: &dyn PhysMemory, vcpus: &[Registers]) -> Result<Self, ImageError> {
        let first = vcpus.first().copied().unwrap_or_default();
        let mut failure = ImageError::NotLongMode {
            cr0: first.cr0,
            efer: first.efer,
        };
        let mut found: Option<(usize, Image)> = None;
        for (index, vcpu) in vcpus.iter().enumerate().filter(|(_, vcpu)| vcpu.efer & EFER_LMA != 0) {
            if found.as_ref().is_some_and(|(_, image)| image.is_of(memory, vcpu)) {
                continue;
            }
            let mut best: Option<Image> = None;
            for cr3 in [vcpu.cr3 & !PTI_USER_BIT, vcpu.cr3] {
                let space = AddressSpace::from_control_registers(cr3, vcpu.cr4);
                match Self::through(memory, space, Gva(vcpu.idt_base)) {
                    Ok(image) if best.as_ref().is_none_or(|best| best.len() < image.len()) => best = Some(image),
                    Ok(_) => {}
                    Err(error) => failure = error,
                }
            }
            match (&found, best) {
                (_, Some(_)) if vcpu.efer & EFER_NXE == 0 => {
                    return Err(ImageError::NoExecuteDisable { efer: vcpu.efer });
                }
                (Some((vcpu, first)), Some(other)) if first.base() != other.base() => {
                    return Err(ImageError::Different {
                        vcpu: *vcpu,
                        at: first.base(),
                        other_vcpu: index,
                        other_at: other.base(),
                    });
                }
                (None, Some(image)) => found = Some((index, image)),
                _ => {}
            }
        }
        found.map(|(_, image)| image).ok_or(failure)
    }

    /// True where a vCPU's interrupt table leads into this image.
    fn is_of(&self, memory: &dyn PhysMemory, vcpu: &Registers) -> bool {
        [vcpu.cr3 & !PTI_USER_BIT, vcpu.cr3].into_iter().any(|cr3| {
            let space = AddressSpace::from_control_registers(cr3, vcpu.cr4);
            let handler = handler(&MappedMemory { memory, space }, Gva(vcpu.idt_base));
            let at = handler.and_then(|at| Ok((at, space.translate(memory, at)?.gpa)));
            at.is_ok_and(|(at, gpa)| self.physical(at) == Some(gpa))
        })
    }

    /// Where the image lies in guest-physical memory; no two kernels share it.
    fn base(&self) -> Gpa {
        Gpa(self.start().0.wrapping_sub(self.distance))
    }

    /// Bytes mapped.
    pub fn len(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.end.0 - segment.start.0)
            .sum()
    }

    /// True where nothing is mapped; [`Image::find`] never gives such a one.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// First byte mapped.
    pub fn start(&self) -> Gva {
        self.segments.first().map_or(WINDOW.end, |segment| segment.start)
    }

    /// One past the last byte mapped.
    pub fn end(&self) -> Gva {
        self.segments.last().map_or(WINDOW.start, |segment| segment.end)
    }

    /// The guest-physical address of an address of the image; `None` outside of it.
    pub fn physical(&self, at: Gva) -> Option<Gpa> {
        self.segment(at).map(|_| Gpa(at.0.wrapping_sub(self.distance)))
    }

    /// The segment that holds `at`.
    pub fn segment(&self, at: Gva) -> Option<&Segment> {
        // A hostile guest may have as many segments as the window has pages.
        let behind = self.segments.partition_point(|segment| segment.start <= at);
        self.segments
            .get(behind.checked_sub(1)?)
            .filter(|segment| at < segment.end)
    }

    /// Copies a segment out of guest memory.
    pub fn read_segment(&self, memory: &dyn PhysMemory, segment: &Segment) -> Result<Vec<u8>, MemoryError> {
        let len = usize::try_from(segment.end.0 - segment.start.0).unwrap_or(0);
        let mut bytes = vec![0; len];
        let mut at = Gpa(segment.start.0.wrapping_sub(self.distance));
        for piece in bytes.chunks_mut(READ_BYTES) {
            memory.read(at, piece)?;
            at = at.wrapping_add(piece.len() as u64);
        }
        Ok(bytes)
    }

    fn through(memory: &dyn PhysMemory, space: AddressSpace, idt: Gva) -> Result<Self, ImageError> {
        let mapped = MappedMemory { memory, space };
        let handler = handler(&mapped, idt).map_err(|source| ImageError::Unreadable { idt, source })?;
        if !WINDOW.contains(&handler) {
            return Err(ImageError::NotLinux { idt, handler });
        }
        let there = space
            .translate(memory, handler)
            .map_err(|source| ImageError::Unreadable { idt, source })?;
        let distance = handler.0.wrapping_sub(there.gpa.0);
        let segments = segments(memory, space, distance).map_err(|source| ImageError::Unreadable { idt, source })?;
        let image = Self {
            space,
            segments,
            distance,
        };
        if image.len() < IMAGE_BYTES_MIN {
            return Err(ImageError::TooSmall {
                handler,
                bytes: image.len(),
            });
        }
        Ok(image)
    }
}

/// The handler of the first gate that is present. Gate format: Intel SDM volume 3A, figure 6-8.
fn handler(memory: &MappedMemory<'_>, idt: Gva) -> Result<Gva, MemoryError> {
    let mut found = Gva(0);
    for gate in 0..GATES {
        let low = memory.read_u64(idt.wrapping_add(gate * 16))?;
        let high = memory.read_u64(idt.wrapping_add(gate * 16 + 8))?;
        if low & (1 << 47) != 0 {
            found = Gva((low & 0xffff) | (low >> 32 & 0xffff_0000) | (high << 32));
            break;
        }
    }
    Ok(found)
}

/// Everything in the kernel window that is mapped at `distance`, merged by permission.
fn segments(memory: &dyn PhysMemory, space: AddressSpace, distance: u64) -> Result<Vec<Segment>, MemoryError> {
    let mut segments: Vec<Segment> = Vec::new();
    space.visit_gib(memory, WINDOW.start, &mut |at, there| {
        if at.0.wrapping_sub(there.gpa.0) != distance {
            return;
        }
        let end = at.wrapping_add(there.page_size);
        let rights = (there.writable, there.executable);
        match segments.last_mut() {
            Some(last) if last.end == at && (last.writable, last.executable) == rights => last.end = end,
            _ => segments.push(Segment {
                start: at,
                end,
                writable: there.writable,
                executable: there.executable,
            }),
        }
    })?;
    Ok(segments)
}
