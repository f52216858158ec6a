//! What the guest knows of a patch: a module like any other, so that faults in its code are fixed up, WARN warns, and stacks
//! lead through it by name.
//!
//! In the order of use:
//! - [`Layout`]: how this kernel keeps its modules, from its BTF and symbols;
//! - [`Description`]: what there is to know of a patch that has been linked;
//! - [`Registration`]: the bytes of its `struct module` and tables, and the changes that let the guest find them;
//! - [`Known`]: what the registry keeps of that; [`Known::unregister`] gives the changes that make the guest forget it.
//!
//! The module is on the list of modules and in the tree that addresses are looked up in (kernel/module/main.c,
//! `add_unformed_module`; kernel/module/tree_lookup.c), and on the list that WARN and BUG are looked up in (lib/bug.c,
//! `module_bug_finalize`); its functions are in ftrace's chain of records. In sysfs it is not: that takes memory from the
//! guest's allocators. Nothing in the kernel asks a module for its kobject that has no parameters, no user in another
//! module, and is never unloaded; the last two are prevented by letting the module use itself.

mod layout;
mod list;
mod object;
mod rb_tree;
mod static_keys;
mod traced;
mod words;

#[cfg(test)]
mod tests;

pub use layout::Layout;
pub use object::Description;
pub use static_keys::{ListedKey, layout as jump_layout, list as list_at_keys, unlist};
pub use traced::Traced;

use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::modules::{self, GuestModule};
use crate::kernel::{KernelError, Live, ftrace};
use crate::memory::VirtMemory;
use crate::module::{PlacedSymbol, Table};
use crate::per_cpu::Piece;
use layout::Memory;
use object::Symbols;
use rb_tree::Tree;
use serde::{Deserialize, Serialize};
use words::{Words, damaged, unreadable};

/// What the changes of the tree are called.
const TREE: &str = "the guest's tree of modules";
/// What the changes of the lists are called.
const LISTS: &str = "the guest's lists of modules";
/// What the changes of ftrace's chain of records are called.
const RECORDS: &str = "the guest's chain of ftrace records";
/// More bytes than `module.name` has: 56 (`MODULE_NAME_LEN`), 256 in later kernels.
const NAME_BYTES_MAX: u64 = 256;
/// More modules than a patch uses.
const USES_MAX: usize = 4096;
/// Latches: each change of the tree counts twice (include/linux/rbtree_latch.h, `latch_tree_insert`).
const COUNTS: u32 = 2;

/// A patch as the registry of the guest's modules has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Guest-virtual address of its `struct module`.
    pub module: u64,
    /// The tree's sequence number before and after.
    pub sequence: [u32; 2],
    /// Lowest and highest address of all modules before the first patch.
    pub bounds: [u64; 2],
    /// The words of the tree that were changed.
    pub tree: Vec<Change>,
    /// How many modules of the guest it keeps loaded.
    #[serde(default)]
    pub uses: usize,
    /// The ftrace records of its functions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traced: Option<Traced>,
    /// Its variables on each CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_cpu: Option<Piece>,
    /// The static keys that its branches hang on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<ListedKey>,
}

/// What makes a patch known.
#[derive(Debug, Clone)]
pub struct Registration {
    /// Bytes of the `struct module`, to be laid at the end of the patch's data.
    pub module: Vec<u8>,
    /// Bytes of its symbol tables, to be laid at the end of its read-only data.
    pub symbols: Vec<u8>,
    /// The changes that link it. To be made in a pause, while nobody holds `module_mutex`.
    pub changes: Vec<Change>,
    /// What is to be kept of it.
    pub known: Known,
}

/// Room that being known takes behind a patch's own read-only data and data: where it begins, and the area's whole length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Offset of the symbol tables in the read-only data.
    pub symbols: u64,
    /// Bytes of the read-only data with them.
    pub rodata: u64,
    /// Offset of the `struct module` in the data.
    pub module: u64,
    /// Bytes of the data with it.
    pub data: u64,
}

