//! Finds the kernel image: from a vCPU's interrupt descriptor table to the image's mapping.
//!
//! x86-64 Linux maps its image into the 1 GiB from `__START_KERNEL_map` on (arch/x86/include/asm/page_64_types.h,
//! since 2.6.x; KASLR moves it within that range since 3.14).

use crate::addr::{Gpa, Gva};
use crate::memory::{MemoryError, PhysMemory, VirtMemory};
use crate::paging::{AddressSpace, MappedMemory};
use crate::vcpu::Registers;
use std::ops::Range;

/// The guest-virtual address range of a kernel image: from `__START_KERNEL_map` on, the 1 GiB that a KASLR kernel may use.
pub const IMAGE_RANGE: Range<Gva> = Gva(0xffff_ffff_8000_0000)..Gva(0xffff_ffff_c000_0000);
/// With page-table isolation, the user tables are one page above the kernel's: CR3 bit 12
/// (`PTI_USER_PGTABLE_BIT`, arch/x86/entry/calling.h, since 4.15).
const PTI_USER_BIT: u64 = 1 << 12;
/// EFER.LMA: long mode is active.
const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: page tables can forbid instruction fetch. The kernel sets it on every CPU that has it, before its first C code
/// (arch/x86/kernel/head_64.S), also with `noexec=off`.
const EFER_NXE: u64 = 1 << 11;
/// Fewest bytes of a Linux image. The few pages of entry code that user tables map are smaller.
const IMAGE_BYTES_MIN: u64 = 8 << 20;
/// Gates that are read. The first 32 are the CPU's own exceptions, and always set.
const GATES: u64 = 32;

/// Why no kernel image was found. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
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
    /// The interrupt table does not lead into the address range of Linux images.
    #[error(
        "the interrupt table at {idt} leads to {handler}, outside of Linux's kernel range {:#x}-{:#x}: no running Linux kernel, one that has only begun to start, or a nested guest",
        IMAGE_RANGE.start.0, IMAGE_RANGE.end.0
    )]
    NotLinux {
        /// Base of the table.
        idt: Gva,
        /// Guest-virtual address of its first handler.
        handler: Gva,
    },
    /// The table or the mapping cannot be read.
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
        /// Guest-virtual address of its image.
        at: Gpa,
        /// Index of the other vCPU.
        other_vcpu: usize,
        /// Guest-virtual address of the other vCPU's image.
        other_at: Gpa,
    },
    /// The mapping around the handler is too small for a kernel.
    #[error(
        "only {bytes} bytes are mapped around the handler {handler}; a kernel image has more than {IMAGE_BYTES_MIN}"
    )]
    TooSmall {
        /// Guest-virtual address of the interrupt handler.
        handler: Gva,
        /// Bytes mapped with the handler's own distance to guest-physical addresses.
        bytes: u64,
    },
    /// The CPU cannot forbid instruction fetches. The bit by which vmpatch's own mappings do so is reserved on such a CPU, and would fault.
    #[error(
        "the guest's CPU model has no NX (EFER {efer:#x}), without which vmpatch maps nothing; start the guest with a CPU model that has it"
    )]
    NoExecuteDisable {
        /// EFER of the vCPU.
        efer: u64,
    },
}

/// A range of the image with the same permissions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Guest-virtual address of the first byte.
    pub start: Gva,
    /// Guest-virtual address behind the last byte.
    pub end: Gva,
    /// True if the guest may write there.
    pub writable: bool,
    /// True if the guest may execute there.
    pub executable: bool,
}

/// The kernel image as the guest's page tables map it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The page tables through which it was found.
    pub space: AddressSpace,
    /// The mapped ranges, ascending and not overlapping.
    pub segments: Vec<Segment>,
    /// Guest-virtual minus guest-physical: one distance for the whole image.
    pub distance: u64,
}

