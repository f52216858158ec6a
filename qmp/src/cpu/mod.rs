//! A vCPU's registers.

pub mod info_registers;

/// Registers of an x86-64 vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuState {
    /// General registers in the instruction set's own order:
    /// rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 … r15.
    pub general: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags. Under TCG the arithmetic flags may be out of date; the others (IF, …) are not.
    pub rflags: u64,
    /// Code segment selector; its low two bits are the privilege level.
    pub cs: u16,
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// The EFER MSR.
    pub efer: u64,
    /// Base of the GS segment in force.
    pub gs_base: u64,
    /// The KERNEL_GS_BASE MSR, where the source tells it (the GDB stub does).
    pub kernel_gs_base: Option<u64>,
    /// Base of the interrupt descriptor table, where the source tells it (`info registers` does).
    pub idt_base: Option<u64>,
}
