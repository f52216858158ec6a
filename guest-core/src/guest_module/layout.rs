//! The layout of this kernel's `struct module` and of the lists and trees of modules.

use super::rb_tree::NodeLayout;
use super::traced::Groups;
use crate::addr::Gva;
use crate::btf::{Btf, BtfError, Struct};
use crate::kernel::{KernelError, Live};

/// Bytes of an `Elf64_Sym`.
pub(super) const SYMBOL_BYTES: u64 = 24;
/// Alignment of `struct module` in bytes: a cache line (`____cacheline_aligned`).
pub(super) const ALIGN: u64 = 64;
/// Largest `struct module` that is accepted, in bytes. It has some 1,400 bytes in 7.2.
const MODULE_BYTES_MAX: u64 = 16 << 10;
/// Size of `struct exception_table_entry` on x86 in bytes, in all releases from 4.6 to 7.2.
const FIXUP_BYTES: u64 = 12;

/// A part of a module's memory that the kernel describes on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Memory {
    /// Path of the description in `struct module`: `core_layout`, or an element of `mem[]` (since 6.4).
    pub path: String,
    /// The areas of the patch in this part.
    pub covers: Covers,
}

/// One or all areas of a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Covers {
    /// Text, read-only data and data, in this order.
    All,
    /// The text.
    Text,
    /// The read-only data.
    RoData,
    /// The data.
    Data,
}

/// Where and how a kernel keeps its modules. The members of structures are looked up in BTF when they are filled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub(super) module_bytes: u64,
    /// Size of `struct module_use`; 0 in kernels that cannot unload modules, which have no such lists.
    pub(super) use_bytes: u64,
    pub(super) bug_bytes: u64,
    /// `None` for a kernel without ftrace.
    pub(super) groups: Option<Groups>,
    /// Heads of two lists: of all modules, and of modules with a table of BUGs.
    pub(super) modules: Gva,
    pub(super) bugs: Gva,
    pub(super) memories: Vec<Memory>,
    pub(super) node: NodeLayout,
    /// Offsets in the description of a part of memory: base, size, and the nodes in the two trees.
    pub(super) base: u64,
    pub(super) size: u64,
    pub(super) nodes: [u64; 2],
    /// Guest-virtual addresses of the words that hold the roots of the two trees.
    pub(super) roots: [Gva; 2],
    /// Guest-virtual address of the 32-bit sequence number that tells which of the trees is not being changed.
    pub(super) sequence: Gva,
    /// Guest-virtual addresses of the words that hold the lowest and the highest address of all modules.
    pub(super) bounds: [Gva; 2],
}

impl Layout {
    /// Looks everything up; `None` for a kernel that was built without modules.
    ///
    /// # Errors
    ///
    /// The kernel keeps its modules in another way.
    pub fn find(live: &Live<'_>) -> Result<Option<Self>, KernelError> {
        let Some(modules) = live.kernel.symbol_of_feature("modules")? else {
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

    /// Size of the kernel objects in a patch's data in bytes, a multiple of [`ALIGN`].
    pub(super) fn object_bytes(&self, uses: usize, sites: usize) -> u64 {
        self.group_at(Gva(0), uses)
            .0
            .saturating_add(self.groups.map_or(0, |groups| groups.bytes(sites)))
    }

    /// Guest-virtual address of the ftrace records of the module at `at`, which uses `uses` other modules.
    pub(super) fn group_at(&self, at: Gva, uses: usize) -> Gva {
        Gva(self.use_at(at, uses.saturating_add(1)).0.next_multiple_of(8))
    }

    /// Guest-virtual address of a `struct module_use` of the module at `at`: index 0 keeps the module itself loaded, the others keep the
    /// modules that it uses.
    pub(super) fn use_at(&self, at: Gva, index: usize) -> Gva {
        at.wrapping_add(self.module_bytes)
            .wrapping_add(self.use_bytes.saturating_mul(index as u64))
    }

    /// Length of a row of the table of BUGs in this kernel, in bytes.
    pub(super) fn bug_bytes(&self) -> u64 {
        self.bug_bytes
    }

    /// Length of a row of the exception table, in bytes.
    pub(super) fn fixup_bytes(&self) -> u64 {
        FIXUP_BYTES
    }
}

/// The structure that describes a part of a module's memory, and the parts that a patch has.
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
