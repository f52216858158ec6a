//! A small hand-made kernel for unit tests: literal memory, symbols and types.

use super::view::KernelView;
use crate::addr::{Gpa, Gva};
use crate::btf::Btf;
use crate::btf::builder::{Builder, KIND_FLAG, STRUCT};
use crate::memory::{MemoryError, VirtMemory};
use crate::paging::{PAGE_SIZE, PMD_SIZE, SmallTableVisitor};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

/// Guest-virtual address of the text. Each function has 0x100 bytes.
pub(crate) const TEXT: u64 = 0xffff_ffff_8100_0000;
/// End of the text.
pub(crate) const TEXT_END: u64 = TEXT + 0x1000;
const IPS: u64 = 0xffff_ffff_8200_0000;
const ENTRIES: u64 = 0xffff_ffff_8210_0000;
/// End of the image.
pub(crate) const IMAGE_END: u64 = 0xffff_ffff_8300_0000;
/// CR3 of page tables that are not this kernel's.
pub(crate) const OTHER_TABLES: u64 = 0xbad_0000;
/// `THREAD_SIZE` and `IRQ_STACK_SIZE`.
pub(crate) const STACK_BYTES: u64 = 16384;

/// ORC entries as Linux 6.12 has them: see [`super::orc`].
pub(crate) mod entry {
    /// The caller is at SP + 8: the first instruction of every function.
    pub const CALL_8: [u8; 6] = [0x08, 0, 0, 0, 0x05, 0x02];
    /// The caller is at SP + 16, its BP at its SP - 16.
    pub const CALL_16_BP: [u8; 6] = [0x10, 0, 0xf0, 0xff, 0x15, 0x02];
    /// All registers are at SP.
    pub const REGS: [u8; 6] = [0, 0, 0, 0, 0x05, 0x0b];
    /// The words that the CPU pushes are at SP.
    pub const IRET: [u8; 6] = [0, 0, 0, 0, 0x05, 0x0c];
    /// The word at SP is the caller's SP, plus 8.
    pub const SWITCH: [u8; 6] = [0x08, 0, 0, 0, 0x09, 0x02];
    /// The caller is at BP + 16; its BP was saved below.
    pub const FRAME_POINTER: [u8; 6] = [0x10, 0, 0xf0, 0xff, 0x14, 0x02];
    /// R10 holds the caller's SP.
    pub const BY_R10: [u8; 6] = [0, 0, 0, 0, 0x06, 0x02];
    /// The end of the stack.
    pub const END: [u8; 6] = [0, 0, 0, 0, 0, 0x01];
    /// The stack layout is unknown.
    pub const UNDEFINED: [u8; 6] = [0; 6];
}

