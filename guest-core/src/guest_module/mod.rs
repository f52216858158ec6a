//! Registers a patch as a module of the guest, like any other: the guest then fixes up faults in the patch's code, reports its WARNs, and
//! names its functions in stack traces.
//!
//! In the order of use:
//! - [`Layout`]: how this kernel keeps its modules, from its BTF and symbols;
//! - [`Description`]: the linked patch that is to be registered;
//! - [`PreparedModule`]: the bytes of its `struct module` and tables, and the changes that link them into the guest's lists;
//! - [`ModuleRegistration`]: what the registry keeps of that. [`ModuleRegistration::unregister`] undoes it.
//!
//! The module is on the list of modules and in the tree that addresses are looked up in (kernel/module/main.c,
//! `add_unformed_module`; kernel/module/tree_lookup.c), and on the list that WARN and BUG are looked up in (lib/bug.c,
//! `module_bug_finalize`); its functions are in ftrace's chain of records. It is not in sysfs, because that would take memory from the
//! guest's allocators. The kernel needs a module's kobject only for its parameters, for users in other modules, and to unload it. The
//! module has no parameters, and because it is its own user, the kernel neither unloads it nor adds other users.

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
use crate::per_cpu::Allocation;
use layout::Memory;
use object::Symbols;
use rb_tree::Tree;
use serde::{Deserialize, Serialize};
use std::ops::Range;
use words::{Words, damaged, unreadable};

/// Name of the changes of the tree, for errors.
const TREE: &str = "the guest's tree of modules";
/// Name of the changes of the lists, for errors.
const LISTS: &str = "the guest's lists of modules";
/// Name of the changes of ftrace's chain of records, for errors.
const RECORDS: &str = "the guest's chain of ftrace records";
/// Largest size of `module.name` in bytes. It is 56 (`MODULE_NAME_LEN`), and 256 in later kernels.
const NAME_BYTES_MAX: u64 = 256;
/// Most modules that a patch uses.
const USES_MAX: usize = 4096;
/// How much each change of the tree adds to its sequence number: it has two copies (include/linux/rbtree_latch.h, `latch_tree_insert`).
const COUNTS: u32 = 2;

/// What undoes the registration of a patch as a module of the guest. The patch's record keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModuleRegistration {
    /// Guest-virtual address of its `struct module`.
    pub module: u64,
    /// The tree's sequence number before and after the registration.
    pub sequence: [u32; 2],
    /// Lowest and highest guest-virtual address of all modules before the first patch.
    pub bounds: [u64; 2],
    /// The changes of the tree.
    pub tree: Vec<Change>,
    /// Number of the guest's modules that it uses, and so keeps loaded.
    #[serde(default)]
    pub uses: usize,
    /// The ftrace records of its functions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traced: Option<Traced>,
    /// Its per-CPU memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub per_cpu: Option<Allocation>,
    /// The static keys that list its branches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub keys: Vec<ListedKey>,
}

/// A patch that is ready to be registered.
#[derive(Debug, Clone)]
pub struct PreparedModule {
    /// Bytes of the `struct module`, for the end of the patch's data.
    pub module: Vec<u8>,
    /// Bytes of the symbol tables, for the end of its read-only data.
    pub symbols: Vec<u8>,
    /// The changes that link the module into the guest's lists. They must be made in a pause in which no task of the guest holds
    /// `module_mutex`.
    pub changes: Vec<Change>,
    /// What the record keeps of the registration.
    pub registration: ModuleRegistration,
}

/// Space that the registration takes behind the patch's own read-only data and data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Offset of the symbol tables in the read-only data.
    pub symbols: u64,
    /// Size of the read-only data with the symbol tables, in bytes.
    pub rodata: u64,
    /// Offset of the `struct module` in the data.
    pub module: u64,
    /// Size of the data with the `struct module`, in bytes.
    pub data: u64,
}

