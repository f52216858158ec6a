//! The memory slots of a VM: which of the guest's addresses is where in the process that runs it, as KVM itself has it.
//!
//! A line of `/proc/PID/maps` is no slot: neighbours are merged, high memory may come first, and RAM may lie in a library's mapping. KVM tells
//! no other process its slots, so they are read in the kernel of this host, by its own types: from this thread's `task_struct` to the
//! process's, its descriptor of the VM, and the VM's tree of slots (include/linux/kvm_host.h, Linux 5.17 and later). Nothing there is guessed, and
//! nothing is written.

use crate::descriptors;
use crate::host_kernel::{self, HostKernelError, Kcore, KernelMemory};
use crate::vm::FindError;
use guest_core::btf::{Btf, BtfError};
use std::fmt;

/// Processes of a host: the highest number of one (`PID_MAX_LIMIT`, include/linux/threads.h).
const TASKS_MAX: usize = 1 << 22;
/// Slots of a VM: `KVM_USER_MEM_SLOTS` and KVM's own (include/linux/kvm_host.h).
const SLOTS_MAX: usize = 1 << 15;
/// How often the slots are read again where they change meanwhile.
const TRIES: usize = 16;
/// Bytes of a page of the guest.
const PAGE: u64 = 4096;
/// Set in the generation while the slots change (`KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS`).
const IN_CHANGE: u64 = 1 << 63;

/// Flags of a slot: include/uapi/linux/kvm.h.
const LOG_DIRTY_PAGES: u32 = 1;
const READONLY: u32 = 1 << 1;
const GUEST_MEMFD: u32 = 1 << 2;
/// KVM's own: the slot is going to be deleted or moved (`KVM_MEMSLOT_INVALID`, include/linux/kvm_host.h).
const INVALID: u32 = 1 << 16;

/// A range of guest addresses that is backed by memory of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slot {
    /// First address, guest-physical.
    pub gpa: u64,
    /// Bytes.
    pub len: u64,
    /// First address in the process.
    pub hva: u64,
    flags: u32,
}

impl Slot {
    /// True where the guest can't write it.
    pub fn is_read_only(&self) -> bool {
        self.flags & READONLY != 0
    }

    /// True where KVM logs which pages the guest writes: a migration or a snapshot is under way, or the process has it on always.
    pub fn is_logged(&self) -> bool {
        self.flags & LOG_DIRTY_PAGES != 0
    }

    /// True where the guest's memory is hidden from the process that runs it.
    pub fn is_hidden(&self) -> bool {
        self.flags & GUEST_MEMFD != 0
    }

    fn holds(&self, gpa: u64) -> bool {
        gpa.checked_sub(self.gpa).is_some_and(|offset| offset < self.len)
    }
}

/// Why a VM's slots are not known.
#[derive(Debug, thiserror::Error)]
pub enum SlotsError {
    /// The process's descriptors are not understood.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The host's kernel can't be read.
    #[error(transparent)]
    Kernel(#[from] HostKernelError),
    /// The kernel has no such process.
    #[error("this host's kernel has no process {pid} among its tasks (vmpatch must run in the host's PID namespace)")]
    NoTask {
        /// The process.
        pid: i32,
    },
    /// What the descriptor leads to is not the VM of that process.
    #[error("descriptor {descriptor} of process {pid} does not lead to a VM of that process")]
    OtherVm {
        /// The process.
        pid: i32,
        /// Its descriptor of the VM.
        descriptor: i32,
    },
    /// They changed each time that they were read.
    #[error("the VM's memory slots change all the time")]
    Unstable,
    /// The tree is not one.
    #[error("the VM's memory slots are not understood: {0}")]
    Tree(String),
}

impl From<BtfError> for SlotsError {
    fn from(error: BtfError) -> Self {
        HostKernelError::from(error).into()
    }
}

/// The slots of a VM.
pub struct Slots {
    memory: Box<dyn KernelMemory + Send>,
    layout: Layout,
    /// The process, and where the kernel has it, the VM, and the memory of both.
    pid: i32,
    task: u64,
    vm: u64,
    mm: u64,
    generation: u64,
    slots: Vec<Slot>,
}

impl fmt::Debug for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.slots).finish()
    }
}

