//! A whole guest: an image of 12 MiB where kernels are mapped, tables, two CPUs, and RAM behind it.
//!
//! | from the image's start | what |
//! |---|---|
//! | 0 | text, with functions from [`FUNCTIONS`] on, a cave at [`CAVE`], entry code at [`ENTRY`] |
//! | 4 MiB | read-only data: banner, types, exports, symbols |
//! | 6 MiB | data: page tables, interrupt table, words, lists |
//! | 12 MiB | end; the next 2 MiB of RAM are a heap in the direct map |

use super::kallsyms::{Release, Symbol, Tables, write};
use super::ram::Ram;
use super::{tasks, types};
use guest_core::{Gpa, Gva, Kernel, Registers};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock};

/// Where the image is mapped.
pub const IMAGE: u64 = 0xffff_ffff_9200_0000;
/// Where it lies.
pub const IMAGE_GPA: u64 = 0x20_0000;
/// First byte of the direct map.
pub const DIRECT: u64 = 0xffff_8880_0000_0000;
/// First byte of the vmalloc area; it maps the heap from [`VMALLOC_HEAP`] on, up to 32 pages, with a hole behind each four.
pub const VMALLOC: u64 = 0xffff_c900_0000_0000;
/// Where in the heap that lies.
pub const VMALLOC_HEAP: u64 = 0x1a_0000;
/// The page table of its first 2 MiB.
pub const VMALLOC_TABLE: u64 = DATA + 0xe000;
/// Bytes of RAM.
pub const RAM_BYTES: usize = 16 << 20;
/// Guest-physical start of what is not the image.
pub const HEAP_GPA: u64 = 0xe0_0000;
/// First function; each has 64 bytes.
pub const FUNCTIONS: u64 = IMAGE + 0x1000;
/// Number of functions that have nothing special.
pub const PLAIN: u64 = 1200;
/// One MiB of filler.
pub const CAVE: u64 = IMAGE + 0x10_0000;
/// Entry code, which user page tables map.
pub const ENTRY: u64 = IMAGE + 0x20_0000;
/// End of the text.
pub const ETEXT: u64 = IMAGE + 0x3f_f000;
/// Read-only data.
pub const RODATA: u64 = IMAGE + 0x40_0000;
/// Data.
pub const DATA: u64 = IMAGE + 0x60_0000;
/// End of the image.
pub const END: u64 = IMAGE + 0xc0_0000;
/// The banner; the release is its third word.
pub const BANNER: &str = "Linux version 6.1.0-made (somebody@somewhere) #1 SMP\n";
/// `uname -r` of it.
pub const RELEASE: &str = "6.1.0-made";
/// What modules must have been made for.
pub const VERMAGIC: &str = "6.1.0-made SMP preempt mod_unload modversions ";
/// What ftrace leaves in a site.
pub const SITE_NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The page directory of the last GiB, where modules and the fixmap are.
pub const FIXMAP_DIRECTORY: u64 = DATA + 0xf000;

const BTF: u64 = RODATA + 0x1000;
const EXPORTS: u64 = RODATA + 0x1_0000;
const ORC: u64 = RODATA + 0x3_0000;
const KALLSYMS: u64 = RODATA + 0x4_0000;
const TOP_TABLE: u64 = DATA;
const IDT: u64 = DATA + 0x8000;
const WORDS: u64 = DATA + 0x1_0000;
const LISTS: u64 = DATA + 0x2_0000;
const FTRACE: u64 = DATA + 0x4_0000;
const PERCPU: u64 = DATA + 0x20_0000;
const PERCPU_BYTES: u64 = 0x1_0000;

/// What can be chosen.
#[derive(Debug, Clone, Copy)]
pub struct Choice {
    /// The form of the symbol table.
    pub release: Release,
    /// Five levels of page tables instead of four.
    pub five_levels: bool,
    /// Page-table isolation, and vCPUs in user mode.
    pub isolated: bool,
    /// Mutexes as PREEMPT_RT makes them: of an rt_mutex.
    pub realtime: bool,
}

impl Default for Choice {
    fn default() -> Self {
        Self {
            release: Release::V6_1,
            five_levels: false,
            isolated: false,
            realtime: false,
        }
    }
}

