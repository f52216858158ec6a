//! Replaces patches by one: in the pause that redirects the new patch's functions, those that it does not carry get the kernel's code back.
//! Then no function leads to the old patches' code, and it is [removed](super::discard) in a pause of its own.

use super::stack::Holders;
use super::{Refusal, RevertError, removal};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::{KernelError, Live};
use crate::redirect::RedirectError;
use crate::registry::{Entry, PatchedFunction, Record, Registry, State};
use crate::unwind::OldFunction;
use std::collections::BTreeSet;

/// The patches that a patch replaces, oldest first.
#[derive(Debug, Default)]
pub(super) struct Replaced<'r> {
    patches: Vec<(&'r Entry, &'r Record)>,
}

/// Changes that give functions the kernel's code back.
#[derive(Debug, Default)]
pub(super) struct Released {
    /// Of jumps.
    pub jumps: Vec<Change>,
    /// Of ftrace records. They come behind all jumps: a site without a jump may be disabled, one with a jump must be.
    pub flags: Vec<Change>,
}

/// Changes that put patches in force again.
#[derive(Debug, Default)]
pub(super) struct Restored {
    /// The changes.
    pub changes: Vec<Change>,
    /// The kernel's own functions that must be quiescent for them: a jump is written into their first bytes.
    pub original: Vec<OldFunction>,
}

impl<'r> Replaced<'r> {
    /// All patches in force.
    pub fn all(registry: &'r Registry) -> Self {
        Self::those(registry, |entry, _| entry.state == State::Applied)
    }

    /// Those that the patch of an entry was replacing when its apply was cut off. A supervisor that ends an apply leaves the new patch in
    /// [`State::Reverting`] and the others in force; in a revert, what the patch has replaced is [`State::Replaced`] or gone.
    pub fn cut_off_by(registry: &'r Registry, entry: &Entry) -> Self {
        let was_in_force = |other: &Entry| match entry.state {
            State::Applying => matches!(other.state, State::Applied | State::Replaced),
            State::Reverting => other.state == State::Applied,
            _ => false,
        };
        let Some(by) = entry.record() else {
            return Self::default();
        };
        // A later patch of such a name is another one.
        let is_named = |other: &Record| other.order < by.order && by.replaces.contains(&other.id);
        Self::those(registry, |entry, other| was_in_force(entry) && is_named(other))
    }

    fn those(registry: &'r Registry, is_one: impl Fn(&Entry, &Record) -> bool) -> Self {
        let with_record = |entry: &'r Entry| Some((entry, entry.record()?));
        let patches = registry.entries.iter().filter_map(with_record);
        let mut patches: Vec<_> = patches.filter(|(entry, record)| is_one(entry, record)).collect();
        patches.sort_by_key(|(_, record)| record.order);
        Self { patches }
    }

    pub fn is_empty(&self) -> bool {
        self.patches.is_empty()
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.records().map(|record| record.id.clone()).collect()
    }

    pub fn records(&self) -> impl Iterator<Item = &'r Record> {
        self.patches.iter().map(|(_, record)| *record)
    }

    /// Gives the kernel's code back to the functions that are not `carried` by the new patch.
    ///
    /// # Errors
    ///
    /// The guest traces one of them, or one does not lead to the patch's code any more.
    pub fn released(&self, live: &Live<'_>, carried: &[PatchedFunction]) -> Result<Released, Refusal> {
        let carried = olds(carried);
        let mut released = Released::default();
        for (bottom, top) in Holders::of(self.records()).ends() {
            if carried.contains(&top.function.old) {
                continue;
            }
            top.require_in_place(live)?;
            removal::require_untraced(live, top.function).map_err(|source| Refusal::Replaced {
                id: top.record.id.clone(),
                source: Box::new(source),
            })?;
            released.jumps.extend(top.led_back(bottom)?);
            let flags = bottom.flags().map(|flag| flag.undone().of_data());
            released.flags.extend(flags);
        }
        Ok(released)
    }

    /// The new functions and their split parts: what must be quiescent where the functions lead elsewhere.
    pub fn replacements(&self, live: &Live<'_>) -> Result<Vec<OldFunction>, KernelError> {
        let mut all = Vec::new();
        for record in self.records() {
            all.extend(removal::replacements(live, record)?);
        }
        Ok(all)
    }

    /// The changes of their states.
    pub fn state_changes(&self, registry: &Registry, from: State, to: State) -> Vec<Change> {
        let those = self.patches.iter().filter(|(entry, _)| entry.state == from);
        those
            .map(|(entry, _)| registry.state_change(entry.slot, from, to))
            .collect()
    }

    /// Plans to put these patches in force again where `by`, whose apply was cut off, had begun to release their functions. A function in
    /// whose place the guest has written something else stays as it is.
    ///
    /// # Errors
    ///
    /// The guest traces one of them, or cannot be read.
    pub fn restored(&self, live: &Live<'_>, registry: &Registry, by: &Record) -> Result<Restored, RevertError> {
        let carried = olds(&by.functions);
        let mut restored = Restored::default();
        for (bottom, top) in Holders::of(self.records()).ends() {
            if carried.contains(&top.function.old) {
                continue;
            }
            let mut jumps = Vec::new();
            for jump in top.led_back(bottom).map_err(contradiction)? {
                jumps.extend(removal::restored(live, &jump)?);
            }
            if jumps.is_empty() && !top.is_in_place(live) {
                continue;
            }
            let mut flags = Vec::new();
            for flag in bottom.flags() {
                flags.extend(removal::restored(live, &flag.undone().of_data())?);
            }
            if !flags.is_empty() {
                removal::require_untraced(live, top.function)?;
            }
            if !jumps.is_empty() {
                restored.original.push(original(top.function));
            }
            restored.changes.extend(jumps);
            restored.changes.extend(flags);
        }
        let states = self.state_changes(registry, State::Replaced, State::Applied);
        restored.changes.extend(states);
        Ok(restored)
    }

    /// The changes of functions and their ftrace records by which `record` leads its functions to its code, from where these patches lead
    /// them.
    pub fn redirected_by(&self, record: &Record) -> Result<Vec<Change>, KernelError> {
        if self.is_empty() {
            return Ok(record.changes.clone());
        }
        let holders = Holders::of(self.records());
        let mut redirected = Vec::new();
        for (function, changes) in record.changes_by_function() {
            match holders.at(function.old).last() {
                Some(top) => redirected.extend(top.led_to(Gva(function.new)).map_err(contradiction)?),
                None => redirected.extend_from_slice(changes),
            }
        }
        Ok(redirected)
    }
}

fn contradiction(error: RedirectError) -> KernelError {
    KernelError::Disagrees {
        what: "the record of a replaced patch",
        found: error.to_string(),
        expected: "a jump in reach".to_owned(),
    }
}

fn olds(functions: &[PatchedFunction]) -> BTreeSet<u64> {
    functions.iter().map(|function| function.old).collect()
}

/// The kernel's own function.
fn original(function: &PatchedFunction) -> OldFunction {
    let start = Gva(function.old);
    OldFunction {
        name: function.name.clone(),
        code: start..start.wrapping_add(function.old_len),
    }
}