impl Slots {
    /// Reads the slots of the one VM that a process runs.
    ///
    /// # Errors
    ///
    /// The host's kernel does not show them, or they are not understood.
    pub fn of(pid: i32) -> Result<Self, SlotsError> {
        let descriptor = descriptors::vm(pid)?;
        let layout = Layout::of(&host_kernel::types("kvm")?)?;
        let kcore = Kcore::open()?;
        let own = kcore.own_task()?;
        // In another PID namespace, the kernel has other processes by these numbers.
        let tgid = usize::try_from(layout.tgid).map_or(0, |at| host_kernel::word(&own, at)) & u64::from(u32::MAX);
        if tgid != u64::from(std::process::id()) {
            return Err(SlotsError::NoTask { pid });
        }
        let leader = usize::try_from(layout.group_leader).map_or(0, |at| host_kernel::word(&own, at));
        let task = layout.task(&kcore, leader, pid)?;
        let (vm, mm) = layout.vm(&kcore, task, pid, descriptor)?;
        let (generation, slots) = layout.slots(&kcore, vm)?;
        let memory = Box::new(kcore);
        Ok(Self {
            memory,
            layout,
            pid,
            task,
            vm,
            mm,
            generation,
            slots,
        })
    }

    /// The slots, in ascending order of the guest's addresses.
    pub fn list(&self) -> &[Slot] {
        &self.slots
    }

    /// True where KVM has the same slots as when they were read, each change of which has a new generation, and the process has executed no other
    /// program since.
    ///
    /// # Errors
    ///
    /// The host's kernel can't be read any more.
    pub fn are_current(&self) -> Result<bool, SlotsError> {
        let memory = self.memory.as_ref();
        let Layout {
            tgid, task_mm, kvm_mm, ..
        } = self.layout;
        let is_same_process = memory.half(self.task.wrapping_add(tgid))?.cast_signed() == self.pid
            && memory.word(self.task.wrapping_add(task_mm))? == self.mm;
        let (_, generation) = self.layout.generation(memory, self.vm)?;
        Ok(is_same_process && generation == self.generation && memory.word(self.vm.wrapping_add(kvm_mm))? == self.mm)
    }

    /// Reads them again. Gives the slots as they are now.
    ///
    /// # Errors
    ///
    /// They can't be read any more.
    pub fn read_again(&mut self) -> Result<&[Slot], SlotsError> {
        (self.generation, self.slots) = self.layout.slots(self.memory.as_ref(), self.vm)?;
        Ok(&self.slots)
    }

    /// The slot that holds an address of the guest, as it is now.
    ///
    /// # Errors
    ///
    /// They can't be read any more.
    pub fn now_at(&self, gpa: u64) -> Result<Option<Slot>, SlotsError> {
        let (_, slots) = self.layout.slots(self.memory.as_ref(), self.vm)?;
        Ok(slots.into_iter().find(|slot| slot.holds(gpa)))
    }
}

/// Where the host's kernel has what is needed here.
#[derive(Debug, Clone, Copy)]
struct Layout {
    tasks: u64,
    tgid: u64,
    task_mm: u64,
    group_leader: u64,
    files: u64,
    fdt: u64,
    fd: u64,
    max_fds: u64,
    private_data: u64,
    kvm_mm: u64,
    memslots: u64,
    generation: u64,
    gfn_tree: u64,
    node_idx: u64,
    left: u64,
    right: u64,
    node_len: u64,
    gfn_node: u64,
    base_gfn: u64,
    npages: u64,
    userspace_addr: u64,
    flags: u64,
}

