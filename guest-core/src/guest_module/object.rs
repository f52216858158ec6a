//! Fills a `struct module`, and the symbol tables that it points at.

use super::layout::{ALIGN, Covers, Layout, SYMBOL_BYTES};
use crate::addr::Gva;
use crate::btf::{Btf, Struct};
use crate::kernel::KernelError;
use crate::kernel::modules::GuestModule;
use crate::module::{Bases, PlacedSymbol, Table};
use crate::paging::PAGE_SIZE;
use std::ops::Range;

/// Bit of `module.taints` for code that does not come with the kernel, and for livepatches: `TAINT_OOT_MODULE` and
/// `TAINT_LIVEPATCH` (include/linux/panic.h; the numbers are ABI, Documentation/admin-guide/tainted-kernels.rst).
const TAINT_OUT_OF_TREE: u64 = 1 << 12;
const TAINT_LIVEPATCH: u64 = 1 << 15;
/// `module.refcnt` of a module with one user: `MODULE_REF_BASE` (kernel/module/main.c) and one.
pub(super) const REFERENCES: u32 = 2;
/// The section index of a symbol that belongs to no section of the file: `SHN_ABS`.
const ABSOLUTE: u16 = 0xfff1;
/// Types of an ELF symbol: `STT_OBJECT`, `STT_FUNC`.
const OBJECT: u8 = 1;
const FUNCTION: u8 = 2;
/// Longest symbol name that the oldest kernels accept, in bytes with the NUL (`KSYM_NAME_LEN` up to 6.0).
const NAME_BYTES_MAX: usize = 128;

/// A linked patch that is to be registered in the guest.
#[derive(Debug, Clone)]
pub struct Description<'a> {
    /// The module's name.
    pub name: &'a str,
    /// True where the module says that it comes with the kernel (`intree`).
    pub in_tree: bool,
    /// Guest-virtual addresses of its areas.
    pub bases: Bases,
    /// Sizes of its text, read-only data and data, in bytes.
    pub sizes: [u64; 3],
    /// Its ORC tables: guest-virtual addresses of the distances and of the entries, and the number of entries.
    pub orc: (Gva, Gva, u64),
    /// Its exception table.
    pub fixups: Table,
    /// Its table of WARNs and BUGs.
    pub bugs: Table,
    /// Its branches on static keys: guest-virtual address of the table, and its number of rows.
    pub jumps: (Gva, u64),
    /// The per-CPU pointer to its variables on each CPU; `None` where it has none.
    pub per_cpu: Option<Gva>,
    /// Modules of the guest that it uses or patches: they must stay loaded.
    pub uses: &'a [GuestModule],
    /// Guest-virtual addresses of its functions' ftrace sites, in ascending order.
    pub sites: &'a [Gva],
    /// Its symbols.
    pub symbols: Vec<PlacedSymbol<'a>>,
}

impl Description<'_> {
    /// The guest-virtual address range of an area, in whole pages.
    pub(super) fn range(&self, covers: Covers) -> Range<Gva> {
        let area = |base: Gva, size: u64| base..base.wrapping_add(size.next_multiple_of(PAGE_SIZE));
        let [text, rodata, data] = self.sizes;
        match covers {
            Covers::Text => area(self.bases.text, text),
            Covers::RoData => area(self.bases.rodata, rodata),
            Covers::Data => area(self.bases.data, data),
            Covers::All => self.bases.text..area(self.bases.data, data).end,
        }
    }
}

/// The symbol tables of a module in memory: ELF symbols, their names, and a type letter for each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Symbols {
    pub bytes: Vec<u8>,
    pub count: u64,
    /// Offsets of names and letters.
    pub names: u64,
    pub letters: u64,
}

impl Symbols {
    /// Size of the tables for these symbols, in bytes.
    pub fn len(symbols: &[PlacedSymbol<'_>]) -> u64 {
        // The first symbol is the null symbol, and the first name is empty.
        let count = symbols.len() as u64 + 1;
        let names: usize = symbols.iter().map(|symbol| short(symbol.name).len() + 1).sum();
        count * SYMBOL_BYTES + (1 + names as u64) + count
    }

    /// Writes the tables.
    pub fn of(description: &Description<'_>) -> Self {
        use crate::module::AreaKind;
        let (mut table, mut names, mut letters) = (vec![0; SYMBOL_BYTES as usize], vec![0], vec![b'?']);
        for symbol in &description.symbols {
            let (base, letter) = match symbol.area {
                AreaKind::Text => (description.bases.text, b't'),
                AreaKind::RoData => (description.bases.rodata, b'r'),
                AreaKind::Data => (description.bases.data, b'd'),
                AreaKind::PerCpu | AreaKind::Scratch => continue,
            };
            let kind = if symbol.is_function { FUNCTION } else { OBJECT };
            let at = u32::try_from(names.len()).unwrap_or(0);
            table.extend(at.to_le_bytes());
            table.extend([kind, 0]);
            table.extend(ABSOLUTE.to_le_bytes());
            table.extend(base.wrapping_add(symbol.offset).0.to_le_bytes());
            table.extend(symbol.size.to_le_bytes());
            names.extend(short(symbol.name));
            names.push(0);
            letters.push(letter);
        }
        let count = letters.len() as u64;
        let (names_at, letters_at) = (table.len() as u64, (table.len() + names.len()) as u64);
        Self {
            bytes: [table, names, letters].concat(),
            count,
            names: names_at,
            letters: letters_at,
        }
    }
}

/// The name, cut to what every kernel's buffers hold.
fn short(name: &str) -> &[u8] {
    let bytes = name.as_bytes();
    bytes.get(..NAME_BYTES_MAX - 1).unwrap_or(bytes)
}

/// A structure of the kernel that is being filled.
struct Object<'b> {
    layout: Struct<'b>,
    bytes: Vec<u8>,
}

