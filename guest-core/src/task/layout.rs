//! Offsets of what is needed of a task, from the kernel's own type information.

use crate::btf::{BtfError, Member};
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
    /// The bits that belong to `on_cpu` of the four bytes there: it is an int up to 6.18, and a byte among others in 7.2 and 7.3.
    pub on_cpu_mask: u32,
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
            on_cpu_mask: mask_of("on_cpu", &task.member("on_cpu")?)?,
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

/// The bits of a member among the four bytes from its first one on.
fn mask_of(name: &str, member: &Member) -> Result<u32, SetupError> {
    match (member.bit_field, member.size) {
        (None, size @ 1..=4) => Ok(u32::MAX >> (32 - 8 * size)),
        _ => Err(SetupError::NotUnderstood {
            what: "struct task_struct",
            found: format!("{name} of {} bytes, {:?} bits", member.size, member.bit_field),
            expected: "1 to 4 bytes".to_owned(),
        }),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::btf::TypeId;

    #[test]
    fn a_member_has_the_bits_of_its_own_width_and_not_those_behind() {
        let member = |size, bit_field| Member {
            bit_offset: 52 * 8,
            bit_field,
            type_id: TypeId(1),
            size,
            elements: None,
        };
        let mask = |size| mask_of("on_cpu", &member(size, None)).ok();
        assert_eq!([1, 2, 4].map(mask), [Some(0xff), Some(0xffff), Some(u32::MAX)]);
        assert_eq!([0, 8].map(mask), [None; 2]);
        assert!(mask_of("on_cpu", &member(4, Some(1))).is_err());
    }
}
