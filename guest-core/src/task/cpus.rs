//! Finds which CPU a vCPU is, which task runs on it, and its stacks.

use super::layout::irq_stack_bytes;
use crate::addr::{Gpa, Gva};
use crate::btf::Member;
use crate::unwind::{KernelView, SetupError, Stack, StackKind};
use crate::vcpu::Registers;
use std::ops::Range;

/// The exception stacks in `struct cea_exception_stacks` (arch/x86/include/asm/cpu_entry_area.h, since 5.2).
const EXCEPTION_STACKS: [&str; 6] = [
    "DF_stack",
    "NMI_stack",
    "DB_stack",
    "MCE_stack",
    "VC_stack",
    "VC2_stack",
];
/// Where `current` is: a member of `pcpu_hot` from 6.2 to 6.14, a symbol of its own before and since.
const CURRENT: [(&str, &str, &str); 2] = [("pcpu_hot", "pcpu_hot", "current_task"), ("current_task", "", "")];
/// Where the pointer to the interrupt stack is, likewise.
const IRQ_STACK: [(&str, &str, &str); 2] = [
    ("pcpu_hot", "pcpu_hot", "hardirq_stack_ptr"),
    ("hardirq_stack_ptr", "", ""),
];
/// Largest size of a CPU's stack, in bytes. With KASAN, an exception stack has 8 pages.
const CPU_STACK_BYTES_MAX: u64 = 64 << 10;
/// Stacks start and end on pages.
const PAGE_BYTES: u64 = 4096;
/// Where a system call enters the kernel. The page tables of user mode map it, too, where they are separate (arch/x86/mm/pti.c:
/// `pti_clone_entry_text`, since 4.15).
const SYSTEM_CALL: &str = "entry_SYSCALL_64";
/// EFER bit 10: the vCPU is in long mode.
const EFER_LMA: u64 = 1 << 10;

/// Where a paused vCPU is, in the kernel's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// Neither in this kernel nor in its user mode: not started, in firmware, halted in a former kernel, or in a nested guest, whose
    /// registers these are.
    Elsewhere,
    /// In user mode, on that CPU; `None` where the VMM does not tell the kernel's GS base.
    User(Option<usize>),
    /// In the kernel, on that CPU.
    Kernel(usize),
    /// In the kernel, on an unknown CPU.
    Unknown,
}

/// Addresses of the per-CPU data that are needed of a CPU.
#[derive(Debug, Clone)]
pub(super) struct Cpus {
    offsets: Vec<u64>,
    current: Gva,
    irq_stack: Gva,
    irq_stack_bytes: u64,
    exception_base: Gva,
    exception_stacks: Vec<Range<u64>>,
    /// The entry stack, as offsets from the start of the exception stacks.
    entry_stack: Range<i64>,
    run_queue: Gva,
    run_queue_current: u64,
    run_queue_idle: u64,
    run_queue_switches: u64,
    online: Gva,
    entry_text: Option<Range<Gva>>,
    /// The first instruction of a system call, which all of the kernel's page tables map: guest-virtual and guest-physical address.
    system_call: (Gva, Option<Gpa>),
}