/// The kernel.
pub(crate) struct Sample {
    memory: RefCell<BTreeMap<u64, Vec<u8>>>,
    symbols: Vec<(&'static str, Range<u64>)>,
    btf: Btf,
    pub offsets: Vec<u64>,
}

impl Sample {
    /// A kernel with these functions, one after another from [`TEXT`] on, with one ORC entry each. The functions that show the register
    /// numbering follow.
    pub fn new(functions: &[(&'static str, [u8; 6])]) -> Self {
        let mut types = Builder::new();
        basic_types(&mut types);
        Self::with_types(functions, &types)
    }

    /// A kernel with these functions and types.
    pub fn with_types(functions: &[(&'static str, [u8; 6])], types: &Builder) -> Self {
        let probes = ["schedule", "vfs_read", "kfree"].map(|name| (name, entry::CALL_8));
        let all: Vec<_> = functions.iter().copied().chain(probes).collect();
        let btf = Btf::parse(types.bytes()).unwrap();
        let mut sample = Self {
            memory: RefCell::default(),
            symbols: Vec::new(),
            btf,
            offsets: Vec::new(),
        };
        let (mut ips, mut entries) = (Vec::new(), Vec::new());
        for (index, &(name, entry)) in all.iter().enumerate() {
            let (start, index) = (TEXT + 0x100 * index as u64, index as u64);
            sample.symbols.push((name, start..start + 0x100));
            let distance = start.wrapping_sub(IPS + 4 * index) as i64;
            ips.extend((distance as i32).to_le_bytes());
            entries.extend(entry);
        }
        for (name, at) in [
            ("_text", TEXT),
            ("_stext", TEXT),
            ("_etext", TEXT_END),
            ("_end", IMAGE_END),
            ("__start_orc_unwind_ip", IPS),
            ("__stop_orc_unwind_ip", IPS + ips.len() as u64),
            ("__start_orc_unwind", ENTRIES),
            ("__stop_orc_unwind", ENTRIES + entries.len() as u64),
        ] {
            sample.set_symbol(name, at);
        }
        sample.put(IPS, &ips);
        sample.put(ENTRIES, &entries);
        sample
    }

    pub fn set_symbol(&mut self, name: &'static str, at: u64) {
        self.symbols.push((name, at..at + 8));
    }

    /// Puts bytes into memory, in place of earlier ones at the same address.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        let mut memory = self.memory.borrow_mut();
        if let Some((start, region)) = memory.range_mut(..=at).next_back() {
            let from = (at - start) as usize;
            if let Some(there) = region.get_mut(from..from + bytes.len()) {
                there.copy_from_slice(bytes);
                return;
            }
        }
        memory.insert(at, bytes.to_vec());
    }

    pub fn put_words(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put(at, &bytes);
    }
}

/// Offsets in the sample's `struct task_struct`, in bytes.
pub(crate) mod task {
    pub const STATE: u64 = 0;
    pub const ON_CPU: u64 = 4;
    pub const STACK: u64 = 8;
    pub const TASKS: u64 = 16;
    pub const THREAD_NODE: u64 = 32;
    pub const SIGNAL: u64 = 48;
    pub const PID: u64 = 56;
    pub const SWITCHES: u64 = 64;
    pub const START_TIME: u64 = 80;
    pub const COMM: u64 = 88;
    pub const SP: u64 = 104;
    pub const RET_INDEX: u64 = 112;
    pub const RET_STACK: u64 = 120;
    pub const RETHOOKS: u64 = 128;
    pub const BYTES: u64 = 136;
}

/// The types that the unwinder and the task list need, as 6.12 has them. Structures have only the members in use.
pub(crate) fn basic_types(b: &mut Builder) {
    let long = b.int("long unsigned int", 8);
    let (bits, byte) = (b.int("unsigned int", 4), b.int("char", 1));
    orc_types(b);
    words(
        b,
        "pt_regs",
        &[
            "r15", "r14", "r13", "r12", "bp", "bx", "r11", "r10", "r9", "r8", "ax", "cx", "dx", "si", "di", "orig_ax",
            "ip", "cs", "flags", "sp", "ss",
        ],
    );
    words(
        b,
        "inactive_task_frame",
        &["r15", "r14", "r13", "r12", "bx", "bp", "ret_addr"],
    );
    words(b, "vm_struct", &["next", "addr"]);
    words(b, "rq", &["curr", "idle", "nr_switches"]);
    words(b, "ftrace_ret_stack", &["ret", "func", "retp"]);
    words(b, "rethook_node", &["llist", "ret_addr", "frame"]);
    let list = words(b, "list_head", &["next", "prev"]);
    let thread = words(b, "thread_struct", &["sp"]);
    let llist = words(b, "llist_head", &["first"]);
    b.composite("signal_struct", STRUCT, 16, &[("thread_head", list, 0)]);
    let (comm, stack) = (b.array(byte, 16), b.array(byte, STACK_BYTES as u32));
    b.composite("irq_stack", STRUCT, STACK_BYTES as u32, &[("stack", stack, 0)]);
    let exception = b.array(byte, 4096);
    let stacks = b.composite(
        "cea_exception_stacks",
        STRUCT,
        8192,
        &[("NMI_stack", exception, 4096 * 8)],
    );
    let page = b.composite("entry_stack_page", STRUCT, 4096, &[("stack", exception, 0)]);
    b.composite(
        "cpu_entry_area",
        STRUCT,
        16384,
        &[("entry_stack_page", page, 0), ("estacks", stacks, 8192 * 8)],
    );
    let ret_stack = b.pointer(long);
    let bit = |offset: u64| offset as u32 * 8;
    b.composite(
        "task_struct",
        STRUCT,
        task::BYTES as u32,
        &[
            ("__state", bits, bit(task::STATE)),
            ("on_cpu", bits, bit(task::ON_CPU)),
            ("stack", long, bit(task::STACK)),
            ("tasks", list, bit(task::TASKS)),
            ("thread_node", list, bit(task::THREAD_NODE)),
            ("signal", long, bit(task::SIGNAL)),
            ("pid", bits, bit(task::PID)),
            ("tgid", bits, bit(task::PID + 4)),
            ("nvcsw", long, bit(task::SWITCHES)),
            ("nivcsw", long, bit(task::SWITCHES + 8)),
            ("start_time", long, bit(task::START_TIME)),
            ("comm", comm, bit(task::COMM)),
            ("thread", thread, bit(task::SP)),
            ("curr_ret_stack", bits, bit(task::RET_INDEX)),
            ("ret_stack", ret_stack, bit(task::RET_STACK)),
            ("rethooks", llist, bit(task::RETHOOKS)),
        ],
    );
}

/// `struct orc_entry` as since 6.4.
pub(crate) fn orc_types(b: &mut Builder) {
    let (short, bits) = (b.int("short int", 2), b.int("unsigned int", 4));
    b.composite(
        "orc_entry",
        STRUCT | KIND_FLAG,
        6,
        &[
            ("sp_offset", short, 0),
            ("bp_offset", short, 16),
            ("sp_reg", bits, 4 << 24 | 32),
            ("bp_reg", bits, 4 << 24 | 36),
            ("type", bits, 3 << 24 | 40),
            ("signal", bits, 1 << 24 | 43),
        ],
    );
}

/// Adds a structure of words.
fn words(b: &mut Builder, name: &str, members: &[&str]) -> u32 {
    // The first type is an unsigned long.
    let members: Vec<_> = members
        .iter()
        .enumerate()
        .map(|(index, name)| (*name, 1, 64 * index as u32))
        .collect();
    b.composite(name, STRUCT, 8 * members.len() as u32, &members)
}

impl VirtMemory for Sample {
    fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError> {
        let not_mapped = MemoryError::NotMapped { at, level: 1, entry: 0 };
        let memory = self.memory.borrow();
        let (start, region) = memory.range(..=at.0).next_back().ok_or(not_mapped.clone())?;
        let from = (at.0 - start) as usize;
        let bytes = region.get(from..from.saturating_add(buf.len())).ok_or(not_mapped)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

impl KernelView for Sample {
    fn btf(&self) -> &Btf {
        &self.btf
    }

    fn symbol(&self, name: &str) -> Option<Gva> {
        self.symbol_range(name).map(|range| range.start)
    }

    fn symbol_range(&self, name: &str) -> Option<Range<Gva>> {
        let (_, range) = self.symbols.iter().find(|(symbol, _)| *symbol == name)?;
        Some(Gva(range.start)..Gva(range.end))
    }

    fn per_cpu_offsets(&self) -> &[u64] {
        &self.offsets
    }

    fn physical(&self, at: Gva) -> Option<Gpa> {
        Some(Gpa(at.0))
    }

    fn seen_by_vcpu(&self, cr3: u64, _cr4: u64, at: Gva) -> Option<Gpa> {
        (cr3 != OTHER_TABLES).then_some(Gpa(at.0))
    }

    /// Pages are mapped whose memory is in one range of the sample.
    fn visit_small_tables(
        &self,
        range: &Range<Gva>,
        _tables_max: usize,
        visit: &mut SmallTableVisitor<'_>,
    ) -> Result<bool, MemoryError> {
        let mut tables: BTreeMap<u64, Vec<Option<Gpa>>> = BTreeMap::new();
        for (&start, bytes) in self.memory.borrow().range(range.start.0..range.end.0) {
            for at in (start..start + bytes.len() as u64).step_by(PAGE_SIZE as usize) {
                let table = tables.entry(at & !(PMD_SIZE - 1)).or_insert_with(|| vec![None; 512]);
                table[(at % PMD_SIZE / PAGE_SIZE) as usize] = Some(Gpa(at));
            }
        }
        tables.iter().for_each(|(&at, pages)| visit(Gva(at), pages));
        Ok(true)
    }

    fn read_physical(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        VirtMemory::read(self, Gva(at.0), buf)
    }
}