impl Layout {
    /// The room behind `rodata` and `data` bytes of a patch's own, for one that uses `uses` modules of the guest and has `sites`
    /// ftrace sites.
    pub fn room(&self, symbols: &[PlacedSymbol<'_>], (uses, sites): (usize, usize), rodata: u64, data: u64) -> Room {
        let (tables, module) = (rodata.next_multiple_of(8), object::behind(data));
        Room {
            symbols: tables,
            rodata: tables.saturating_add(Symbols::len(symbols)),
            module,
            data: module.saturating_add(self.object_bytes(uses, sites)),
        }
    }

    /// Plans to let the guest know the module that `description` tells of, whose own parts are laid out with `room`.
    /// `others` are the patches that it knows already.
    pub fn register<'k>(
        &self,
        live: &Live<'_>,
        description: &Description<'_>,
        room: &Room,
        others: impl Iterator<Item = &'k Known>,
    ) -> Result<Registration, KernelError> {
        require_rows("__ex_table", &description.fixups, self.fixup_bytes())?;
        require_rows("__bug_table", &description.bugs, self.bug_bytes())?;
        let btf = &live.kernel.btf;
        let at = description.bases.data.wrapping_add(room.module);
        let symbols_at = description.bases.rodata.wrapping_add(room.symbols);
        let symbols = Symbols::of(description);
        let bytes = object::module(btf, self, at, description, (symbols_at, &symbols))?;
        let modules = live.that_changes_when(modules::CHANGING);
        let mut lists = Words::new(&modules, at, bytes);
        let in_module = |path: &str| Ok::<_, KernelError>(at.wrapping_add(btf.structure("module")?.offset(path)?));
        if self.use_bytes != 0 {
            self.use_modules(live, &mut lists, at, description.uses)?;
        }
        list::add_first(&mut lists, self.modules, in_module("list")?)?;
        list::add_first(&mut lists, self.bugs, in_module("bug_list")?)?;
        let (mut bytes, mut changes) = lists.finish(live, LISTS)?;
        let (traced, linked) = self.trace(live, at, &mut bytes, description)?;
        changes.extend(linked);

        let mut tree = Words::new(&modules, at, bytes);
        let mut inserted = 0;
        for memory in &self.memories {
            for (node, root_at) in self.nodes_of(live, at, memory)?.into_iter().zip(self.roots) {
                self.tree(&mut tree, root_at, node.1).insert(node.0)?;
            }
            inserted += COUNTS;
        }
        let bounds = [tree.get(self.bounds[0])?, tree.get(self.bounds[1])?];
        let ranges: Vec<_> = self
            .memories
            .iter()
            .map(|memory| description.range(memory.covers))
            .collect();
        let lowest = ranges.iter().map(|range| range.start.0).fold(bounds[0], u64::min);
        let highest = ranges.iter().map(|range| range.end.0).fold(bounds[1], u64::max);
        tree.set(self.bounds[0], lowest)?;
        tree.set(self.bounds[1], highest)?;
        let (module, tree) = tree.finish(live, TREE)?;
        changes.extend(tree.iter().cloned());
        let before = self.sequence(&modules)?;
        let sequence = [before, before.wrapping_add(inserted)];
        changes.push(self.sequence_change(live, sequence)?);
        let bounds = others.map(|other| other.bounds).next().unwrap_or(bounds);
        let known = Known {
            module: at.0,
            sequence,
            bounds,
            tree,
            uses: description.uses.len(),
            per_cpu: None,
            traced,
            keys: Vec::new(),
        };
        let symbols = symbols.bytes;
        Ok(Registration {
            module,
            symbols,
            changes,
            known,
        })
    }

    /// Adds the records of the module's ftrace sites to `bytes`, which are going to be at `at`, and to the guest's.
    fn trace(
        &self,
        live: &Live<'_>,
        at: Gva,
        bytes: &mut Vec<u8>,
        description: &Description<'_>,
    ) -> Result<(Option<Traced>, Vec<Change>), KernelError> {
        let (Some(groups), [_, ..]) = (self.groups, description.sites) else {
            return Ok((None, Vec::new()));
        };
        let (uses, sites) = (description.uses.len(), description.sites.len());
        let group = self.group_at(at, uses);
        bytes.resize(
            usize::try_from(self.object_bytes(uses, sites)).unwrap_or(bytes.len()),
            0,
        );
        let tracing = live.that_changes_when(ftrace::CHANGING);
        let mut words = Words::new(&tracing, at, std::mem::take(bytes));
        groups.add(live, &mut words, group, description.sites)?;
        let (filled, changes) = words.finish(live, RECORDS)?;
        *bytes = filled;
        let traced = Traced {
            group: group.0,
            sites: sites as u64,
        };
        Ok((Some(traced), changes))
    }

