//! The type information of the made-up kernel: the structs that vmpatch asks for, with offsets of our own choosing.

use super::btf::{Builder, STRUCT};

/// A member: name, offset in bytes, type.
type Member = (&'static str, u32, Type);

/// Types that members have.
#[derive(Clone, Copy)]
enum Type {
    U8,
    U16,
    U32,
    I32,
    U64,
    /// An array of bytes.
    Bytes(u32),
    /// So many bits.
    Bits(u32),
    /// A pointer to a struct of an earlier row.
    Pointer(&'static str),
    /// A struct of an earlier row.
    Struct(&'static str),
    /// An array of one.
    Structs(&'static str, u32),
}
use Type::{Bits, Bytes, I32, Pointer, Struct, Structs, U8, U16, U32, U64};

/// Every struct: name, size in bytes, members.
const STRUCTS: &[(&str, u32, &[Member])] = &[
    ("list_head", 16, &[("next", 0, U64), ("prev", 8, U64)]),
    ("kernel_symbol", 12, &[("value_offset", 0, I32)]),
    (
        "ftrace_page",
        32,
        &[("next", 0, U64), ("records", 8, U64), ("index", 16, U32)],
    ),
    ("dyn_ftrace", 24, &[("ip", 0, U64), ("flags", 8, U64)]),
    ("klp_callbacks", 40, &[]),
    (
        "klp_func",
        152,
        &[
            ("old_name", 0, U64),
            ("new_func", 8, U64),
            ("old_sympos", 16, U64),
            ("old_func", 24, U64),
            ("node", 40, Struct("list_head")),
            ("nop", 72, U8),
            ("patched", 73, U8),
            ("transition", 74, U8),
        ],
    ),
    (
        "klp_object",
        168,
        &[
            ("name", 0, U64),
            ("funcs", 8, U64),
            ("callbacks", 16, Struct("klp_callbacks")),
            ("func_list", 56, Struct("list_head")),
            ("node", 72, Struct("list_head")),
        ],
    ),
    (
        "klp_patch",
        200,
        &[
            ("mod", 0, U64),
            ("objs", 8, U64),
            ("states", 16, U64),
            ("replace", 24, U8),
            ("list", 32, Struct("list_head")),
            ("obj_list", 48, Struct("list_head")),
        ],
    ),
    ("rt_mutex_base", 32, &[("owner", 24, U64)]),
    ("mutex", 32, &[("owner", 0, U64)]),
    ("percpu_rw_semaphore", 96, &[("block", 64, U32)]),
    ("kprobe", 120, &[("hlist", 0, U64), ("addr", 40, U64)]),
    ("jump_entry", 16, &[("code", 0, I32)]),
    ("static_call_site", 8, &[("addr", 0, I32)]),
    (
        "alt_instr",
        12,
        &[
            ("instr_offset", 0, I32),
            ("repl_offset", 4, I32),
            ("cpuid", 8, U16),
            ("instrlen", 10, U8),
            ("replacementlen", 11, U8),
        ],
    ),
    ("cpuinfo_x86", 256, &[("x86_capability", 32, Bytes(84))]),
    (
        "mod_kallsyms",
        32,
        &[("symtab", 0, U64), ("num_symtab", 8, U32), ("strtab", 16, U64)],
    ),
    (
        "rb_node",
        24,
        &[
            ("__rb_parent_color", 0, U64),
            ("rb_right", 8, U64),
            ("rb_left", 16, U64),
        ],
    ),
    ("rb_root", 8, &[("rb_node", 0, U64)]),
    ("latch_tree_node", 48, &[("node", 0, Structs("rb_node", 2))]),
    ("seqcount", 4, &[("sequence", 0, U32)]),
    ("seqcount_latch", 4, &[("seqcount", 0, Struct("seqcount"))]),
    (
        "latch_tree_root",
        24,
        &[("seq", 0, Struct("seqcount_latch")), ("tree", 8, Structs("rb_root", 2))],
    ),
    (
        "mod_tree_root",
        40,
        &[
            ("root", 0, Struct("latch_tree_root")),
            ("addr_min", 24, U64),
            ("addr_max", 32, U64),
        ],
    ),
    (
        "mod_tree_node",
        56,
        &[("mod", 0, U64), ("node", 8, Struct("latch_tree_node"))],
    ),
    (
        "module_memory",
        72,
        &[("base", 0, U64), ("size", 8, U32), ("mtn", 16, Struct("mod_tree_node"))],
    ),
    ("exception_table_entry", 12, &[("insn", 0, I32)]),
    ("bug_entry", 12, &[("bug_addr_disp", 0, I32)]),
    (
        "module_use",
        48,
        &[
            ("source_list", 0, Struct("list_head")),
            ("target_list", 16, Struct("list_head")),
            ("source", 32, U64),
            ("target", 40, U64),
        ],
    ),
    ("atomic_t", 4, &[("counter", 0, U32)]),
    (
        "mod_arch_specific",
        24,
        &[("num_orcs", 0, U32), ("orc_unwind_ip", 8, U64), ("orc_unwind", 16, U64)],
    ),
    (
        "module",
        1024,
        &[
            ("state", 0, U32),
            ("list", 8, Struct("list_head")),
            ("name", 24, Bytes(56)),
            ("num_exentries", 80, U32),
            ("extable", 88, U64),
            ("mem", 96, Structs("module_memory", 7)),
            ("arch", 600, Struct("mod_arch_specific")),
            ("taints", 624, U64),
            ("num_bugs", 632, U32),
            ("bug_list", 640, Struct("list_head")),
            ("bug_table", 656, U64),
            ("kallsyms", 664, U64),
            ("core_kallsyms", 672, Struct("mod_kallsyms")),
            ("source_list", 704, Struct("list_head")),
            ("target_list", 720, Struct("list_head")),
            ("refcnt", 736, Struct("atomic_t")),
            ("percpu", 744, U64),
            ("percpu_size", 752, U32),
            ("syms", 760, U64),
            ("crcs", 768, U64),
            ("num_syms", 776, U32),
            ("init", 784, U64),
        ],
    ),
    ("qspinlock", 8, &[("val", 4, Struct("atomic_t"))]),
    ("raw_spinlock", 24, &[("raw_lock", 8, Struct("qspinlock"))]),
    ("spinlock", 32, &[("rlock", 8, Struct("raw_spinlock"))]),
    (
        "pcpu_block_md",
        40,
        &[
            ("nr_bits", 0, U32),
            ("first_free", 4, U32),
            ("right_free", 8, U32),
            ("left_free", 12, U32),
            ("contig_hint_start", 16, U32),
            ("contig_hint", 20, U32),
            ("scan_hint_start", 24, U32),
            ("scan_hint", 28, U32),
        ],
    ),
    (
        "pcpu_chunk",
        192,
        &[
            ("free_bytes", 16, U32),
            ("chunk_md", 24, Struct("pcpu_block_md")),
            ("bound_map", 64, U64),
            ("base_addr", 72, U64),
            ("alloc_map", 80, U64),
            ("md_blocks", 88, U64),
            ("nr_pages", 96, U32),
            ("nr_empty_pop_pages", 100, U32),
        ],
    ),
    ("thread_struct", 64, &[("sp", 24, U64)]),
    ("thread_info", 16, &[("flags", 0, U64)]),
    ("llist_head", 8, &[("first", 0, U64)]),
    (
        "ftrace_ret_stack",
        32,
        &[("ret", 0, U64), ("func", 8, U64), ("retp", 24, U64)],
    ),
    (
        "rethook_node",
        48,
        &[("llist", 16, U64), ("ret_addr", 32, U64), ("frame", 40, U64)],
    ),
    (
        "task_struct",
        512,
        &[
            ("__state", 24, U32),
            ("stack", 32, U64),
            ("thread_info", 0, Struct("thread_info")),
            ("on_cpu", 52, U32),
            ("patch_state", 56, U32),
            ("tasks", 64, Struct("list_head")),
            ("pid", 80, U32),
            ("tgid", 84, U32),
            ("thread_node", 88, Struct("list_head")),
            ("signal", 104, U64),
            ("nvcsw", 112, U64),
            ("nivcsw", 120, U64),
            ("start_time", 128, U64),
            ("comm", 136, Bytes(16)),
            ("curr_ret_stack", 152, U32),
            ("ret_stack", 160, Pointer("ftrace_ret_stack")),
            ("rethooks", 168, Struct("llist_head")),
            ("thread", 256, Struct("thread_struct")),
        ],
    ),
    ("signal_struct", 128, &[("thread_head", 16, Struct("list_head"))]),
    ("inactive_task_frame", 56, &[("bp", 40, U64), ("ret_addr", 48, U64)]),
    ("irq_stack", 16384, &[]),
    (
        "cea_exception_stacks",
        0x4000,
        &[
            ("DF_stack", 0x1000, Bytes(0x1000)),
            ("NMI_stack", 0x3000, Bytes(0x1000)),
        ],
    ),
    ("entry_stack_page", 4096, &[("stack", 3584, Bytes(512))]),
    (
        "cpu_entry_area",
        0x8000,
        &[
            ("entry_stack_page", 0x1000, Struct("entry_stack_page")),
            ("estacks", 0x3000, Struct("cea_exception_stacks")),
        ],
    ),
    (
        "rq",
        256,
        &[("nr_switches", 16, U64), ("curr", 24, U64), ("idle", 32, U64)],
    ),
    (
        "pcpu_hot",
        64,
        &[("current_task", 0, U64), ("hardirq_stack_ptr", 32, U64)],
    ),
    (
        "pt_regs",
        168,
        &[
            ("r13", 16, U64),
            ("bp", 32, U64),
            ("r10", 56, U64),
            ("ax", 80, U64),
            ("dx", 96, U64),
            ("di", 112, U64),
            ("ip", 128, U64),
            ("cs", 136, U64),
            ("sp", 152, U64),
        ],
    ),
    (
        "ftrace_ops",
        128,
        &[
            ("flags", 8, U64),
            ("next", 16, U64),
            ("trampoline", 64, U64),
            ("trampoline_size", 72, U64),
            ("func_hash", 96, U64),
        ],
    ),
    (
        "ftrace_ops_hash",
        64,
        &[("notrace_hash", 0, U64), ("filter_hash", 8, U64)],
    ),
    (
        "ftrace_hash",
        32,
        &[("size_bits", 0, U64), ("buckets", 8, U64), ("count", 16, U64)],
    ),
    ("ftrace_func_entry", 32, &[("hlist", 0, U64), ("ip", 16, U64)]),
    (
        "ctl_table",
        64,
        &[("procname", 0, U64), ("data", 8, U64), ("mode", 20, U16)],
    ),
    ("ctl_node", 32, &[("node", 0, Struct("rb_node")), ("header", 24, U64)]),
    ("ctl_table_header", 80, &[("ctl_table", 0, U64), ("node", 64, U64)]),
    (
        "ctl_dir",
        96,
        &[
            ("header", 0, Struct("ctl_table_header")),
            ("root", 80, Struct("rb_root")),
        ],
    ),
    ("ctl_table_set", 104, &[("dir", 8, Struct("ctl_dir"))]),
    ("ctl_table_root", 128, &[("default_set", 0, Struct("ctl_table_set"))]),
];

/// `struct orc_entry` as since 6.4.
const ORC: [Member; 6] = [
    ("sp_offset", 0, U16),
    ("bp_offset", 2, U16),
    ("sp_reg", 32, Bits(4)),
    ("bp_reg", 36, Bits(4)),
    ("type", 40, Bits(3)),
    ("signal", 43, Bits(1)),
];

/// Values of enumerators.
const ENUMERATORS: &[(&str, u32)] = &[
    ("FTRACE_FL_ENABLED", 1 << 31),
    ("FTRACE_FL_DISABLED", 1 << 25),
    ("FTRACE_FL_IPMODIFY", 1 << 28),
    ("FTRACE_OPS_FL_SAVE_REGS", 1 << 2),
    ("MOD_TEXT", 0),
    ("MOD_DATA", 1),
    ("MOD_RODATA", 2),
    ("MOD_INIT_TEXT", 4),
    ("SYSTEM_RUNNING", 3),
    ("MODULE_STATE_LIVE", 0),
];

/// `struct mutex` with PREEMPT_RT.
const RT_MUTEX: (&str, u32, &[Member]) = ("mutex", 32, &[("rtmutex", 0, Struct("rt_mutex_base"))]);

/// The whole blob; with mutexes as PREEMPT_RT has them, or without.
pub fn blob(realtime: bool) -> Vec<u8> {
    let mut b = Builder::new();
    let basic = [
        b.int("u8", 1),
        b.int("u16", 2),
        b.int("u32", 4),
        b.int("s32", 4),
        b.int("u64", 8),
    ];
    let mut structs: Vec<(&str, u32)> = Vec::new();
    for &plain in STRUCTS {
        let (name, size, members) = if realtime && plain.0 == RT_MUTEX.0 {
            RT_MUTEX
        } else {
            plain
        };
        let members: Vec<_> = members
            .iter()
            .map(|&(member, offset, kind)| (member, number(&mut b, &basic, &structs, kind), offset * 8))
            .collect();
        structs.push((name, b.composite(name, STRUCT, size, &members)));
    }
    // offsets in bits here, with the width of a bit field in the high byte
    let members: Vec<_> = ORC
        .iter()
        .map(|&(member, offset, kind)| match kind {
            Bits(bits) => (member, basic[2], offset | bits << 24),
            kind => (member, number(&mut b, &basic, &structs, kind), offset * 8),
        })
        .collect();
    b.composite("orc_entry", STRUCT | super::btf::KIND_FLAG, 6, &members);
    b.enumeration("", false, ENUMERATORS);
    b.bytes()
}

fn number(b: &mut Builder, basic: &[u32; 5], structs: &[(&str, u32)], kind: Type) -> u32 {
    let named = |name| {
        structs
            .iter()
            .find(|known| known.0 == name)
            .expect("a struct that stands before")
            .1
    };
    match kind {
        U8 => basic[0],
        U16 => basic[1],
        U32 | Bits(_) => basic[2],
        I32 => basic[3],
        U64 => basic[4],
        Bytes(number) => b.array(basic[0], number),
        Pointer(name) => b.pointer(named(name)),
        Struct(name) => named(name),
        Structs(name, number) => b.array(named(name), number),
    }
}

/// Where in the blob the size of a struct is said.
pub fn size_at(blob: &[u8], name: &str) -> usize {
    let name = name_at(blob, name);
    let is_it = |at: &usize| word(blob, *at) == name && word(blob, at + 4) >> 24 & 0x1f == STRUCT;
    (24..blob.len() - 8)
        .step_by(4)
        .find(is_it)
        .expect("a struct of that name")
        + 8
}

/// Where in the blob the length of the array that the member `name` is, is said.
pub fn length_at(blob: &[u8], name: &str) -> usize {
    let name = name_at(blob, name);
    let member = (24..blob.len() - 8)
        .step_by(4)
        .find(|at| word(blob, *at) == name)
        .expect("a member of that name");
    let number = word(blob, member + 4);
    let mut at = 24;
    for _ in 1..number {
        let (kind, elements) = (word(blob, at + 4) >> 24 & 0x1f, (word(blob, at + 4) & 0xffff) as usize);
        at += 12
            + match kind {
                1 => 4,
                3 => 12,
                4 => 12 * elements,
                6 => 8 * elements,
                _ => 0,
            };
    }
    at + 20
}

fn name_at(blob: &[u8], name: &str) -> u32 {
    let strings = 24 + word(blob, 16) as usize;
    let name = [b"\0", name.as_bytes(), b"\0"].concat();
    let found = blob[strings..].windows(name.len()).position(|window| window == name);
    found.expect("a name in the blob") as u32 + 1
}

fn word(blob: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(blob[at..at + 4].try_into().unwrap())
}
