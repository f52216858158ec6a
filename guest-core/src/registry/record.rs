//! The record that the registry keeps of one patch: what `status` shows, the unwinder needs, and `revert` undoes.

use crate::addr::Gva;
use crate::change::Change;
use crate::guest_module::ModuleRegistration;
use crate::paging::PAGE_SIZE;
use crate::text::is_plain;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Where the jump of a redirected function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirect {
    /// The jump is in the function's ftrace site.
    Ftrace,
    /// The jump is behind the ftrace site, or at the entry of a function without such a site.
    Body,
}

/// One redirected function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchedFunction {
    /// The guest's module that holds the function; `None` for the kernel image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Name of the old function in the kernel's symbol table.
    pub name: String,
    /// Position among the functions of that name, from 1; 0 where the name is unique. As `klp_func.old_sympos`.
    pub sympos: u64,
    /// Guest-virtual address of the old function.
    pub old: u64,
    /// Bytes of the old function, up to the next symbol.
    pub old_len: u64,
    /// Guest-virtual address of the new function.
    pub new: u64,
    /// Bytes of the new function.
    pub new_len: u64,
    /// Where the jump is.
    pub redirect: Redirect,
    /// Guest-physical address of the jump's first byte.
    pub jump: u64,
    /// Guest-virtual address of the function's trampoline, to which the jump leads while the patch is in transition; `None` where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trampoline: Option<u64>,
}

/// A part of a patch, at guest-virtual addresses of the alias mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Span {
    /// Guest-virtual address of the first byte.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The ORC tables of a patch in the guest, sorted as the kernel's loader sorts a module's; guest-virtual addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Orc {
    /// The table of instruction addresses: place-relative distances of 4 bytes each.
    pub ips: u64,
    /// The table of `struct orc_entry`.
    pub entries: u64,
    /// Number of entries of each table.
    pub count: u64,
}

/// One patch, as the guest keeps it. It is stored as JSON, so that newer versions can add members and people can read a memory dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The name that `revert` takes: the module's, unique in the guest.
    pub id: String,
    /// SHA-256 of the module file, in hex.
    pub digest: String,
    /// Position among all patches ever applied to the guest: a later one may depend on an earlier one.
    pub order: u64,
    /// Consistency model of the apply.
    pub model: String,
    /// Time of the apply on the host, in seconds since 1970.
    pub applied_at: u64,
    /// The functions that the patch replaces.
    pub functions: Vec<PatchedFunction>,
    /// The patch's code.
    pub text: Span,
    /// Its read-only data.
    pub rodata: Span,
    /// Its data.
    pub data: Span,
    /// The new code's ORC tables, within its read-only data.
    #[serde(default)]
    pub orc: Orc,
    /// Modules that the patch also changes, and that the guest had not loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<String>,
    /// The changes of sites and flags, function by function: first a function's jump, then its flags. A revert undoes them in reverse order.
    /// Where the patch replaces others, what it undoes to is the kernel's own code.
    pub changes: Vec<Change>,
    /// The patches that this one has replaced, by name, oldest first. They may be gone by now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub replaces: Vec<String>,
    /// The patch's registration as a module of the guest; `None` in records of a vmpatch that did not register patches.
    #[serde(rename = "known", default, skip_serializing_if = "Option::is_none")]
    pub registration: Option<ModuleRegistration>,
    /// The patch's own functions and variables whose addresses the guest may hold; `None` in records of a vmpatch that did not look
    /// for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub escapes: Option<Vec<String>>,
}

impl Record {
    /// Encodes the record as the guest stores it.
    ///
    /// # Errors
    ///
    /// Those of the JSON writer.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// Decodes a record that the guest stores. The caller bounds `bytes`: a record lies within the arena's 2 MiB.
    ///
    /// # Errors
    ///
    /// The bytes are no JSON of this shape, a text could move a terminal's cursor, or the lengths of a change contradict one another.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        use serde::de::Error;
        let record: Self = serde_json::from_slice(bytes)?;
        if let Some(text) = record.texts().find(|text| !text.chars().all(is_plain)) {
            return Err(serde_json::Error::custom(format!("{text:?} is not plain text")));
        }
        let malformed = record.all_changes().find(|change| !change.is_sound());
        match malformed.map(|change| change.what().to_owned()) {
            Some(what) => Err(serde_json::Error::custom(format!("the change of {what} is malformed"))),
            None => Ok(record),
        }
    }

    /// Its functions, each with its changes. Those of a function begin with its jump, and end where another one's begin.
    pub(crate) fn changes_by_function(&self) -> Vec<(&PatchedFunction, &[Change])> {
        let mut places = BTreeMap::new();
        for (index, change) in self.changes.iter().enumerate() {
            places.entry(change.gpa().0).or_insert(index);
        }
        let start = |function: &PatchedFunction| places.get(&function.jump).copied();
        let starts: BTreeSet<usize> = self.functions.iter().filter_map(start).collect();
        let with_changes = self.functions.iter().map(|function| {
            let changes = start(function).and_then(|first| {
                let end = starts.range(first + 1..).next().copied();
                self.changes.get(first..end.unwrap_or(self.changes.len()))
            });
            (function, changes.unwrap_or_default())
        });
        with_changes.collect()
    }

    /// The module's name in the guest while the patch is reverted and its code kept. The patch's own name is free then.
    pub(crate) fn kept_name(&self) -> String {
        format!("reverted_{}_{}", self.order, self.id)
    }

    /// True where the guest may use the patch's code or variables after a revert: they must stay.
    pub fn must_stay(&self) -> bool {
        self.escapes.as_ref().is_none_or(|names| !names.is_empty())
    }

    /// All of its guest-virtual memory, in whole pages.
    pub(crate) fn memory(&self) -> Range<Gva> {
        let end = self.data.start.saturating_add(self.data.len);
        Gva(self.text.start)..Gva(end.checked_next_multiple_of(PAGE_SIZE).unwrap_or(end))
    }

    /// The patch's data, guest-virtual, that the guest may reach through the registered module; empty for a patch that is not
    /// registered.
    pub(crate) fn registered_memory(&self) -> Range<Gva> {
        match self.registration {
            Some(_) => Gva(self.rodata.start)..Gva(self.data.start.saturating_add(self.data.len)),
            None => Gva(0)..Gva(0),
        }
    }

    /// Every text of the record that a person may be shown.
    fn texts(&self) -> impl Iterator<Item = &str> {
        let names = self.functions.iter().map(|function| function.name.as_str());
        let objects = self.functions.iter().filter_map(|function| function.object.as_deref());
        let names = names.chain(objects).chain(self.pending.iter().map(String::as_str));
        let names = names.chain(self.escapes.iter().flatten().chain(&self.replaces).map(String::as_str));
        let own = [&self.id, &self.digest, &self.model].into_iter().map(String::as_str);
        own.chain(names).chain(self.all_changes().map(Change::what))
    }

    fn all_changes(&self) -> impl Iterator<Item = &Change> {
        let tree = self.registration.iter().flat_map(|module| &module.tree);
        self.changes.iter().chain(tree)
    }
}
