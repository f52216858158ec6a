//! Plans what the next vmpatch does first: recovers a commit that was cut off, and wipes what is not in force.

use super::removal::Removal;
use super::{Plan, RevertError, from_reads, unpatch};
use crate::addr::Gpa;
use crate::change::Change;
use crate::kernel::{KernelError, Live};
use crate::paging::PAGE_SIZE;
use crate::registry::{Entry, FILLER, Record, Registry, State};
use crate::transaction::recovery::{Keep, Rest, Sites};
use std::ops::Range;

/// What is left to do of a patch of the registry.
///
/// # Errors
///
/// Its sites cannot be read.
pub fn rest(live: &Live<'_>, registry: &Registry, entry: &Entry) -> Result<Rest, KernelError> {
    let sites = match (&entry.record, entry.state) {
        (Some(record), State::StartUnpatching) => unpatch::sites(live, record)?,
        (Some(record), State::Applying | State::Reverting) => removal(live, registry, entry, record).sites()?,
        // They do not count.
        _ => Sites::Old,
    };
    Ok(Rest::of(entry.state, sites))
}

fn removal<'a>(live: &'a Live<'a>, registry: &'a Registry, entry: &'a Entry, record: &'a Record) -> Removal<'a> {
    Removal {
        live,
        registry,
        entry,
        record,
    }
}

/// Plans to wipe every patch that the guest can't reach and, where no patch is left, the registry; and records a patch as in force whose revert has
/// not begun. The changes must be made in this order, while the guest runs: it cannot reach what they write.
///
/// # Errors
///
/// The registry's memory cannot be read.
pub fn cleanup(live: &Live<'_>, registry: &Registry) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    let mut is_empty = registry.exists;
    for entry in &registry.entries {
        match rest(live, registry, entry)? {
            Rest::Wipe => changes.extend(wipe_entry(live, registry, entry)?),
            Rest::Reinstate => {
                is_empty = false;
                changes.push(registry.state_change(entry.slot, entry.state, State::Applied));
            }
            Rest::Nothing | Rest::Remove(_) | Rest::Complete | Rest::Discard => is_empty = false,
        }
    }
    if is_empty {
        changes.extend(registry.removal(live, &changes)?);
    }
    Ok(changes)
}

fn wipe_entry(live: &Live<'_>, registry: &Registry, entry: &Entry) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    for page in entry.pages.range() {
        let at = registry.table_entry(page);
        let word = read_word(live, registry, at)?;
        if word != 0 {
            let what = format!("page-table entry of arena page {page}");
            changes.push(Change::word(what, at, word, 0));
        }
    }
    changes.extend(wipe(live, registry, entry.pages.range())?);
    changes.push(registry.clear_slot(live, entry.slot)?);
    Ok(changes)
}

/// Why a patch whose commit was cut off cannot be recovered. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[error("{id}, whose commit was cut off, can't be recovered")]
pub struct RecoveryError {
    /// The patch.
    pub id: String,
    /// Why.
    pub source: RevertError,
}

/// Plans the recovery of the first patch whose commit was cut off, where that [must be taken out of force](Rest::Remove) or the begin of its
/// revert [be completed](Rest::Complete). `None` where there is no such patch.
///
/// # Errors
///
/// The guest uses the patch, or cannot be read.
pub fn recovery(live: &Live<'_>, registry: &Registry) -> Result<Option<Plan>, RecoveryError> {
    for entry in &registry.entries {
        let Some(record) = &entry.record else { continue };
        let plan = match rest(live, registry, entry) {
            Ok(Rest::Remove(keep)) => from_reads::plan(live, |live: &Live<'_>| {
                removal(live, registry, entry, record).plan(entry.state, keep)
            }),
            Ok(Rest::Complete) => {
                from_reads::plan(live, |live: &Live<'_>| unpatch::begin(live, registry, entry, record))
            }
            Ok(_) => continue,
            Err(error) => Err(error.into()),
        };
        let id = record.id.clone();
        return plan.map(Some).map_err(|source| RecoveryError { id, source });
    }
    Ok(None)
}

/// Plans the removal of a patch that another one [has replaced](State::Replaced); `None` where there is none.
///
/// # Errors
///
/// The guest uses it, or cannot be read. It may stay until a later vmpatch: nothing leads to it.
pub fn discard(live: &Live<'_>, registry: &Registry) -> Result<Option<Plan>, RevertError> {
    let mut newest: Option<(&Entry, &Record)> = None;
    for entry in &registry.entries {
        let Some(record) = &entry.record else { continue };
        // The branches of a newer patch are behind those of an older one in the lists of static keys.
        let is_newer = newest.is_none_or(|(_, other)| record.order > other.order);
        if is_newer && rest(live, registry, entry)? == Rest::Discard {
            newest = Some((entry, record));
        }
    }
    let Some((entry, record)) = newest else { return Ok(None) };
    let planned = from_reads::plan(live, |live: &Live<'_>| {
        removal(live, registry, entry, record).plan(entry.state, Keep::IfHandedOut)
    });
    planned.map(Some)
}

fn wipe(live: &Live<'_>, registry: &Registry, pages: Range<u64>) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    for page in pages {
        let mut old = vec![0; PAGE_SIZE as usize];
        registry.read_arena(live, registry.page(page), &mut old)?;
        if old != filler() {
            changes.push(Change::replace(
                format!("arena page {page}"),
                registry.page(page),
                old,
                filler(),
            ));
        }
    }
    Ok(changes)
}

fn filler() -> Vec<u8> {
    vec![FILLER; PAGE_SIZE as usize]
}

fn read_word(live: &Live<'_>, registry: &Registry, gpa: Gpa) -> Result<u64, KernelError> {
    let mut bytes = [0; 8];
    registry.read_arena(live, gpa, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