impl Layout {
    fn of(types: &Btf) -> Result<Self, BtfError> {
        let offset = |name: &str, member: &str| types.structure(name)?.offset(member);
        Ok(Self {
            tasks: offset("task_struct", "tasks.next")?,
            tgid: offset("task_struct", "tgid")?,
            task_mm: offset("task_struct", "mm")?,
            group_leader: offset("task_struct", "group_leader")?,
            files: offset("task_struct", "files")?,
            fdt: offset("files_struct", "fdt")?,
            fd: offset("fdtable", "fd")?,
            max_fds: offset("fdtable", "max_fds")?,
            private_data: offset("file", "private_data")?,
            kvm_mm: offset("kvm", "mm")?,
            memslots: offset("kvm", "memslots[0]")?,
            generation: offset("kvm_memslots", "generation")?,
            gfn_tree: offset("kvm_memslots", "gfn_tree.rb_node")?,
            node_idx: offset("kvm_memslots", "node_idx")?,
            left: offset("rb_node", "rb_left")?,
            right: offset("rb_node", "rb_right")?,
            node_len: types.structure("rb_node")?.size(),
            gfn_node: offset("kvm_memory_slot", "gfn_node")?,
            base_gfn: offset("kvm_memory_slot", "base_gfn")?,
            npages: offset("kvm_memory_slot", "npages")?,
            userspace_addr: offset("kvm_memory_slot", "userspace_addr")?,
            flags: offset("kvm_memory_slot", "flags")?,
        })
    }

    /// The process `pid`, in the ring of all processes that `leader` is in.
    fn task(&self, memory: &dyn KernelMemory, leader: u64, pid: i32) -> Result<u64, SlotsError> {
        let mut task = leader;
        for _ in 0..TASKS_MAX {
            if memory.half(task.wrapping_add(self.tgid))?.cast_signed() == pid {
                return Ok(task);
            }
            task = memory.word(task.wrapping_add(self.tasks))?.wrapping_sub(self.tasks);
            if task == leader {
                break;
            }
        }
        Err(SlotsError::NoTask { pid })
    }

    /// The VM that a process has a descriptor of, and the memory that both say is theirs.
    fn vm(&self, memory: &dyn KernelMemory, task: u64, pid: i32, descriptor: i32) -> Result<(u64, u64), SlotsError> {
        let other = SlotsError::OtherVm { pid, descriptor };
        let follow = |at: u64, member: u64| memory.word(at.wrapping_add(member));
        let table = follow(follow(task, self.files)?, self.fdt)?;
        let index = u32::try_from(descriptor).unwrap_or(u32::MAX);
        if index >= memory.half(table.wrapping_add(self.max_fds))? {
            return Err(other);
        }
        let file = follow(follow(table, self.fd)?, 8 * u64::from(index))?;
        let vm = follow(file, self.private_data)?;
        let mm = follow(task, self.task_mm)?;
        if mm == 0 || follow(vm, self.kvm_mm)? != mm {
            return Err(other);
        }
        Ok((vm, mm))
    }

    /// The set of slots that is in force, and its generation.
    fn generation(&self, memory: &dyn KernelMemory, vm: u64) -> Result<(u64, u64), SlotsError> {
        let set = memory.word(vm.wrapping_add(self.memslots))?;
        Ok((set, memory.word(set.wrapping_add(self.generation))?))
    }

    /// All slots in ascending order, and the generation that they are of.
    fn slots(&self, memory: &dyn KernelMemory, vm: u64) -> Result<(u64, Vec<Slot>), SlotsError> {
        let mut found = Err(SlotsError::Unstable);
        for _ in 0..TRIES {
            let (set, generation) = self.generation(memory, vm)?;
            found = self.tree(memory, set);
            let is_going = |slots: &Vec<Slot>| slots.iter().any(|slot| slot.flags & INVALID != 0);
            if found.as_ref().is_ok_and(is_going) {
                continue;
            }
            if generation & IN_CHANGE == 0 && self.generation(memory, vm)? == (set, generation) {
                return found.map(|slots| (generation, slots));
            }
        }
        found.and(Err(SlotsError::Unstable))
    }