impl<'b> Object<'b> {
    fn new(btf: &'b Btf, name: &str) -> Result<Self, KernelError> {
        let layout = btf.structure(name)?;
        let bytes = vec![0; usize::try_from(layout.size()).unwrap_or(0)];
        Ok(Self { layout, bytes })
    }

    /// Sets a member of up to 8 bytes.
    fn put(&mut self, path: &str, value: u64) -> Result<(), KernelError> {
        let member = self.layout.member(path)?;
        let len = usize::try_from(member.size.min(8)).unwrap_or(0);
        self.put_bytes(path, value.to_le_bytes().get(..len).unwrap_or_default())
    }

    /// Sets a member if this kernel has it.
    fn put_if_there(&mut self, path: &str, value: u64) -> Result<(), KernelError> {
        match self.layout.try_member(path) {
            Some(_) => self.put(path, value),
            None => Ok(()),
        }
    }

    fn put_bytes(&mut self, path: &str, value: &[u8]) -> Result<(), KernelError> {
        let start = usize::try_from(self.layout.offset(path)?).unwrap_or(usize::MAX);
        let slot = self.bytes.get_mut(start..start.saturating_add(value.len()));
        let slot =
            slot.ok_or_else(|| super::words::damaged(format!("{path} past its end"), "a member of struct module"))?;
        slot.copy_from_slice(value);
        Ok(())
    }
}

/// Fills the `struct module` for the address `at`, and behind it the `struct module_use` that keeps it loaded. `symbols` will be at
/// `symbols_at`. The list and tree nodes are still zero.
pub(super) fn module(
    btf: &Btf,
    layout: &Layout,
    at: Gva,
    description: &Description<'_>,
    (symbols_at, symbols): (Gva, &Symbols),
) -> Result<Vec<u8>, KernelError> {
    let mut module = Object::new(btf, "module")?;
    module.put("state", btf.enumerator("MODULE_STATE_LIVE")?.cast_unsigned())?;
    let space = usize::try_from(module.layout.member("name")?.size).unwrap_or(0);
    if description.name.len() >= space {
        return Err(super::words::damaged(
            format!("the name {} of {} bytes", description.name, description.name.len()),
            &format!("less than {space}"),
        ));
    }
    module.put_bytes("name", description.name.as_bytes())?;
    for memory in &layout.memories {
        let range = description.range(memory.covers);
        let bytes = range.end.0.wrapping_sub(range.start.0);
        let path = |member: &str| format!("{}.{member}", memory.path);
        module.put(&path("base"), range.start.0)?;
        module.put(&path("size"), bytes)?;
        module.put(&path("mtn.mod"), at.0)?;
        if memory.covers == Covers::All {
            let fixed = description.bases.data.0.wrapping_sub(range.start.0);
            let text = description.bases.rodata.0.wrapping_sub(range.start.0);
            for (member, bytes) in [("text_size", text), ("ro_size", fixed), ("ro_after_init_size", fixed)] {
                module.put(&path(member), bytes)?;
            }
        }
    }
    let (ips, entries, count) = description.orc;
    if count != 0 {
        module.put("arch.orc_unwind_ip", ips.0)?;
        module.put("arch.orc_unwind", entries.0)?;
        module.put("arch.num_orcs", count)?;
    }
    module.put("extable", description.fixups.at.0)?;
    module.put("num_exentries", description.fixups.count)?;
    module.put("bug_table", description.bugs.at.0)?;
    module.put("num_bugs", description.bugs.count)?;
    let (jumps, count) = description.jumps;
    if count != 0 {
        module.put("jump_entries", jumps.0)?;
        module.put("num_jump_entries", count)?;
    }
    if let Some(at) = description.per_cpu {
        // The size says that it has them, and is written when it has (per_cpu).
        module.put("percpu", at.0)?;
    }
    let out_of_tree = if description.in_tree { 0 } else { TAINT_OUT_OF_TREE };
    module.put("taints", TAINT_LIVEPATCH | out_of_tree)?;
    module.put_if_there("klp", 1)?;
    module.put_if_there("mkobj.mod", at.0)?;
    // An empty list (include/linux/mutex.h); other forms of a free mutex are all zeroes (PREEMPT_RT; 7.1 and later).
    if let Some(waiters) = module.layout.try_member("param_lock.wait_list") {
        let head = at.wrapping_add(waiters.offset());
        module.put("param_lock.wait_list.next", head.0)?;
        module.put("param_lock.wait_list.prev", head.0)?;
    }
    let tables = at.wrapping_add(module.layout.offset("core_kallsyms")?);
    module.put("kallsyms", tables.0)?;
    module.put("core_kallsyms.symtab", symbols_at.0)?;
    module.put("core_kallsyms.num_symtab", symbols.count)?;
    module.put("core_kallsyms.strtab", symbols_at.wrapping_add(symbols.names).0)?;
    module.put_if_there("core_kallsyms.typetab", symbols_at.wrapping_add(symbols.letters).0)?;
    if layout.use_bytes == 0 {
        return Ok(module.bytes);
    }
    // The module is its own user: the kernel does not unload a module in use, not even by force.
    module.put("refcnt.counter", REFERENCES.into())?;
    let mut bytes = module.bytes;
    for target in std::iter::once(at).chain(description.uses.iter().map(|used| used.at)) {
        let mut used = Object::new(btf, "module_use")?;
        used.put("source", at.0)?;
        used.put("target", target.0)?;
        bytes.extend(used.bytes);
    }
    Ok(bytes)
}

/// Offset in the data area of what is appended to its `len` bytes.
pub(super) fn behind(len: u64) -> u64 {
    len.next_multiple_of(ALIGN)
}
