//! The registers of a vCPU.

use serde::{Deserialize, Serialize};

/// The registers of an x86-64 vCPU that are needed to find the kernel and to unwind. Registers that were read from a running vCPU may be torn:
/// they serve to find the kernel, never to unwind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Registers {
    /// General registers in the instruction set's own order:
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 … r15.
    pub general: [u64; 16],
    /// Instruction pointer, guest-virtual.
    pub rip: u64,
    /// Flags. Under TCG the arithmetic flags may be out of date; the others (IF, …) are not.
    pub rflags: u64,
    /// Code segment selector; its low two bits are the privilege level.
    pub cs: u16,
    /// CR0.
    pub cr0: u64,
    /// CR3: guest-physical root of the page table in force, with its low control bits.
    pub cr3: u64,
    /// CR4; bit 12 (LA57) tells 5-level paging.
    pub cr4: u64,
    /// The EFER MSR; bit 10 (LMA) tells long mode.
    pub efer: u64,
    /// Active GS base, guest-virtual.
    pub gs_base: u64,
    /// The KERNEL_GS_BASE MSR (the inactive GS base), if the VMM tells it.
    pub kernel_gs_base: Option<u64>,
    /// Guest-virtual base of the interrupt descriptor table, if the VMM tells it. It does not change after boot. Without it, no kernel is found.
    pub idt_base: Option<u64>,
}

impl Registers {
    /// The stack pointer, guest-virtual.
    pub fn rsp(&self) -> u64 {
        self.general[4]
    }

    /// The value of rbp.
    pub fn rbp(&self) -> u64 {
        self.general[5]
    }

    /// True if the vCPU is in user mode (privilege level 3).
    pub fn in_user_mode(&self) -> bool {
        self.cs & 3 == 3
    }
}