    fn tree(&self, memory: &dyn KernelMemory, set: u64) -> Result<Vec<Slot>, SlotsError> {
        let node_at = match memory.half(set.wrapping_add(self.node_idx))? {
            index @ 0..=1 => self.gfn_node.wrapping_add(u64::from(index) * self.node_len),
            index => return Err(SlotsError::Tree(format!("node_idx is {index}"))),
        };
        let mut nodes = vec![memory.word(set.wrapping_add(self.gfn_tree))?];
        let mut slots = Vec::new();
        while let Some(node) = nodes.pop() {
            if node == 0 {
                continue;
            }
            if slots.len() >= SLOTS_MAX {
                return Err(SlotsError::Tree(format!("there are more than {SLOTS_MAX}")));
            }
            slots.push(self.slot(memory, node.wrapping_sub(node_at))?);
            for child in [self.left, self.right] {
                nodes.push(memory.word(node.wrapping_add(child))?);
            }
        }
        slots.sort_by_key(|slot| slot.gpa);
        let ends = slots.iter().zip(slots.iter().skip(1));
        for (slot, next) in ends {
            if slot.gpa + slot.len > next.gpa {
                return Err(SlotsError::Tree(format!("two of them hold {:#x}", next.gpa)));
            }
        }
        Ok(slots)
    }