impl Cpus {
    pub fn read(view: &dyn KernelView) -> Result<Self, SetupError> {
        let btf = view.btf();
        let symbol = |name: &str| view.symbol(name).ok_or_else(|| SetupError::NoSymbol(name.to_owned()));
        let stacks = btf.structure("cea_exception_stacks")?;
        let mut exception_stacks = Vec::new();
        for name in EXCEPTION_STACKS {
            if let Some(member) = stacks.try_member(name) {
                exception_stacks.push(stack_range(name, &member)?);
            }
        }
        let area = btf.structure("cpu_entry_area")?;
        let entry = area.member("entry_stack_page.stack")?;
        stack_range("entry_stack_page.stack", &entry)?;
        let from_exceptions = |at: u64| at.wrapping_sub(area.offset("estacks").unwrap_or(0)).cast_signed();
        area.offset("estacks")?;
        let queue = btf.structure("rq")?;
        Ok(Self {
            offsets: view.per_cpu_offsets().to_vec(),
            current: first_of(view, &CURRENT)?,
            irq_stack: first_of(view, &IRQ_STACK)?,
            irq_stack_bytes: irq_stack_bytes(view)?,
            exception_base: symbol("cea_exception_stacks")?,
            exception_stacks,
            entry_stack: from_exceptions(entry.offset())..from_exceptions(entry.end()),
            run_queue: symbol("runqueues")?,
            run_queue_current: queue.offset("curr")?,
            run_queue_idle: queue.offset("idle")?,
            run_queue_switches: queue.offset("nr_switches")?,
            online: symbol("__cpu_online_mask")?,
            system_call: (symbol(SYSTEM_CALL)?, view.physical(symbol(SYSTEM_CALL)?)),
            entry_text: view
                .symbol("__entry_text_start")
                .zip(view.symbol("__entry_text_end"))
                .map(|(a, b)| a..b),
        })
    }

    /// Number of possible CPUs.
    pub fn count(&self) -> usize {
        self.offsets.len()
    }

    /// Finds which CPU a vCPU is. The kernel's GS base is the CPU's per-CPU offset. In user mode it is in the other GS register, which a user
    /// cannot change. In the entry code it may be in either, and a user may have set the other one to any value.
    ///
    /// A vCPU that runs a nested guest has that guest's CR3, mode and GS bases. They tell nothing of the thread that runs the nested guest,
    /// which is in the kernel. The nested guest's CR3 is an address of the nested guest's memory, so that a translation with it fails or
    /// leads elsewhere.
    pub fn place(&self, view: &dyn KernelView, registers: &Registers) -> Place {
        let (at, there) = self.system_call;
        if registers.efer & EFER_LMA == 0 || view.seen_by_vcpu(registers.cr3, registers.cr4, at) != there {
            return Place::Elsewhere;
        }
        let cpu = |base: u64| self.offsets.iter().position(|&offset| offset == base);
        let (active, aside) = (cpu(registers.gs_base), registers.kernel_gs_base.and_then(cpu));
        if registers.in_user_mode() {
            return match registers.kernel_gs_base {
                None => Place::User(None),
                Some(_) => aside.map_or(Place::Elsewhere, |cpu| Place::User(Some(cpu))),
            };
        }
        // Where nobody tells the other register, it may hold another CPU's offset.
        let is_told = registers.kernel_gs_base.is_some();
        match (active, aside) {
            (Some(active), None) if is_told || !self.may_be_entry(registers.rip) => Place::Kernel(active),
            (None, Some(aside)) if self.may_be_entry(registers.rip) => Place::Kernel(aside),
            (Some(active), Some(aside)) if active == aside || !self.may_be_entry(registers.rip) => {
                Place::Kernel(active)
            }
            _ => Place::Unknown,
        }
    }

    /// True in the code between user mode and the kernel proper.
    pub fn is_entry(&self, rip: u64) -> bool {
        self.entry_text.as_ref().is_some_and(|text| text.contains(&Gva(rip)))
    }

    fn may_be_entry(&self, rip: u64) -> bool {
        self.entry_text.is_none() || self.is_entry(rip)
    }

    /// The CPUs that are online.
    pub fn online(&self, view: &dyn KernelView) -> Result<Vec<usize>, SetupError> {
        let mut found = Vec::new();
        for first in (0..self.count()).step_by(64) {
            let word = read(
                view,
                "the mask of online CPUs",
                self.online.wrapping_add(first as u64 / 8),
            )?;
            found.extend((first..self.count().min(first + 64)).filter(|cpu| word >> (cpu - first) & 1 == 1));
        }
        Ok(found)
    }

    /// The task that a CPU is running, and the current task of its run queue. They differ for the few instructions of a task switch.
    pub fn running(&self, view: &dyn KernelView, cpu: usize) -> Result<(Gva, Gva), SetupError> {
        let current = read(view, "the current task", self.on(cpu, self.current))?;
        let queued = read(view, "rq->curr", self.queue(cpu, self.run_queue_current))?;
        Ok((Gva(current), Gva(queued)))
    }

