//! What the unwinder and the task list need of a kernel.

use crate::addr::{Gpa, Gva};
use crate::btf::Btf;
use crate::kernel::Live;
use crate::memory::{MemoryError, VirtMemory};
use crate::paging::{AddressSpace, SmallTableVisitor};
use std::ops::Range;

/// The parts of a kernel that the unwinder needs: its memory, its symbols and its types.
pub trait KernelView: VirtMemory {
    /// The kernel's type information.
    fn btf(&self) -> &Btf;

    /// The address of the symbol, if its name is unique. For a per-CPU symbol, per-CPU offsets are added to it.
    fn symbol(&self, name: &str) -> Option<Gva>;

    /// The same, with the next symbol's address as its end.
    fn symbol_range(&self, name: &str) -> Option<Range<Gva>>;

    /// The per-CPU offset of each possible CPU. It is also the CPU's kernel GS base.
    fn per_cpu_offsets(&self) -> &[u64];

    /// The guest-physical address of kernel data that is never moved; `None` for an address that is not mapped.
    fn physical(&self, at: Gva) -> Option<Gpa>;

    /// Translates an address with the page tables of a vCPU's CR3 and CR4; `None` for an address that is not mapped.
    fn seen_by_vcpu(&self, cr3: u64, cr4: u64, at: Gva) -> Option<Gpa>;

    /// Visits the kernel's last-level page tables for `range`: see [`AddressSpace::visit_small_tables`].
    ///
    /// [`AddressSpace::visit_small_tables`]: crate::paging::AddressSpace::visit_small_tables
    fn visit_small_tables(
        &self,
        range: &Range<Gva>,
        tables_max: usize,
        visit: &mut SmallTableVisitor<'_>,
    ) -> Result<bool, MemoryError>;

    /// Reads guest-physical memory.
    fn read_physical(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError>;
}

impl KernelView for Live<'_> {
    fn btf(&self) -> &Btf {
        &self.kernel.btf
    }

    fn symbol(&self, name: &str) -> Option<Gva> {
        self.kernel.symbols.unique(name)
    }

    fn symbol_range(&self, name: &str) -> Option<Range<Gva>> {
        let start = self.kernel.symbols.unique(name)?;
        let (_, end) = self.kernel.symbols.containing(start)?;
        Some(start..end)
    }

    fn per_cpu_offsets(&self) -> &[u64] {
        self.kernel.per_cpu_offsets()
    }

    fn physical(&self, at: Gva) -> Option<Gpa> {
        Live::physical(self, at).ok().map(|(gpa, _)| gpa)
    }

    fn seen_by_vcpu(&self, cr3: u64, cr4: u64, at: Gva) -> Option<Gpa> {
        let space = AddressSpace::from_control_registers(cr3, cr4);
        space.translate(self.memory, at).ok().map(|there| there.gpa)
    }

    fn visit_small_tables(
        &self,
        range: &Range<Gva>,
        tables_max: usize,
        visit: &mut SmallTableVisitor<'_>,
    ) -> Result<bool, MemoryError> {
        self.kernel
            .space
            .visit_small_tables(self.memory, range, tables_max, visit)
    }

    fn read_physical(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, buf)
    }
}