impl Layout {
    /// The space for the registration of a patch with `rodata` and `data` bytes of its own, which uses `uses` modules of the guest and has
    /// `sites` ftrace sites.
    pub fn space(&self, symbols: &[PlacedSymbol<'_>], (uses, sites): (usize, usize), rodata: u64, data: u64) -> Space {
        let (tables, module) = (rodata.next_multiple_of(8), object::behind(data));
        Space {
            symbols: tables,
            rodata: tables.saturating_add(Symbols::len(symbols)),
            module,
            data: module.saturating_add(self.object_bytes(uses, sites)),
        }
    }

    /// Plans the registration of the module of `description`, whose parts have `space` behind them. `others` are the registrations of the
    /// patches in the guest.
    ///
    /// # Errors
    ///
    /// The guest's structures cannot be read, or contradict themselves; or its tables have rows of another length.
    pub fn register<'k>(
        &self,
        live: &Live<'_>,
        description: &Description<'_>,
        space: &Space,
        others: impl Iterator<Item = &'k ModuleRegistration>,
    ) -> Result<PreparedModule, KernelError> {
        require_row_length("__ex_table", &description.fixups, self.fixup_bytes())?;
        require_row_length("__bug_table", &description.bugs, self.bug_bytes())?;
        let btf = &live.kernel.btf;
        let at = description.bases.data.wrapping_add(space.module);
        let symbols_at = description.bases.rodata.wrapping_add(space.symbols);
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
        let registration = ModuleRegistration {
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
        Ok(PreparedModule {
            module,
            symbols,
            changes,
            registration,
        })
    }

    /// Appends the ftrace records of the module's sites to `bytes`, which will be at `at`, and links them into the guest's chain.
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

    /// Makes the module at `at` its own only user, and a user of `others`, which cannot be unloaded then
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
        // The lists of the module's users, and of the modules that it uses.
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

    /// The two tree nodes of a part of the memory of the module at `at`, each with the distance to its key.
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

impl ModuleRegistration {
    /// Plans to unregister the module from the guest's lists and tree, as they are now. The changes must be made in a pause in which no
    /// task of the guest holds `module_mutex`. `doubtful`: the guest-virtual memory of the patch, where it may never have been registered.
    ///
    /// # Errors
    ///
    /// The guest's structures cannot be read, or contradict themselves.
    pub fn unregister(
        &self,
        live: &Live<'_>,
        layout: &Layout,
        doubtful: Option<Range<Gva>>,
    ) -> Result<Vec<Change>, KernelError> {
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
        let is_registered = |memory| self.leads_into(&modules, memory);
        if sequence == self.sequence[0]
            || sequence == self.sequence[1] && doubtful.as_ref().map_or(Ok(true), is_registered)?
        {
            // The guest has not changed the tree since: every word of it is as before or after the registration.
            for change in self.tree.iter().rev() {
                let unreadable = |source| KernelError::Restore { what: TREE, source };
                changes.extend(change.restoration(&modules, TREE).map_err(unreadable)?);
            }
            if sequence != self.sequence[0] {
                changes.push(layout.sequence_change(live, [sequence, self.sequence[0]])?);
            }
            return Ok(changes);
        }
        let mut tree = Words::new(&modules, Gva(0), Vec::new());
        let mut after = sequence;
        for memory in &layout.memories {
            let mut is_in = false;
            for ((node, key), root_at) in layout.nodes_of(live, at, memory)?.into_iter().zip(layout.roots) {
                let mut tree = layout.tree(&mut tree, root_at, key);
                if tree.holds(node)? {
                    tree.remove(node)?;
                    is_in = true;
                }
            }
            after = after.wrapping_add(if is_in { COUNTS } else { 0 });
        }
        if after == sequence {
            // Staged, and never linked; the guest's modules have come and gone since.
            return Ok(changes);
        }
        self.narrow_bounds(&modules, layout, &mut tree)?;
        changes.extend(tree.finish(live, TREE)?.1);
        changes.push(layout.sequence_change(live, [sequence, after])?);
        Ok(changes)
    }

    /// True where a word of the tree points to the patch's memory. The sequence number alone does not tell: of a patch that was staged and
    /// never registered, the guest's own modules may have brought it to the same number.
    fn leads_into(&self, live: &Live<'_>, memory: &Range<Gva>) -> Result<bool, KernelError> {
        for change in self.tree.iter().filter(|change| change.gives_pointer_to(memory)) {
            let unreadable = |source| KernelError::Restore { what: TREE, source };
            if change.is_made_now(live).map_err(unreadable)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Restores the bounds from before the first patch, but includes all modules of the tree.
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

    /// Plans another name for the module, cut to the space for it; `None` where the module has that name already. The change must be made in
    /// a pause in which no task of the guest holds `module_mutex`.
    ///
    /// # Errors
    ///
    /// The module cannot be read.
    pub fn rename(&self, live: &Live<'_>, name: &str) -> Result<Option<Change>, KernelError> {
        let member = live.kernel.btf.structure("module")?.member("name")?;
        let at = Gva(self.module).wrapping_add(member.offset());
        let space = usize::try_from(member.size.min(NAME_BYTES_MAX)).unwrap_or(0);
        let mut now = vec![0; space];
        live.read(at, &mut now).map_err(|source| unreadable(at, source))?;
        let len = name.floor_char_boundary(space.saturating_sub(1));
        let mut new: Vec<u8> = name.bytes().take(len).collect();
        new.resize(space, 0);
        // The pages of a patch's data are contiguous in guest-physical memory.
        let (gpa, _) = live.physical(at).map_err(|source| unreadable(at, source))?;
        Ok((now != new).then(|| Change::replace("the name of the patch's module", gpa, now, new).of_data()))
    }

    /// The number of references to the module, without vmpatch's own. It is 0 in kernels that cannot unload modules: they do not count.
    ///
    /// # Errors
    ///
    /// The module cannot be read.
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

/// The sequence number of the guest's tree of modules; `None` for a kernel without modules. The guest increments it whenever it loads or
/// unloads a module. A plan reads it first, as a precondition for all that it reads of modules.
///
/// # Errors
///
/// The guest's structures cannot be read.
pub fn generation(live: &Live<'_>) -> Result<Option<u32>, KernelError> {
    let live = live.that_changes_when(modules::CHANGING);
    Layout::find(&live)?.map(|layout| layout.sequence(&live)).transpose()
}

/// Requires that the rows of a table have the length that this kernel expects.
fn require_row_length(name: &str, table: &Table, expected: u64) -> Result<(), KernelError> {
    if table.count == 0 || table.row_bytes == expected {
        return Ok(());
    }
    let found = format!("rows of {} bytes in {name}", table.row_bytes);
    Err(damaged(found, &format!("rows of {expected}")))
}