    /// Lets the module at `at` have itself as its only user, and be a user of others, which can't be unloaded then
    /// (kernel/module/main.c, `add_module_usage`, `delete_module`).
    fn use_modules(
        &self,
        live: &Live<'_>,
        words: &mut Words<'_>,
        at: Gva,
        others: &[GuestModule],
    ) -> Result<(), KernelError> {
        let btf = &live.kernel.btf;
        let (module, used) = (btf.structure("module")?, btf.structure("module_use")?);
        // Who uses it, and whom it uses.
        let lists = ["source_list", "target_list"];
        for list in lists {
            list::init(words, at.wrapping_add(module.offset(list)?))?;
        }
        for (index, target) in std::iter::once(at)
            .chain(others.iter().map(|other| other.at))
            .enumerate()
        {
            let one = self.use_at(at, index);
            for (list, head) in lists.into_iter().zip([target, at]) {
                let node = one.wrapping_add(used.offset(list)?);
                list::add_first(words, head.wrapping_add(module.offset(list)?), node)?;
            }
        }
        Ok(())
    }

    /// The two nodes of a part of the memory of the module at `at`, each with the distance to its key.
    fn nodes_of(&self, live: &Live<'_>, at: Gva, memory: &Memory) -> Result<[(Gva, i64); 2], KernelError> {
        let part = at.wrapping_add(live.kernel.btf.structure("module")?.offset(&memory.path)?);
        Ok(self
            .nodes
            .map(|node| (part.wrapping_add(node), self.base.wrapping_sub(node).cast_signed())))
    }

    fn tree<'w, 'a>(&self, words: &'w mut Words<'a>, root_at: Gva, key: i64) -> Tree<'w, 'a> {
        Tree {
            words,
            layout: self.node,
            root_at,
            key,
        }
    }

    fn sequence(&self, live: &Live<'_>) -> Result<u32, KernelError> {
        live.read_u32(self.sequence)
            .map_err(|source| unreadable(self.sequence, source))
    }

    fn sequence_change(&self, live: &Live<'_>, [old, new]: [u32; 2]) -> Result<Change, KernelError> {
        let (gpa, _) = live
            .physical(self.sequence)
            .map_err(|source| unreadable(self.sequence, source))?;
        let (old, new) = (old.to_le_bytes().into(), new.to_le_bytes().into());
        Ok(Change::replace(TREE, gpa, old, new).of_data())
    }
}

impl Known {
    /// The changes that make the guest forget the module, from whatever its lists and its tree are like now. To be made in a
    /// pause, while nobody holds `module_mutex`.
    pub fn unregister(&self, live: &Live<'_>, layout: &Layout) -> Result<Vec<Change>, KernelError> {
        let at = Gva(self.module);
        let module = live.kernel.btf.structure("module")?;
        let modules = live.that_changes_when(modules::CHANGING);
        let mut lists = Words::new(&modules, Gva(0), Vec::new());
        for node in ["list", "bug_list"] {
            list::remove(&mut lists, at.wrapping_add(module.offset(node)?))?;
        }
        for index in 1..=self.uses.min(USES_MAX) {
            let node = live.kernel.btf.structure("module_use")?.offset("source_list")?;
            list::remove(&mut lists, layout.use_at(at, index).wrapping_add(node))?;
        }
        let (_, mut changes) = lists.finish(live, LISTS)?;
        if let (Some(traced), Some(groups)) = (self.traced, layout.groups) {
            let tracing = live.that_changes_when(ftrace::CHANGING);
            let mut records = Words::new(&tracing, Gva(0), Vec::new());
            groups.remove(&mut records, Gva(traced.group))?;
            changes.extend(records.finish(live, RECORDS)?.1);
        }
        let sequence = layout.sequence(&modules)?;
        if self.sequence.contains(&sequence) {
            // Nobody has changed the tree since: every word of it is as it was before or after.
            for change in self.tree.iter().rev() {
                let foreign = |error: crate::change::ChangeError| damaged(error.to_string(), "the tree of modules");
                changes.extend(change.restoration(&modules, TREE).map_err(foreign)?);
            }
            if sequence != self.sequence[0] {
                changes.push(layout.sequence_change(live, [sequence, self.sequence[0]])?);
            }
            return Ok(changes);
        }
        let mut tree = Words::new(&modules, Gva(0), Vec::new());
        let mut after = sequence;
        for memory in &layout.memories {
            for ((node, key), root_at) in layout.nodes_of(live, at, memory)?.into_iter().zip(layout.roots) {
                layout.tree(&mut tree, root_at, key).remove(node)?;
            }
            after = after.wrapping_add(COUNTS);
        }
        self.narrow_bounds(&modules, layout, &mut tree)?;
        changes.extend(tree.finish(live, TREE)?.1);
        changes.push(layout.sequence_change(live, [sequence, after])?);
        Ok(changes)
    }

