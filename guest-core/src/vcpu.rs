//! What the core knows of a vCPU.

/// A stopped vCPU's registers, as far as finding the kernel and unwinding need them. x86-64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Registers {
    /// General registers in the instruction set's own order:
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 … r15.
    pub general: [u64; 16],
    /// Instruction pointer, guest-virtual.
    pub rip: u64,
    /// Flags.
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
    /// The KERNEL_GS_BASE MSR (the inactive GS base).
    pub kernel_gs_base: u64,
    /// Guest-virtual base of the interrupt descriptor table, where known: it does not change after boot.
    pub idt_base: u64,
}

impl Registers {
    /// rsp, guest-virtual.
    pub fn rsp(&self) -> u64 {
        self.general[4]
    }

    /// rbp.
    pub fn rbp(&self) -> u64 {
        self.general[5]
    }

    /// True where the vCPU was stopped in user mode (privilege level 3).
    pub fn in_user_mode(&self) -> bool {
        self.cs & 3 == 3
    }
}