/// The guest.
#[derive(Clone)]
pub struct Guest {
    pub ram: Ram,
    pub vcpus: Vec<Registers>,
    /// Address of each symbol that has one.
    pub at: Arc<BTreeMap<String, u64>>,
    /// The symbol table.
    pub tables: Arc<Tables>,
    /// Where it lies.
    pub tables_at: u64,
}

impl Guest {
    /// A sound guest with the usual choices.
    pub fn new() -> Self {
        static SOUND: OnceLock<Mutex<Guest>> = OnceLock::new();
        let sound = SOUND.get_or_init(|| Mutex::new(Self::with(Choice::default())));
        sound.lock().unwrap().clone()
    }

    /// A sound guest.
    pub fn with(choice: Choice) -> Self {
        Self::with_symbols(choice, |_| {})
    }

    /// A guest whose symbol table says something else than what is there.
    pub fn with_symbols(choice: Choice, change: impl FnOnce(&mut Vec<Symbol>)) -> Self {
        Build {
            bytes: vec![0; RAM_BYTES],
            symbols: Vec::new(),
            choice,
        }
        .guest(change)
    }

    /// Finds the kernel; panics where that fails.
    pub fn kernel(&self) -> Kernel {
        match Kernel::find(&self.ram, &self.vcpus) {
            Ok(kernel) => kernel,
            Err(error) => panic!(
                "{error}: {:?}",
                std::error::Error::source(&error).map(ToString::to_string)
            ),
        }
    }

    /// Guest-virtual address of a symbol.
    pub fn symbol(&self, name: &str) -> u64 {
        *self.at.get(name).unwrap_or_else(|| panic!("no symbol {name}"))
    }

    /// Stores bytes at a guest-virtual address of the image or the direct map.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.put(gpa(at), bytes);
    }

    /// Stores a word.
    pub fn put_u64(&self, at: u64, word: u64) {
        self.put(at, &word.to_le_bytes());
    }

    /// The word there.
    pub fn u64_at(&self, at: u64) -> u64 {
        self.ram.u64_at(gpa(at))
    }

    /// Bytes there.
    pub fn bytes_at(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        guest_core::PhysMemory::read(&self.ram, Gpa(gpa(at)), &mut bytes).unwrap();
        bytes
    }

    /// Makes `head` a `list_head` whose nodes are `nodes`.
    pub fn link(&self, head: u64, nodes: &[u64]) {
        let ring: Vec<u64> = std::iter::once(head).chain(nodes.iter().copied()).collect();
        for (index, &at) in ring.iter().enumerate() {
            self.put_u64(at, ring[(index + 1) % ring.len()]);
            self.put_u64(at + 8, ring[(index + ring.len() - 1) % ring.len()]);
        }
    }
}

/// The guest-physical address of one of the image or the direct map.
pub fn gpa(at: u64) -> u64 {
    if at >= IMAGE {
        at - IMAGE + IMAGE_GPA
    } else if at >= VMALLOC {
        at - VMALLOC + HEAP_GPA + VMALLOC_HEAP
    } else {
        at - DIRECT
    }
}

/// An address in the direct map, so many bytes into the heap.
pub const fn heap(offset: u64) -> u64 {
    DIRECT + HEAP_GPA + offset
}

struct Build {
    bytes: Vec<u8>,
    symbols: Vec<Symbol>,
    choice: Choice,
}

impl Build {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = gpa(at) as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_u64(&mut self, at: u64, word: u64) {
        self.put(at, &word.to_le_bytes());
    }

    fn name(&mut self, kind: char, name: &str, at: u64) {
        self.symbols.push((kind, name.to_owned(), at));
    }

    fn guest(mut self, change: impl FnOnce(&mut Vec<Symbol>)) -> Guest {
        self.text();
        self.read_only_data();
        self.words();
        self.per_cpu();
        self.ftrace();
        self.orc();
        let root = self.page_tables();
        self.interrupt_table();
        change(&mut self.symbols);
        let (tables, tables_at) = self.symbol_table();
        let at = self.symbols.iter().map(|(_, name, at)| (name.clone(), *at)).collect();
        let vcpus = (0..2).map(|cpu| self.vcpu(root, cpu)).collect();
        let mut guest = Guest {
            ram: Ram::new(self.bytes),
            vcpus,
            at: Arc::new(at),
            tables: Arc::new(tables),
            tables_at,
        };
        tasks::populate(&guest, 4);
        guest.ram.take_baseline();
        guest
    }

