//! Offsets of what is needed of a task, from the kernel's own type information.

use crate::btf::BtfError;
use crate::unwind::{KernelView, SetupError};

/// Sizes of stacks that are accepted, in bytes. The largest is that with KASAN.
const STACK_BYTES: std::ops::RangeInclusive<u64> = 8 << 10..=64 << 10;

/// Offsets in `struct task_struct` and in structures that it points at.
#[derive(Debug, Clone)]
pub(super) struct TaskLayout {
    pub tasks: u64,
    pub thread_node: u64,
    pub signal: u64,
    /// In `struct signal_struct`.
    pub thread_head: u64,
    pub pid: u64,
    pub tgid: u64,
    pub comm: u64,
    pub comm_bytes: usize,
    pub start_time: u64,
    /// `__state`, or `state` up to 5.13; its low half is enough.
    pub state: u64,
    pub on_cpu: u64,
    /// `nvcsw`; `nivcsw` is the word behind it.
    pub switches: u64,
    pub stack: u64,
    pub sp: u64,
    /// In `struct inactive_task_frame`, at the saved stack pointer of a sleeping task.
    pub frame_bp: u64,
    pub frame_ret: u64,
    pub frame_bytes: u64,
    /// `THREAD_SIZE`.
    pub stack_bytes: u64,
    /// `rcu_read_lock_nesting`, an int, in kernels in which a task may lose its CPU within an RCU section (`CONFIG_PREEMPT_RCU`).
    pub rcu_nesting: Option<u64>,
}

impl TaskLayout {
    pub fn read(view: &dyn KernelView) -> Result<Self, SetupError> {
        let btf = view.btf();
        let task = btf.structure("task_struct")?;
        let frame = btf.structure("inactive_task_frame")?;
        let at = |name| task.offset(name);
        let switches = at("nvcsw")?;
        if at("nivcsw")? != switches + 8 {
            return Err(SetupError::NotUnderstood {
                what: "struct task_struct",
                found: format!("nvcsw at {switches}, nivcsw at {}", at("nivcsw")?),
                expected: "one behind the other".to_owned(),
            });
        }
        Ok(Self {
            tasks: at("tasks")?,
            thread_node: at("thread_node")?,
            signal: at("signal")?,
            thread_head: btf.structure("signal_struct")?.offset("thread_head")?,
            pid: at("pid")?,
            tgid: at("tgid")?,
            comm: at("comm")?,
            comm_bytes: usize::try_from(task.member("comm")?.size).unwrap_or(0).min(64),
            start_time: at("start_time")?,
            state: at("__state").or_else(|_| at("state"))?,
            on_cpu: at("on_cpu")?,
            switches,
            stack: at("stack")?,
            sp: at("thread.sp")?,
            frame_bp: frame.offset("bp")?,
            frame_ret: frame.offset("ret_addr")?,
            frame_bytes: frame.size(),
            stack_bytes: stack_bytes(view)?,
            rcu_nesting: task.try_member("rcu_read_lock_nesting").map(|member| member.offset()),
        })
    }
}

/// The size of a task's stack in bytes, `THREAD_SIZE`. No type in BTF has this size, but interrupt stacks have the same
/// (`IRQ_STACK_SIZE`, arch/x86/include/asm/page_64_types.h), and their type is `struct irq_stack`.
fn stack_bytes(view: &dyn KernelView) -> Result<u64, SetupError> {
    let size = irq_stack_bytes(view)?;
    if size.is_power_of_two() && STACK_BYTES.contains(&size) {
        return Ok(size);
    }
    let (found, expected) = (format!("{size} bytes"), format!("a power of two in {STACK_BYTES:?}"));
    Err(SetupError::NotUnderstood {
        what: "struct irq_stack",
        found,
        expected,
    })
}

/// Size of a CPU's interrupt stack, in bytes.
pub(super) fn irq_stack_bytes(view: &dyn KernelView) -> Result<u64, BtfError> {
    Ok(view.btf().structure("irq_stack")?.size())
}