    /// Brings the bounds back to what they were before the first patch, as far as what is in the tree allows.
    fn narrow_bounds(&self, live: &Live<'_>, layout: &Layout, words: &mut Words<'_>) -> Result<(), KernelError> {
        let key = layout.base.wrapping_sub(layout.nodes[0]).cast_signed();
        let Some([first, last]) = layout.tree(words, layout.roots[0], key).ends()? else {
            words.set(layout.bounds[0], self.bounds[0])?;
            return words.set(layout.bounds[1], self.bounds[1]);
        };
        let size = layout.size.wrapping_sub(layout.nodes[0]).cast_signed();
        let base = |words: &Words<'_>, node: Gva| words.get(node.wrapping_offset(key));
        let lowest = base(words, first)?;
        let bytes = live
            .read_u32(last.wrapping_offset(size))
            .map_err(|source| unreadable(last, source))?;
        let highest = base(words, last)?.wrapping_add(bytes.into());
        words.set(layout.bounds[0], self.bounds[0].min(lowest))?;
        words.set(layout.bounds[1], self.bounds[1].max(highest))
    }

    /// The change that gives the module another name, as much of it as there is room for; none where it has that already. To be
    /// made in a pause, while nobody holds `module_mutex`.
    pub fn rename(&self, live: &Live<'_>, name: &str) -> Result<Option<Change>, KernelError> {
        let member = live.kernel.btf.structure("module")?.member("name")?;
        let at = Gva(self.module).wrapping_add(member.offset());
        let room = usize::try_from(member.size.min(NAME_BYTES_MAX)).unwrap_or(0);
        let mut now = vec![0; room];
        live.read(at, &mut now).map_err(|source| unreadable(at, source))?;
        let len = name.floor_char_boundary(room.saturating_sub(1));
        let mut new: Vec<u8> = name.bytes().take(len).collect();
        new.resize(room, 0);
        // The pages of a patch's data follow one another in the guest's memory.
        let (gpa, _) = live.physical(at).map_err(|source| unreadable(at, source))?;
        Ok((now != new).then(|| Change::replace("the name of the patch's module", gpa, now, new).of_data()))
    }

    /// The number of references to the module that nobody but vmpatch has taken; none where modules can't be unloaded, so that
    /// nobody counts.
    pub fn references(&self, live: &Live<'_>) -> Result<u32, KernelError> {
        let Some(member) = live.kernel.btf.structure("module")?.try_member("refcnt.counter") else {
            return Ok(0);
        };
        let at = Gva(self.module).wrapping_add(member.offset());
        let live = live.that_changes_when("using the patch's module");
        let count = live.read_u32(at).map_err(|source| unreadable(at, source))?;
        Ok(count.saturating_sub(object::REFERENCES))
    }
}

/// The sequence number of the guest's tree of modules, which goes on whenever a module comes or goes: what a plan reads of it first
/// holds for all that it reads of modules. `None` for a kernel without modules.
pub fn generation(live: &Live<'_>) -> Result<Option<u32>, KernelError> {
    let live = live.that_changes_when(modules::CHANGING);
    Layout::find(&live)?.map(|layout| layout.sequence(&live)).transpose()
}

/// The rows of a table must be as long as this kernel takes them for.
fn require_rows(name: &str, table: &Table, expected: u64) -> Result<(), KernelError> {
    if table.count == 0 || table.row_bytes == expected {
        return Ok(());
    }
    let found = format!("rows of {} bytes in {name}", table.row_bytes);
    Err(damaged(found, &format!("rows of {expected}")))
}
