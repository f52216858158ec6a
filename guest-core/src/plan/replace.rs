//! Replaces patches by one: in the pause that redirects the new patch's functions, those that it does not carry get the kernel's code back.
//! Then no function leads to the old patches' code, and it is [removed](super::discard) in a pause of its own.

use super::stack::{self, Holder};
use super::{Refusal, removal};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::{KernelError, Live};
use crate::registry::{Entry, PatchedFunction, Record, Registry, State};
use crate::unwind::OldFunction;

/// The patches that a patch replaces, oldest first.
#[derive(Debug, Default)]
pub(super) struct Replaced<'r> {
    patches: Vec<(&'r Entry, &'r Record)>,
}

/// Changes that give functions what they were before, in front of and among those that redirect others.
#[derive(Debug, Default)]
pub(super) struct Released {
    /// Of ftrace records. They come before any jump is written.
    pub flags: Vec<Change>,
    /// Of jumps.
    pub jumps: Vec<Change>,
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

    /// Those that the patch of an entry was replacing when its apply was cut off. A patch in [`State::Reverting`] has replaced what is
    /// [`State::Replaced`]: only a supervisor that ends its apply leaves it in that state beside patches in force.
    pub fn cut_off_by(registry: &'r Registry, entry: &Entry) -> Self {
        let was_in_force = |other: &Entry| match entry.state {
            State::Applying => matches!(other.state, State::Applied | State::Replaced),
            State::Reverting => other.state == State::Applied,
            _ => false,
        };
        let names = entry.record.as_ref().map(|record| record.replaces.as_slice());
        let names = names.unwrap_or_default();
        Self::those(registry, |entry, other| {
            was_in_force(entry) && names.contains(&other.id)
        })
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

    /// Requires that the guest traces none of the functions that are given back.
    pub fn require_untraced(&self, live: &Live<'_>, carried: &[PatchedFunction]) -> Result<(), Refusal> {
        for record in self.records() {
            let mut released = record
                .functions
                .iter()
                .filter(|function| !is_carried(carried, function));
            let untraced = released.try_for_each(|function| removal::require_untraced(live, function));
            untraced.map_err(|source| Refusal::Replaced {
                id: record.id.clone(),
                source: Box::new(source),
            })?;
        }
        Ok(())
    }

    /// Gives the kernel's code back to the functions that are not `carried` by the new patch.
    pub fn released(&self, carried: &[PatchedFunction]) -> Released {
        let mut released = Released::default();
        for record in self.records() {
            for function in record
                .functions
                .iter()
                .filter(|function| !is_carried(carried, function))
            {
                let holders = stack::holders(self.records(), Gva(function.old));
                // Each function once: where its bottom holder is met.
                let (Some(bottom), Some(top)) = (holders.first(), holders.last()) else {
                    continue;
                };
                if bottom.record.order == record.order {
                    released.jumps.extend(top.led_back(bottom));
                    released
                        .flags
                        .extend(bottom.flags().map(|flag| flag.undone().of_data()));
                }
            }
        }
        released
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

    /// Plans to put these patches in force again where `by`, whose apply was cut off, had begun to release their functions.
    pub fn restored(&self, live: &Live<'_>, registry: &Registry, by: &Record) -> Result<Restored, KernelError> {
        let Released { flags, jumps } = self.released(&by.functions);
        let mut restored = Restored::default();
        for change in jumps.iter().chain(&flags) {
            restored.changes.extend(removal::restored(live, change)?);
        }
        if !restored.changes.is_empty() {
            let released = self.records().flat_map(|record| &record.functions);
            let released = released.filter(|function| !is_carried(&by.functions, function));
            restored.original = released.map(original).collect();
        }
        let states = self.state_changes(registry, State::Replaced, State::Applied);
        restored.changes.extend(states);
        Ok(restored)
    }

    /// The changes of functions and their ftrace records by which `record` leads its functions to its code, from where these patches lead
    /// them.
    pub fn redirected_by(&self, record: &Record) -> Result<Vec<Change>, KernelError> {
        let mut changes = Vec::new();
        for function in &record.functions {
            match stack::holders(self.records(), Gva(function.old)).last() {
                Some(top) => changes.extend(led_to(top, Gva(function.new))?),
                None => changes.extend_from_slice(record.changes_of(function)),
            }
        }
        Ok(changes)
    }
}

fn led_to(top: &Holder<'_>, new: Gva) -> Result<Vec<Change>, KernelError> {
    top.led_to(new).map_err(|error| KernelError::Disagrees {
        what: "the record of a replaced patch",
        found: error.to_string(),
        expected: "a jump in reach".to_owned(),
    })
}

fn is_carried(carried: &[PatchedFunction], function: &PatchedFunction) -> bool {
    carried.iter().any(|one| one.old == function.old)
}

/// The kernel's own function.
fn original(function: &PatchedFunction) -> OldFunction {
    let start = Gva(function.old);
    OldFunction {
        name: function.name.clone(),
        code: start..start.wrapping_add(function.old_len),
    }
}