    fn text(&mut self) {
        for (name, at) in [("_text", IMAGE), ("_stext", IMAGE), ("_etext", ETEXT), ("_end", END)] {
            self.name('T', name, at);
        }
        let named = [
            "schedule",
            "vfs_read",
            "kfree",
            "victim",
            "twin",
            "twin",
            "victim.cold",
            "caller",
            "notrace_victim",
        ];
        for number in 0..PLAIN + named.len() as u64 {
            let at = FUNCTIONS + 64 * number;
            let name = named
                .get(number as usize)
                .map_or_else(|| format!("function_{number}"), |name| name.to_string());
            self.name('t', &name, at);
            if name == "notrace_victim" {
                self.put(at, &[0x55, 0x48, 0x89, 0xe5, 0x5d, 0xc3]);
            } else {
                self.put(at, &[0xf3, 0x0f, 0x1e, 0xfa]);
                self.put(at + 4, &SITE_NOP);
                self.put(at + 9, &[0x31, 0xc0, 0x55, 0x5d, 0x90, 0xc3]);
            }
        }
        let after = FUNCTIONS + 64 * (PLAIN + named.len() as u64);
        self.name('t', "tiny", after);
        self.name('t', "behind_tiny", after + 3);
        self.put(CAVE, &vec![0xcc; 0x10_0000]);
        self.name('T', "__entry_text_start", ENTRY);
        self.name('t', "asm_exc_divide_error", ENTRY + 0x100);
        self.name('T', "entry_SYSCALL_64", ENTRY + 0x180);
        self.name('T', "__entry_text_end", ENTRY + 0x1000);
    }

    fn read_only_data(&mut self) {
        self.name('R', "linux_banner", RODATA);
        self.put(RODATA, BANNER.as_bytes());
        self.name('r', "vermagic", RODATA + 0x400);
        self.put(RODATA + 0x400, VERMAGIC.as_bytes());
        let blob = types::blob(self.choice.realtime);
        self.put(BTF, &blob);
        self.name('R', "__start_BTF", BTF);
        self.name('R', "__stop_BTF", BTF + blob.len() as u64);
        self.exports();
        self.sites();
    }

    /// Two exported functions, sorted by name; values and names are at distances from themselves.
    fn exports(&mut self) {
        let exported = [("kfree", 2), ("schedule", 0), ("vfs_read", 1)];
        let strings = EXPORTS + 0x1000;
        self.name('R', "__start___ksymtab", EXPORTS);
        self.name('R', "__stop___ksymtab", EXPORTS + 12 * exported.len() as u64);
        for (index, (name, number)) in exported.into_iter().enumerate() {
            let (at, text) = (EXPORTS + 12 * index as u64, strings + 32 * index as u64);
            self.put(at, &((FUNCTIONS + 64 * number).wrapping_sub(at) as u32).to_le_bytes());
            self.put(at + 4, &((text - (at + 4)) as u32).to_le_bytes());
            self.put(text, name.as_bytes());
        }
    }

    /// A jump label and a static call in the functions 20 and 21, behind their ftrace sites.
    fn sites(&mut self) {
        let tables = [("__jump_table", 16, 20), ("static_call_sites", 8, 21)];
        for (index, (name, size, number)) in tables.into_iter().enumerate() {
            let at = EXPORTS + 0x2000 + 0x100 * index as u64;
            self.name('R', &format!("__start_{name}"), at);
            self.name('R', &format!("__stop_{name}"), at + size);
            self.put(
                at,
                &((FUNCTIONS + 64 * number + 11).wrapping_sub(at) as u32).to_le_bytes(),
            );
        }
    }

