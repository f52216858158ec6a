//! Where everything that the guest knows of a module lies in this kernel.

use super::rb_tree::NodeLayout;
use super::traced::Groups;
use crate::addr::Gva;
use crate::btf::{Btf, BtfError, Struct};
use crate::kernel::{KernelError, Live};

/// Bytes of an `Elf64_Sym`.
pub(super) const SYMBOL_BYTES: u64 = 24;
/// Alignment of `struct module`: a cache line (`____cacheline_aligned`).
pub(super) const ALIGN: u64 = 64;
/// Longest `struct module`: some 1,400 bytes in 7.2.
const MODULE_BYTES_MAX: u64 = 16 << 10;
/// Bytes of `struct exception_table_entry` on x86, in all releases from 4.6 to 7.2.
const FIXUP_BYTES: u64 = 12;

/// A part of the module's memory, as the kernel tells them apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Memory {
    /// Path of its structure in `struct module`: `core_layout`, or one of `mem[]` (since 6.4).
    pub path: String,
    /// Which of our areas it covers.
    pub covers: Covers,
}

/// Areas of a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Covers {
    /// All three, in this order: text, read-only data, data.
    All,
    /// The text.
    Text,
    /// The read-only data.
    RoData,
    /// The data.
    Data,
}

/// Where a kernel keeps its modules, and how. The structures are in its BTF, and looked up when they are filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub(super) module_bytes: u64,
    /// 0 where modules can't be unloaded, so that they have no users.
    pub(super) use_bytes: u64,
    pub(super) bug_bytes: u64,
    /// None where the kernel has no ftrace.
    pub(super) groups: Option<Groups>,
    /// Heads of the lists: of modules, and of modules that may have BUGs.
    pub(super) modules: Gva,
    pub(super) bugs: Gva,
    pub(super) memories: Vec<Memory>,
    pub(super) node: NodeLayout,
    /// In the structure of a part of memory: where its base and its size are, and its nodes in the two trees.
    pub(super) base: u64,
    pub(super) size: u64,
    pub(super) nodes: [u64; 2],
    /// Address of the words that hold the roots of the two trees.
    pub(super) roots: [Gva; 2],
    /// Address of the 32-bit sequence number that tells which of the trees is not being changed.
    pub(super) sequence: Gva,
    /// Addresses of the lowest and the highest address of all modules.
    pub(super) bounds: [Gva; 2],
}

impl Layout {
    /// Looks everything up; `None` for a kernel that was built without modules. Error: a kernel that keeps them differently.
    pub fn find(live: &Live<'_>) -> Result<Option<Self>, KernelError> {
        let Some(modules) = live.kernel.symbols.unique("modules") else {
            return Ok(None);
        };
        let btf = &live.kernel.btf;
        let module = btf.structure("module")?;
        let tree = live.kernel.symbol("mod_tree")?;
        let root = btf.structure("mod_tree_root")?;
        let (part, memories) = memories(btf, &module)?;
        let in_root = |path: &str| Ok::<_, BtfError>(tree.wrapping_add(root.offset(path)?));
        let sequence = root
            .try_member("root.seq.seqcount.sequence")
            .map_or_else(|| root.member("root.seq.sequence"), Ok)?;
        let fixup_bytes = btf.structure("exception_table_entry")?.size();
        if module.size() > MODULE_BYTES_MAX || fixup_bytes != FIXUP_BYTES {
            return Err(KernelError::Disagrees {
                what: "struct module and struct exception_table_entry",
                found: format!("{} and {fixup_bytes} bytes", module.size()),
                expected: format!("at most {MODULE_BYTES_MAX}, and {FIXUP_BYTES}"),
            });
        }
        Ok(Some(Self {
            module_bytes: module.size(),
            use_bytes: match module.try_member("source_list") {
                Some(_) => btf.structure("module_use")?.size(),
                None => 0,
            },
            bug_bytes: btf.structure("bug_entry")?.size(),
            groups: Groups::find(live)?,
            modules,
            bugs: live.kernel.symbol("module_bug_list")?,
            memories,
            node: NodeLayout::find(btf)?,
            base: part.offset("base")?,
            size: part.offset("size")?,
            nodes: [part.offset("mtn.node.node[0]")?, part.offset("mtn.node.node[1]")?],
            roots: [in_root("root.tree[0].rb_node")?, in_root("root.tree[1].rb_node")?],
            sequence: tree.wrapping_add(sequence.offset()),
            bounds: [in_root("addr_min")?, in_root("addr_max")?],
        }))
    }

    /// Bytes of the objects that a patch has in its data, aligned to [`ALIGN`].
    pub(super) fn object_bytes(&self, uses: usize, sites: usize) -> u64 {
        self.group_at(Gva(0), uses)
            .0
            .saturating_add(self.groups.map_or(0, |groups| groups.bytes(sites)))
    }

    /// Where the records of the sites of the module at `at` are, that uses `uses` other modules.
    pub(super) fn group_at(&self, at: Gva, uses: usize) -> Gva {
        Gva(self.use_at(at, uses.saturating_add(1)).0.next_multiple_of(8))
    }

    /// Where the `struct module_use` of the module at `at` is that keeps itself loaded (0), or the other modules that it uses.
    pub(super) fn use_at(&self, at: Gva, index: usize) -> Gva {
        at.wrapping_add(self.module_bytes)
            .wrapping_add(self.use_bytes.saturating_mul(index as u64))
    }

    /// Bytes that a row of the table of BUGs has in this kernel.
    pub(super) fn bug_bytes(&self) -> u64 {
        self.bug_bytes
    }

    /// Bytes that a row of the table of fault fixups has.
    pub(super) fn fixup_bytes(&self) -> u64 {
        FIXUP_BYTES
    }
}

/// The structure that says where a part of a module's memory is, and those that a patch has.
fn memories<'a>(btf: &'a Btf, module: &Struct<'_>) -> Result<(Struct<'a>, Vec<Memory>), KernelError> {
    if module.try_member("mem").is_none() {
        let path = "core_layout".to_owned();
        let covers = Covers::All;
        return Ok((btf.structure("module_layout")?, vec![Memory { path, covers }]));
    }
    let kinds = [
        ("MOD_TEXT", Covers::Text),
        ("MOD_RODATA", Covers::RoData),
        ("MOD_DATA", Covers::Data),
    ];
    let mut memories = Vec::new();
    for (kind, covers) in kinds {
        let path = format!("mem[{}]", btf.enumerator(kind)?);
        memories.push(Memory { path, covers });
    }
    Ok((btf.structure("module_memory")?, memories))
}
