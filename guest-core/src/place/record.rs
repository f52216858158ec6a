//! What the registry keeps of one patch: enough to show it, to unwind through it, and to take it out.

use crate::addr::Gva;
use crate::change::Change;
use crate::guest_module::Known;
use crate::text::is_plain;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// How a function is redirected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Redirect {
    /// The jump stands in the function's ftrace site.
    Ftrace,
    /// The jump stands behind the ftrace site, or at the entry of a function that has none.
    Body,
}

/// One redirected function.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PatchedFunction {
    /// The guest's module that it is in; none for the kernel image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
    /// Its name in the kernel.
    pub name: String,
    /// Which of several functions of that name, from 1; 0 where it is the only one.
    pub sympos: u64,
    /// Guest-virtual address of the old function.
    pub old: u64,
    /// Bytes of the old function, up to the next symbol.
    pub old_len: u64,
    /// Guest-virtual address of the new function.
    pub new: u64,
    /// Bytes of the new function.
    pub new_len: u64,
    /// How the jump is laid.
    pub redirect: Redirect,
    /// Guest-physical address of the jump.
    pub jump: u64,
}

/// A part of the patch in the pool's window: first address and bytes, guest-virtual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Span {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// ORC tables in the guest, as the kernel's loader sorts a module's: guest-virtual.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Orc {
    /// The table of place-relative distances, 4 bytes each.
    pub ips: u64,
    /// The table of `struct orc_entry`.
    pub entries: u64,
    /// Number of elements of each.
    pub count: u64,
}

/// One patch, as kept in the guest. JSON, so that newer versions can add members and people can read a dump.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What `revert` takes: the module's name, unique in the guest.
    pub id: String,
    /// SHA-256 of the module file, in hex.
    pub digest: String,
    /// Position among all patches ever applied: a later one may rest on an earlier one.
    pub order: u64,
    /// Consistency model that it was applied with.
    pub model: String,
    /// Seconds since 1970 on the host when it was applied.
    pub applied_at: u64,
    /// The functions.
    pub functions: Vec<PatchedFunction>,
    /// The new code.
    pub text: Span,
    /// Its read-only data.
    pub rodata: Span,
    /// Its data.
    pub data: Span,
    /// The new code's ORC tables, within its read-only data.
    #[serde(default)]
    pub orc: Orc,
    /// Modules that the patch is for, too, which the guest had not loaded.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<String>,
    /// The sites and flags that the commit changed: undone in reverse to take the patch out.
    pub changes: Vec<Change>,
    /// How the guest knows the patch as a module; none where it does not, as with a vmpatch of before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known: Option<Known>,
    /// Its own functions and variables whose addresses the guest may have; none where that is not known, as with a vmpatch of
    /// before that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub escapes: Option<Vec<String>>,
}

impl Record {
    /// As stored in the guest.
    pub fn to_bytes(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }

    /// From the guest: bounded by the pool's 2 MiB. Errors: not JSON of this shape, text that could
    /// move a terminal's cursor, or changes that contradict themselves.
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

    /// The name by which the guest knows the module while the patch is reverted and its code kept: the patch's own is free then.
    pub(crate) fn kept_name(&self) -> String {
        format!("reverted_{}_{}", self.order, self.id)
    }

    /// True where the guest may use the patch's code or variables after a revert, so that they must stay.
    pub fn must_stay(&self) -> bool {
        self.escapes.as_ref().is_none_or(|names| !names.is_empty())
    }

    /// The memory beside its code that the guest knows of: none where it does not know the patch.
    pub(crate) fn known_memory(&self) -> Range<Gva> {
        match self.known {
            Some(_) => Gva(self.rodata.start)..Gva(self.data.start.saturating_add(self.data.len)),
            None => Gva(0)..Gva(0),
        }
    }

    /// Everything in it that is shown to people.
    fn texts(&self) -> impl Iterator<Item = &str> {
        let names = self.functions.iter().map(|function| function.name.as_str());
        let objects = self.functions.iter().filter_map(|function| function.object.as_deref());
        let names = names.chain(objects).chain(self.pending.iter().map(String::as_str));
        let names = names.chain(self.escapes.iter().flatten().map(String::as_str));
        let own = [&self.id, &self.digest, &self.model].into_iter().map(String::as_str);
        own.chain(names).chain(self.all_changes().map(Change::what))
    }

    fn all_changes(&self) -> impl Iterator<Item = &Change> {
        let tree = self.known.iter().flat_map(|known| &known.tree);
        self.changes.iter().chain(tree)
    }
}