impl Image {
    /// Finds the image through the vCPUs that are in 64-bit mode.
    ///
    /// A vCPU that leads to no image is ignored as long as another one leads to one: it may be in firmware, not started yet, or run a nested
    /// guest, whose tables it then has. All vCPUs that lead to an image must lead to the same one. In a kdump kernel, the vCPUs that did not
    /// crash are halted in the crashed kernel (`nmi_shootdown_cpus`, arch/x86/kernel/reboot.c), so that it is not clear which kernel is the
    /// guest's.
    ///
    /// Each vCPU's tables are tried as they are and with the PTI user bit cleared. The larger mapping is used: user tables map the entry code
    /// only.
    ///
    /// # Errors
    ///
    /// The error of the vCPU that came closest to an image.
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
                match Self::through(memory, space, interrupt_table(vcpu)) {
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

    /// True if a vCPU's interrupt table leads into this image.
    fn is_of(&self, memory: &dyn PhysMemory, vcpu: &Registers) -> bool {
        [vcpu.cr3 & !PTI_USER_BIT, vcpu.cr3].into_iter().any(|cr3| {
            let space = AddressSpace::from_control_registers(cr3, vcpu.cr4);
            let handler = handler(&MappedMemory { memory, space }, interrupt_table(vcpu));
            let at = handler.and_then(|at| Ok((at, space.translate(memory, at)?.gpa)));
            at.is_ok_and(|(at, gpa)| self.physical(at) == Some(gpa))
        })
    }

    /// Guest-physical address of the image. It differs for any two kernels.
    fn base(&self) -> Gpa {
        Gpa(self.start().0.wrapping_sub(self.distance))
    }

    /// Number of mapped bytes.
    pub fn len(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.end.0 - segment.start.0)
            .sum()
    }

    /// True if nothing is mapped. [`Image::find`] never gives such an image.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Guest-virtual address of the first mapped byte.
    pub fn start(&self) -> Gva {
        self.segments.first().map_or(IMAGE_RANGE.end, |segment| segment.start)
    }

    /// Guest-virtual address behind the last mapped byte.
    pub fn end(&self) -> Gva {
        self.segments.last().map_or(IMAGE_RANGE.start, |segment| segment.end)
    }

    /// The guest-physical address of an address of the image; `None` outside of it.
    pub fn physical(&self, at: Gva) -> Option<Gpa> {
        self.segment(at).map(|_| Gpa(at.0.wrapping_sub(self.distance)))
    }

    /// The segment that holds `at`.
    pub fn segment(&self, at: Gva) -> Option<&Segment> {
        // A hostile guest may have as many segments as the range has pages.
        let behind = self.segments.partition_point(|segment| segment.start <= at);
        self.segments
            .get(behind.checked_sub(1)?)
            .filter(|segment| at < segment.end)
    }

    /// Reads guest memory at `at`, an address of the image.
    pub fn read(&self, memory: &dyn PhysMemory, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError> {
        memory.read(Gpa(at.0.wrapping_sub(self.distance)), buf)
    }

    fn through(memory: &dyn PhysMemory, space: AddressSpace, idt: Gva) -> Result<Self, ImageError> {
        let mapped = MappedMemory { memory, space };
        let handler = handler(&mapped, idt).map_err(|source| ImageError::Unreadable { idt, source })?;
        if !IMAGE_RANGE.contains(&handler) {
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

/// A vCPU's interrupt table. If the VMM does not tell it, the address is 0, which leads to no kernel.
fn interrupt_table(vcpu: &Registers) -> Gva {
    Gva(vcpu.idt_base.unwrap_or(0))
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

/// All that is mapped at `distance` in the range of kernel images, merged by permission.
fn segments(memory: &dyn PhysMemory, space: AddressSpace, distance: u64) -> Result<Vec<Segment>, MemoryError> {
    let mut segments: Vec<Segment> = Vec::new();
    space.visit_gib(memory, IMAGE_RANGE.start, &mut |at, there| {
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