    fn slot(&self, memory: &dyn KernelMemory, at: u64) -> Result<Slot, SlotsError> {
        let word = |member: u64| memory.word(at.wrapping_add(member));
        let (gfn, pages, hva) = (word(self.base_gfn)?, word(self.npages)?, word(self.userspace_addr)?);
        let bytes = |pages: u64| pages.checked_mul(PAGE);
        match (bytes(gfn), bytes(pages)) {
            (Some(gpa), Some(len))
                if len > 0 && gpa.checked_add(len).is_some() && hva.checked_add(len).is_some() && hva % PAGE == 0 =>
            {
                let flags = memory.half(at.wrapping_add(self.flags))?;
                Ok(Slot { gpa, len, hva, flags })
            }
            _ => Err(SlotsError::Tree(format!(
                "one has frame {gfn:#x}, {pages:#x} pages, address {hva:#x}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Words of a kernel by address.
    #[derive(Default)]
    struct Words(BTreeMap<u64, u64>);

    impl KernelMemory for Words {
        fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), HostKernelError> {
            let word = self.0.get(&at).ok_or(HostKernelError::Address { at })?;
            buf.copy_from_slice(&word.to_le_bytes()[..buf.len()]);
            Ok(())
        }
    }

    const LAYOUT: Layout = Layout {
        tasks: 0x10,
        tgid: 0x20,
        task_mm: 0x28,
        group_leader: 0x30,
        files: 0x38,
        fdt: 0x8,
        fd: 0x10,
        max_fds: 0x0,
        private_data: 0x18,
        kvm_mm: 0x8,
        memslots: 0x10,
        generation: 0x0,
        gfn_tree: 0x8,
        node_idx: 0x10,
        left: 0x10,
        right: 0x8,
        node_len: 0x18,
        gfn_node: 0x100,
        base_gfn: 0x200,
        npages: 0x208,
        userspace_addr: 0x210,
        flags: 0x218,
    };

    fn words(all: &[(u64, u64)]) -> Words {
        Words(all.iter().copied().collect())
    }

    /// A slot at `at` whose second node is used, with its children.
    fn slot(at: u64, [gfn, pages, hva, flags]: [u64; 4], left: u64, right: u64) -> [(u64, u64); 6] {
        [
            (at + 0x118 + 0x10, left),
            (at + 0x118 + 0x8, right),
            (at + 0x200, gfn),
            (at + 0x208, pages),
            (at + 0x210, hva),
            (at + 0x218, flags),
        ]
    }

    /// A VM at 0x5000 with high memory first in the process, and a slot in between that lies elsewhere: none of the three could be told
    /// from the one mapping that two of them are in.
    fn vm() -> Vec<(u64, u64)> {
        let mut all = vec![
            (0x5008, 0x77),
            (0x5010, 0x6000),
            (0x6000, 4),
            (0x6008, 0x8118),
            (0x6010, 1),
        ];
        all.extend(slot(0x8000, [0x100, 0x10, 0x7f00_0000, 0], 0x9118, 0xa118));
        all.extend(slot(0x9000, [0, 0x100, 0x7e10_0000, 1], 0, 0));
        all.extend(slot(0xa000, [0x10_0000, 0x100, 0x7e00_0000, 2], 0, 0));
        all
    }

    #[test]
    fn slots_are_read_in_the_order_of_the_guests_addresses() {
        let (generation, slots) = LAYOUT.slots(&words(&vm()), 0x5000).unwrap();
        let places: Vec<_> = slots.iter().map(|slot| (slot.gpa, slot.len, slot.hva)).collect();
        assert_eq!(
            (generation, places),
            (
                4,
                vec![
                    (0, 0x10_0000, 0x7e10_0000),
                    (0x10_0000, 0x1_0000, 0x7f00_0000),
                    (0x1_0000_0000, 0x10_0000, 0x7e00_0000)
                ]
            )
        );
        assert!(slots[0].is_logged() && !slots[0].is_read_only() && slots[2].is_read_only());
        assert!(slots[1].holds(0x10_0000) && slots[1].holds(0x10_ffff) && !slots[1].holds(0x11_0000));
    }

    #[test]
    fn slots_that_make_no_sense_are_refused() {
        for (at, value) in [
            // Overlapping, no page, an address that does not fit, a slot that is its own child, a set in change.
            (0x8200, 0xff),
            (0x9208, 0),
            (0xa200, u64::MAX / 8),
            (0xa210, 0x7e00_0001),
            (0xa128, 0xa118),
            (0x6010, 2),
            (0x6000, 4 | IN_CHANGE),
        ] {
            let mut memory = words(&vm());
            memory.0.insert(at, value);
            assert!(LAYOUT.slots(&memory, 0x5000).is_err(), "{at:#x} {value:#x}");
        }
    }

    #[test]
    fn a_vm_is_found_from_any_process_by_the_descriptor_of_its_own() {
        let mut memory = words(&vm());
        // Processes 10, 20 and 30 at 0x1000, 0x2000, 0x3000.
        for (task, next, pid) in [(0x1000, 0x2010, 10), (0x2000, 0x3010, 20), (0x3000, 0x1010, 30)] {
            memory.0.insert(task + 0x10, next);
            memory.0.insert(task + 0x20, pid);
        }
        memory.0.extend([
            (0x3028, 0x77),
            (0x3038, 0x4000),
            (0x4008, 0x4100),
            (0x4100, 64),
            (0x4110, 0x4200),
            (0x4200 + 8 * 11, 0x4300),
            (0x4318, 0x5000),
        ]);
        assert_eq!(LAYOUT.task(&memory, 0x1000, 30).unwrap(), 0x3000);
        assert!(matches!(
            LAYOUT.task(&memory, 0x1000, 31),
            Err(SlotsError::NoTask { pid: 31 })
        ));
        assert_eq!(LAYOUT.vm(&memory, 0x3000, 30, 11).unwrap(), (0x5000, 0x77));
        assert!(LAYOUT.vm(&memory, 0x3000, 30, 64).is_err());
        // Another process's VM.
        memory.0.insert(0x5008, 0x78);
        assert!(matches!(
            LAYOUT.vm(&memory, 0x3000, 30, 11),
            Err(SlotsError::OtherVm { .. })
        ));
    }
}