    fn words(&mut self) {
        let text = format!("OSRELEASE={RELEASE}\nPAGESIZE=4096\nSYMBOL(_stext)={IMAGE:x}\n");
        let words = [
            ("page_offset_base", DIRECT),
            ("vmalloc_base", VMALLOC),
            ("vmemmap_base", VMALLOC + (1 << 40)),
            ("nr_cpu_ids", 0xdead_0000_0000_0002),
            ("vmcoreinfo_data", WORDS + 0x1000),
            ("vmcoreinfo_size", text.len() as u64),
            ("total_forks", 3),
            ("nr_threads", 4),
            ("__cpu_online_mask", 3),
            ("ftrace_pages_start", FTRACE),
            ("ftrace_pages", FTRACE + 32),
            ("ftrace_ops_list", LISTS + 0x800),
            // an int: what is behind it is no part of it
            ("system_state", 0xdead_0000_0000_0003),
            ("klp_transition_patch", 0),
            ("klp_target_state", u64::MAX),
            ("klp_transition_work", 0),
        ];
        for (index, (name, word)) in words.into_iter().enumerate() {
            let at = WORDS + 16 * index as u64;
            self.name('D', name, at);
            self.put_u64(at, word);
            if name == "klp_target_state" {
                self.livepatch_code(at);
            }
        }
        self.put(WORDS + 0x1000, text.as_bytes());
        self.name('D', "ftrace_list_end", LISTS + 0x800);
        self.name('d', "mod_tree", LISTS + 0x900);
        self.put_u64(LISTS + 0x900 + 24, u64::MAX);
        for (index, name) in ["klp_patches", "modules", "module_bug_list"].into_iter().enumerate() {
            let at = LISTS + 16 * index as u64;
            self.name('d', name, at);
            self.put_u64(at, at);
            self.put_u64(at + 8, at);
        }
        let locks = [
            "text_mutex",
            "ftrace_lock",
            "module_mutex",
            "klp_mutex",
            "jump_label_mutex",
            "kprobe_mutex",
            "cpu_hotplug_lock",
            "pcpu_lock",
            "pcpu_alloc_mutex",
        ];
        for (index, name) in locks.into_iter().enumerate() {
            self.name('d', name, LISTS + 0x1000 + 0x100 * index as u64);
        }
        self.name('D', "init_task", tasks::INIT_TASK);
        self.name('d', "kprobe_table", LISTS + 0x2000);
        self.name('D', "boot_cpu_data", LISTS + 0x3000);
    }

    /// `klp_update_patch_state`, which clears flag 9 and stores the word at `target` in `patch_state`; and `copy_process`.
    fn livepatch_code(&mut self, target: u64) {
        let at = IMAGE + 0x800;
        self.name('T', "klp_update_patch_state", at);
        self.name('T', "copy_process", at + 0x100);
        let distance = target.wrapping_sub(at + 14) as u32;
        let code = [
            &[0xf0, 0x48, 0x0f, 0xba, 0x37, 9, 0x73, 0x0c, 0x8b, 5][..],
            &distance.to_le_bytes(),
            &[0x89, 0x87, 56, 0, 0, 0, 0xc3],
        ];
        self.put(at, &code.concat());
    }

    /// Per-CPU symbols are offsets in old kernels, addresses in newer ones.
    fn per_cpu(&mut self) {
        let old = matches!(self.choice.release, Release::V5_10 | Release::V6_1 | Release::V6_4);
        let (kind, base) = if old { ('A', 0) } else { ('d', PERCPU) };
        for (index, name) in ["runqueues", "pcpu_hot", "cea_exception_stacks"]
            .into_iter()
            .enumerate()
        {
            self.name(kind, name, base + 0x1000 + 0x400 * index as u64);
        }
        let table = WORDS + 0x2000;
        self.name('D', "__per_cpu_offset", table);
        for cpu in 0..2 {
            self.put_u64(table + 8 * cpu, per_cpu_area(cpu).wrapping_sub(base));
        }
        if !old {
            self.name('D', "__per_cpu_start", PERCPU);
        }
        self.per_cpu_reserve();
    }

