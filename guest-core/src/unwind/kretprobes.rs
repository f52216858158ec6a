//! The hooked returns of kretprobes up to 5.10: `struct kretprobe_instance`, in a hash table of lists, by task (kernel/kprobes.c:
//! `kretprobe_inst_table`). Its `fp` is the address on the stack (arch/x86/kernel/kprobes/core.c: `arch_prepare_kretprobe`). Later kernels
//! have a list for each task.

use super::error::UnwindError;
use super::hooked_returns::HookedReturn;
use super::view::KernelView;
use crate::addr::Gva;
use crate::btf::BtfError;

/// `KPROBE_HASH_BITS`. With another number, a return address would not be found, and its stack would not be safe.
const HASH_BITS: u32 = 6;
/// `GOLDEN_RATIO_64`, include/linux/hash.h.
const GOLDEN_RATIO: u64 = 0x61c8_8646_80b5_83eb;
/// Most hooked returns of all tasks with the same hash.
const INSTANCES_MAX: usize = 4096;
const TOO_MANY: UnwindError = UnwindError::TooMany {
    what: "return probes in flight",
    max: INSTANCES_MAX,
};

/// Where the table is, and the offsets of what is read of each instance.
#[derive(Debug, Clone)]
pub(super) struct Kretprobes {
    table: Gva,
    node: u64,
    task: u64,
    ret: u64,
    slot: u64,
}

impl Kretprobes {
    /// Looks up the table; `None` for a kernel that keeps the addresses elsewhere.
    pub fn find(view: &dyn KernelView) -> Result<Option<Self>, BtfError> {
        let Some(table) = view.symbol("kretprobe_inst_table") else {
            return Ok(None);
        };
        let instance = view.btf().structure("kretprobe_instance")?;
        Ok(Some(Self {
            table,
            node: instance.offset("hlist")?,
            task: instance.offset("task")?,
            ret: instance.offset("ret_addr")?,
            slot: instance.offset("fp")?,
        }))
    }

    /// Adds the hooked returns of `task`.
    pub fn collect(&self, view: &dyn KernelView, task: Gva, found: &mut Vec<HookedReturn>) -> Result<(), UnwindError> {
        let word = |at: Gva| {
            view.read_u64(at).map_err(|source| UnwindError::Unreadable {
                what: "the table of return probes",
                at: at.0,
                source,
            })
        };
        let bucket = task.0.wrapping_mul(GOLDEN_RATIO) >> (u64::BITS - HASH_BITS);
        let mut node = word(self.table.wrapping_add(8 * bucket))?;
        for _ in 0..INSTANCES_MAX {
            if node == 0 {
                return Ok(());
            }
            let instance = Gva(node.wrapping_sub(self.node));
            if word(instance.wrapping_add(self.task))? == task.0 {
                found.push(HookedReturn {
                    slot: word(instance.wrapping_add(self.slot))?,
                    ret: word(instance.wrapping_add(self.ret))?,
                });
            }
            node = word(Gva(node))?;
        }
        Err(TOO_MANY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::btf::builder::{Builder, STRUCT};
    use crate::unwind::testing::{Sample, basic_types};

    const TABLE: u64 = 0xffff_ffff_8220_0000;
    const INSTANCES: u64 = 0xffff_8880_0000_0000;
    const TASK: u64 = 0xffff_8880_1234_5680;

    /// Collects from a table in which the given words lead from one instance to the next.
    fn collected(next: [u64; 3]) -> Result<Vec<HookedReturn>, UnwindError> {
        let mut types = Builder::new();
        basic_types(&mut types);
        types.composite(
            "kretprobe_instance",
            STRUCT,
            48,
            &[
                ("hlist", 1, 0),
                ("rp", 1, 128),
                ("ret_addr", 1, 192),
                ("task", 1, 256),
                ("fp", 1, 320),
            ],
        );
        let mut sample = Sample::with_types(&[], &types);
        sample.set_symbol("kretprobe_inst_table", TABLE);
        sample.put(TABLE, &[0; 512]);
        // The index is hash_64(0xffff888012345680, 6).
        sample.put_words(TABLE + 8 * 0x30, &[INSTANCES]);
        for (index, next) in (0..).zip(next) {
            let task = if index == 1 { TASK + 64 } else { TASK };
            let words = [next, 0, 0, 0x100 + index, task, 0x200 + index];
            sample.put_words(INSTANCES + 64 * index, &words);
        }
        let kretprobes = Kretprobes::find(&sample).unwrap().unwrap();
        let mut found = Vec::new();
        kretprobes.collect(&sample, Gva(TASK), &mut found).map(|()| found)
    }

    #[test]
    fn a_tasks_own_returns_are_found_among_those_of_its_hash() {
        let found = collected([INSTANCES + 64, INSTANCES + 128, 0]).unwrap();
        let expected = [(0x200, 0x100), (0x202, 0x102)].map(|(slot, ret)| HookedReturn { slot, ret });
        assert_eq!(found, expected);
    }

    #[test]
    fn a_list_without_an_end_is_an_error() {
        let endless = collected([INSTANCES + 64, INSTANCES, 0]).unwrap_err();
        assert_eq!(endless, TOO_MANY);
    }
}