    /// A CPU's idle task; `None` for a CPU that is not possible.
    pub fn idle(&self, view: &dyn KernelView, cpu: usize) -> Result<Option<Gva>, SetupError> {
        let idle = read(view, "rq->idle", self.queue(cpu, self.run_queue_idle))?;
        Ok((idle != 0).then_some(Gva(idle)))
    }

    /// How often each CPU has switched tasks.
    pub fn switches(&self, view: &dyn KernelView) -> Result<Vec<u64>, SetupError> {
        let count = |cpu| read(view, "rq->nr_switches", self.queue(cpu, self.run_queue_switches));
        (0..self.count()).map(count).collect()
    }

    /// A CPU's own stacks: interrupts, exceptions, entry.
    pub fn stacks(&self, view: &dyn KernelView, cpu: usize) -> Result<Vec<Stack>, SetupError> {
        let mut stacks = Vec::new();
        let top = read(view, "the interrupt stack's pointer", self.on(cpu, self.irq_stack))?;
        if top != 0 {
            // Up to 5.11 the pointer is the stack's end. Since then it is the last word, which the switch back pops.
            let end = Gva(top).wrapping_add(8).align_down(PAGE_BYTES);
            stacks.push(Stack {
                kind: StackKind::Irq,
                range: end.wrapping_offset(-self.irq_stack_bytes.cast_signed())..end,
            });
        }
        let base = Gva(read(
            view,
            "the exception stacks' pointer",
            self.on(cpu, self.exception_base),
        )?);
        if base != Gva(0) {
            stacks.extend(self.exception_stacks.iter().map(|stack| Stack {
                kind: StackKind::Exception,
                range: base.wrapping_add(stack.start)..base.wrapping_add(stack.end),
            }));
            let range = base.wrapping_offset(self.entry_stack.start)..base.wrapping_offset(self.entry_stack.end);
            stacks.push(Stack {
                kind: StackKind::Entry,
                range,
            });
        }
        Ok(stacks)
    }

    /// The address of a CPU's copy of a per-CPU symbol.
    pub fn on(&self, cpu: usize, symbol: Gva) -> Gva {
        symbol.wrapping_add(self.offsets.get(cpu).copied().unwrap_or(0))
    }

    fn queue(&self, cpu: usize, offset: u64) -> Gva {
        self.on(cpu, self.run_queue).wrapping_add(offset)
    }
}

/// The range of a stack within a structure.
fn stack_range(name: &str, member: &Member) -> Result<Range<u64>, SetupError> {
    let range = member.offset()..member.end();
    if range.end.saturating_sub(range.start) <= CPU_STACK_BYTES_MAX {
        return Ok(range);
    }
    Err(SetupError::NotUnderstood {
        what: "the stacks of a CPU",
        found: format!("{name} at {range:?}"),
        expected: format!("at most {CPU_STACK_BYTES_MAX} bytes"),
    })
}

/// The per-CPU address of `current`.
pub(crate) fn current(view: &dyn KernelView) -> Result<Gva, SetupError> {
    first_of(view, &CURRENT)
}

/// The per-CPU address of the first alternative that the kernel has. An alternative is a symbol, a structure and a member.
fn first_of(view: &dyn KernelView, alternatives: &[(&str, &str, &str)]) -> Result<Gva, SetupError> {
    for &(symbol, structure, member) in alternatives {
        let Some(at) = view.symbol(symbol) else { continue };
        if structure.is_empty() {
            return Ok(at);
        }
        return Ok(at.wrapping_add(view.btf().structure(structure)?.offset(member)?));
    }
    let names: Vec<_> = alternatives.iter().map(|(symbol, ..)| *symbol).collect();
    Err(SetupError::NoSymbol(names.join(" or ")))
}

fn read(view: &dyn KernelView, what: &'static str, at: Gva) -> Result<u64, SetupError> {
    view.read_u64(at)
        .map_err(|source| SetupError::Unreadable { what, at, source })
}