    /// Two pages for modules' variables on each CPU, at the end of the areas; a quarter of the first page is the kernel's own.
    fn per_cpu_reserve(&mut self) {
        const UNITS: u64 = 2 * 1024;
        const USED: u64 = 256;
        let chunk = LISTS + 0x5000;
        let (map, bounds, blocks) = (chunk + 0x200, chunk + 0x400, chunk + 0x600);
        for (index, (name, word)) in [
            ("pcpu_reserved_chunk", chunk),
            ("pcpu_base_addr", per_cpu_area(0)),
            ("__cpu_possible_mask", 3),
        ]
        .into_iter()
        .enumerate()
        {
            let at = LISTS + 0x4000 + 16 * index as u64;
            self.name('D', name, at);
            self.put_u64(at, word);
        }
        let base = per_cpu_area(0) + PERCPU_BYTES - 0x2000;
        for (offset, word) in [
            (16, 4 * (UNITS - USED)),
            (64, bounds),
            (72, base),
            (80, map),
            (88, blocks),
            (96, 2 | 1 << 32),
        ] {
            self.put_u64(chunk + offset, word);
        }
        for word in 0..USED / 64 {
            self.put_u64(map + 8 * word, u64::MAX);
        }
        self.put_u64(bounds, 1);
        self.put_u64(bounds + USED / 8, 1);
        let mut hints = |at: u64, units: u64, used: u64| {
            let free = units - used;
            let words = [
                units | used << 32,
                free | if used == 0 { units << 32 } else { 0 },
                used | free << 32,
                0,
            ];
            for (index, word) in words.into_iter().enumerate() {
                self.put_u64(at + 8 * index as u64, word);
            }
        };
        hints(chunk + 24, UNITS, USED);
        hints(blocks, UNITS / 2, USED);
        hints(blocks + 40, UNITS / 2, 0);
    }

    /// Two groups with a record for every function but `notrace_victim` and the tiny ones.
    fn ftrace(&mut self) {
        let sites: Vec<u64> = (0..PLAIN + 9)
            .filter(|number| *number != 8)
            .map(|number| FUNCTIONS + 64 * number + 4)
            .collect();
        let (first, second) = sites.split_at(700);
        for (group, sites) in [first, second].into_iter().enumerate() {
            let at = FTRACE + 32 * group as u64;
            let records = FTRACE + 0x1000 + 0x8000 * group as u64;
            self.put_u64(at, if group == 0 { at + 32 } else { 0 });
            self.put_u64(at + 8, records);
            self.put_u64(at + 16, sites.len() as u64);
            for (index, site) in sites.iter().enumerate() {
                self.put_u64(records + 24 * index as u64, *site);
            }
        }
    }

    /// How to unwind: nothing is known before the functions, in the cave and behind the entry code; in functions the
    /// return address is on top of the stack; at the start of tasks, and in entry code, the stack ends.
    fn orc(&mut self) {
        const UNKNOWN: [u8; 6] = [0; 6];
        const CALL: [u8; 6] = [8, 0, 0, 0, 5, 2];
        const LAST: [u8; 6] = [0, 0, 0, 0, 0, 1];
        let functions = FUNCTIONS + 64 * (PLAIN + 9) + 64;
        let rules = [
            (IMAGE, UNKNOWN),
            (FUNCTIONS, CALL),
            (tasks::START, LAST),
            (tasks::START + 64, CALL),
            (functions, UNKNOWN),
            (ENTRY, LAST),
            (ENTRY + 0x1000, UNKNOWN),
        ];
        let (ips, entries) = (ORC, ORC + 0x1000);
        for (index, (at, rule)) in (0..).zip(rules) {
            self.put(
                ips + 4 * index,
                &(at.wrapping_sub(ips + 4 * index) as u32).to_le_bytes(),
            );
            self.put(entries + 6 * index, &rule);
        }
        let count = rules.len() as u64;
        for (name, at) in [
            ("__start_orc_unwind_ip", ips),
            ("__stop_orc_unwind_ip", ips + 4 * count),
            ("__start_orc_unwind", entries),
            ("__stop_orc_unwind", entries + 6 * count),
        ] {
            self.name('R', name, at);
        }
    }

