//! `struct kvm_run`: the page that KVM and a VMM share for each vCPU, include/uapi/linux/kvm.h.
//!
//! Where `kvm_valid_regs` is not 0, KVM stores the vCPU's registers in the page each time that `KVM_RUN` returns, also with EINTR
//! (`kvm_arch_vcpu_ioctl_run()`, arch/x86/kvm/x86.c; documented with `KVM_CAP_SYNC_REGS`, Linux 4.17).

use guest_core::Registers;
use kvm_bindings::{
    KVM_SYNC_X86_REGS, KVM_SYNC_X86_SREGS, SYNC_REGS_SIZE_BYTES, kvm_dtable, kvm_regs, kvm_run, kvm_segment, kvm_sregs,
    kvm_sync_regs,
};
use std::mem::offset_of;

/// The `ioctl` request that runs a vCPU: include/uapi/linux/kvm.h.
pub const KVM_RUN: u64 = 0xae80;
/// What is asked for: general and special registers.
pub(crate) const WANTED: u64 = KVM_SYNC_X86_REGS as u64 | KVM_SYNC_X86_SREGS as u64;

/// Offset of `kvm_valid_regs`.
pub(crate) const VALID_REGS: u64 = offset_of!(kvm_run, kvm_valid_regs) as u64;
const DIRTY_REGS: usize = offset_of!(kvm_run, kvm_dirty_regs);
const REGS: usize = offset_of!(kvm_run, s) + offset_of!(kvm_sync_regs, regs);
const SREGS: usize = offset_of!(kvm_run, s) + offset_of!(kvm_sync_regs, sregs);
/// Offset of the stored instruction pointer.
pub(crate) const RIP: u64 = (REGS + offset_of!(kvm_regs, rip)) as u64;
/// Bytes from the page's start that a pause reads.
pub(crate) const READ_LEN: usize = SREGS + size_of::<kvm_sregs>();

/// Where vmpatch leaves its name: the end of what is reserved for registers, far behind all that KVM has a meaning for.
pub(crate) const MARK_AT: u64 = (offset_of!(kvm_run, s) + SYNC_REGS_SIZE_BYTES as usize - MARK.len()) as u64;
/// Its name.
pub(crate) const MARK: [u8; 8] = *b"vmpatch\0";
/// No instruction pointer: not canonical.
pub(crate) const POISON: u64 = 0x7665_6c69_7465_6d6f;

const _: () = assert!(MARK_AT as usize > offset_of!(kvm_run, s) + size_of::<kvm_sync_regs>());

/// The general registers in the instruction set's order.
const GENERAL: [usize; 16] = [
    offset_of!(kvm_regs, rax),
    offset_of!(kvm_regs, rcx),
    offset_of!(kvm_regs, rdx),
    offset_of!(kvm_regs, rbx),
    offset_of!(kvm_regs, rsp),
    offset_of!(kvm_regs, rbp),
    offset_of!(kvm_regs, rsi),
    offset_of!(kvm_regs, rdi),
    offset_of!(kvm_regs, r8),
    offset_of!(kvm_regs, r9),
    offset_of!(kvm_regs, r10),
    offset_of!(kvm_regs, r11),
    offset_of!(kvm_regs, r12),
    offset_of!(kvm_regs, r13),
    offset_of!(kvm_regs, r14),
    offset_of!(kvm_regs, r15),
];

/// The first [`READ_LEN`] bytes of a vCPU's page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page<'a>(pub &'a [u8; READ_LEN]);

impl Page<'_> {
    fn word(&self, at: usize) -> u64 {
        let bytes = self.0.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        // Constants all, and within the page.
        bytes.map_or(0, u64::from_le_bytes)
    }

    /// Which registers KVM is to store at each exit.
    pub fn valid_regs(&self) -> u64 {
        self.word(VALID_REGS as usize)
    }

    /// Which registers the VMM wants to be set at the next entry.
    pub fn dirty_regs(&self) -> u64 {
        self.word(DIRTY_REGS)
    }

    /// The stored registers.
    pub fn registers(&self) -> Registers {
        let selector = SREGS + offset_of!(kvm_sregs, cs) + offset_of!(kvm_segment, selector);
        let special = |field: usize| self.word(SREGS + field);
        Registers {
            general: GENERAL.map(|register| self.word(REGS + register)),
            rip: self.word(RIP as usize),
            rflags: self.word(REGS + offset_of!(kvm_regs, rflags)),
            cs: u16::from_le_bytes([self.byte(selector), self.byte(selector + 1)]),
            cr0: special(offset_of!(kvm_sregs, cr0)),
            cr3: special(offset_of!(kvm_sregs, cr3)),
            cr4: special(offset_of!(kvm_sregs, cr4)),
            efer: special(offset_of!(kvm_sregs, efer)),
            gs_base: special(offset_of!(kvm_sregs, gs) + offset_of!(kvm_segment, base)),
            // An MSR, which is not among what KVM stores.
            kernel_gs_base: None,
            idt_base: Some(special(offset_of!(kvm_sregs, idt) + offset_of!(kvm_dtable, base))),
        }
    }

    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_where_the_kernel_stores_them() {
        // By hand from the header, so that a wrong field of the bindings is seen.
        let mut bytes = [0; READ_LEN];
        let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        put(288, 3);
        put(296, 4);
        for (index, register) in ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"]
            .iter()
            .enumerate()
        {
            assert_eq!(register.len(), 3);
            put(304 + 8 * index, 100 + index as u64);
        }
        for register in 8..16 {
            put(304 + 8 * register, 100 + register as u64);
        }
        put(304 + 128, 0xffff_ffff_8100_0000);
        put(304 + 136, 0x246);
        let sregs = 304 + 144;
        put(sregs + 12, 0x33);
        put(sregs + 4 * 24, 0xffff_8880_0000_1000);
        put(sregs + 8 * 24 + 16, 0xffff_fe00_0000_0000);
        for (index, value) in [(0, 0x8005_0033), (2, 0x1000), (3, 0x6f0), (5, 0xd01)] {
            put(sregs + 8 * 24 + 32 + 8 * index, value);
        }
        let page = Page(&bytes);
        assert_eq!((page.valid_regs(), page.dirty_regs()), (3, 4));
        let expected = Registers {
            general: [
                100, 102, 103, 101, 106, 107, 104, 105, 108, 109, 110, 111, 112, 113, 114, 115,
            ],
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
            cs: 0x33,
            cr0: 0x8005_0033,
            cr3: 0x1000,
            cr4: 0x6f0,
            efer: 0xd01,
            gs_base: 0xffff_8880_0000_1000,
            kernel_gs_base: None,
            idt_base: Some(0xffff_fe00_0000_0000),
        };
        assert_eq!(page.registers(), expected);
    }
}