    /// Gives the guest-physical address of the top table that vCPUs use.
    fn page_tables(&mut self) -> u64 {
        self.name('D', "init_top_pgt", TOP_TABLE);
        let user_half = 0x1000;
        for (user, top) in [(false, TOP_TABLE), (true, TOP_TABLE + user_half)] {
            let tables = DATA + if user { 0x5000 } else { 0x2000 };
            let (upper, middle, fourth) = (tables, tables + 0x1000, tables + 0x2000);
            let mut top = top;
            if self.choice.five_levels {
                self.put_u64(top + 511 * 8, gpa(fourth) | 0x63);
                top = fourth;
            }
            self.put_u64(top + 511 * 8, gpa(upper) | 0x63);
            self.put_u64(upper + 510 * 8, gpa(middle) | 0x63);
            self.put_u64(upper + 511 * 8, gpa(FIXMAP_DIRECTORY) | 0x67);
            self.map_vmalloc(top);
            let slot = |at: u64| middle + (at - 0xffff_ffff_8000_0000) / 0x20_0000 * 8;
            if user {
                self.map_user_pages(slot(ENTRY), slot(IDT));
                continue;
            }
            for part in 0..6 {
                let bits = [
                    0xa1,
                    0xa1,
                    1 << 63 | 0xa1,
                    1 << 63 | 0xe3,
                    1 << 63 | 0xe3,
                    1 << 63 | 0xe3,
                ][part as usize];
                let at = IMAGE + part * 0x20_0000;
                self.put_u64(slot(at), gpa(at) | bits);
            }
        }
        for slot in [506, 507] {
            self.put_u64(FIXMAP_DIRECTORY + 8 * slot, gpa(DATA + 0x9000) | 0x67);
        }
        gpa(TOP_TABLE) + if self.choice.isolated { user_half } else { 0 }
    }

    fn map_vmalloc(&mut self, top: u64) {
        let tables = DATA + 0xc000;
        self.put_u64(top + (VMALLOC >> 39 & 0x1ff) * 8, gpa(tables) | 0x63);
        self.put_u64(tables, gpa(tables + 0x1000) | 0x63);
        self.put_u64(tables + 0x1000, gpa(tables + 0x2000) | 0x63);
        for page in (0..32).filter(|page| page % 8 < 4) {
            let at = VMALLOC + 4096 * page;
            self.put_u64(tables + 0x2000 + 8 * page, gpa(at) | 1 << 63 | 0x63);
        }
    }

    /// User tables map one page of entry code and the interrupt table.
    fn map_user_pages(&mut self, entry_slot: u64, data_slot: u64) {
        let tables = DATA + 0xa000;
        self.put_u64(entry_slot, gpa(tables) | 0x63);
        self.put_u64(tables, gpa(ENTRY) | 0x161);
        self.put_u64(data_slot, gpa(tables + 0x1000) | 0x63);
        self.put_u64(tables + 0x1000 + (IDT - DATA) / 4096 * 8, gpa(IDT) | 1 << 63 | 0x161);
    }

    fn interrupt_table(&mut self) {
        let handler = ENTRY + 0x100;
        for gate in 0..32 {
            let low = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
            self.put_u64(IDT + 16 * gate, low);
            self.put_u64(IDT + 16 * gate + 8, handler >> 32);
        }
    }

    fn symbol_table(&mut self) -> (Tables, u64) {
        // as scripts/kallsyms.c sorts them: by address, else in the order in which they came
        self.symbols.sort_by_key(|symbol| symbol.2);
        let at = KALLSYMS + if self.choice.release == Release::V7_0 { 4 } else { 0 };
        let tables = write(self.choice.release, &self.symbols, Gva(at));
        self.put(at, &tables.bytes);
        (tables, at)
    }

    fn vcpu(&self, root: u64, cpu: u64) -> Registers {
        let old = matches!(self.choice.release, Release::V5_10 | Release::V6_1 | Release::V6_4);
        let base = per_cpu_area(cpu).wrapping_sub(if old { 0 } else { PERCPU });
        let (aside, active) = if self.choice.isolated {
            (base, 0x7f00_0000_0000)
        } else {
            (0, base)
        };
        Registers {
            rip: if self.choice.isolated { 0x40_1000 } else { FUNCTIONS + 4 },
            cs: if self.choice.isolated { 0x33 } else { 0x10 },
            cr0: 0x8005_0033,
            cr3: root | cpu,
            cr4: if self.choice.five_levels { 0x1020 } else { 0x20 },
            efer: 0xd01,
            gs_base: active,
            kernel_gs_base: Some(aside),
            idt_base: Some(IDT),
            general: [
                0,
                0,
                0,
                0,
                tasks::idle(cpu).stack + tasks::STACK - 0x200,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ],
            ..Registers::default()
        }
    }
}

/// A CPU's own copy of the per-CPU data.
pub const fn per_cpu_area(cpu: u64) -> u64 {
    PERCPU + PERCPU_BYTES * (1 + cpu)
}
