//! Plans what the next vmpatch does first: recovers a commit that was cut off, and wipes what is not in force.

use super::{Plan, from_reads, registration, revert};
use crate::addr::{Gpa, Gva};
use crate::change::{Change, ChangeError};
use crate::guest_module;
use crate::kernel::{KernelError, Live};
use crate::paging::PAGE_SIZE;
use crate::reads::Preconditions;
use crate::registry::{Entry, FILLER, Record, Registry, State};

/// Plans the wiping of every patch in [`State::Staging`] or [`State::Reverted`] and, where no patch is left, of the registry. The changes
/// must be made in this order, while the guest runs: it cannot reach what they wipe.
///
/// # Errors
///
/// The registry's memory cannot be read.
pub fn cleanup(live: &Live<'_>, registry: &Registry) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    if !registry.exists {
        return Ok(changes);
    }
    let (gone, kept): (Vec<&Entry>, Vec<&Entry>) = registry
        .entries
        .iter()
        .partition(|entry| matches!(entry.state, State::Staging | State::Reverted));
    for entry in &gone {
        for page in entry.pages.range() {
            let at = registry.table_entry(page);
            let word = read_word(live, registry, at)?;
            if word != 0 {
                changes.push(Change::word(
                    format!("page-table entry of arena page {page}"),
                    at,
                    word,
                    0,
                ));
            }
        }
        changes.extend(wipe(live, registry, entry.pages.range())?);
        changes.push(registry.clear_slot(live, entry.slot)?);
    }
    if kept.is_empty() {
        changes.extend(registry.removal(live, &changes)?);
    }
    Ok(changes)
}

/// Plans the recovery of a patch whose commit was cut off: its sites get their old bytes. `None` where there is no such patch.
///
/// Code stays where it may have run and the guest may still use it. That is the code of a patch that was applied again after a revert;
/// and of a patch with a jump in place, if its code hands its addresses to the guest or holds a reference to its module.
///
/// # Errors
///
/// The guest cannot be read, or a static key of the patch is in use.
pub fn recovery(live: &Live<'_>, registry: &Registry) -> Result<Option<Plan>, KernelError> {
    let Some((entry, record)) = registry
        .entries
        .iter()
        .filter(|entry| matches!(entry.state, State::Applying | State::Reapplying))
        .find_map(|e| Some((e, e.record.clone()?)))
    else {
        return Ok(None);
    };
    from_reads::plan(live, |live| recover(live, registry, entry, record)).map(Some)
}

fn recover(live: &Live<'_>, registry: &Registry, entry: &Entry, record: Record) -> Result<Plan, KernelError> {
    let mut atomic = restored_sites(live, &record)?;
    // A commit writes the jumps after all that registers the code in the guest.
    let is_jump = |change: &&Change| record.functions.iter().any(|one| one.jump == change.gpa().0);
    let mut jumps = record.changes.iter().filter(is_jump);
    let is_used = match &record.registration {
        Some(module) => record.must_stay() || module.references(live)? != 0,
        None => record.must_stay(),
    };
    let has_run = is_used && jumps.any(|jump| matches!(jump.is_made(live), Ok(true)));
    let stays = entry.state == State::Reapplying || has_run;
    if let (Some(module), true) = (&record.registration, stays) {
        atomic.extend(module.rename(live, &record.kept_name())?);
    } else if let Some(module) = &record.registration {
        let unlisted = guest_module::unlist(live, &module.keys)?;
        atomic.extend(unlisted.map_err(|key| KernelError::KeyInUse { key })?);
        atomic.extend(registration::unregister(live, module, Some(record.memory()))?);
        atomic.extend(registration::free_per_cpu(live, module)?);
    }
    let after = if stays { State::Kept } else { State::Reverted };
    atomic.push(registry.state_change(entry.slot, entry.state, after));
    let (must_be_quiescent, unreferenced) = match stays {
        true => (revert::replacements(live, &record)?, Gva(0)..Gva(0)),
        false => (vec![revert::whole_text(&record)], record.registered_memory()),
    };
    Ok(Plan {
        staged: Vec::new(),
        atomic,
        requires: Preconditions::default(),
        must_be_quiescent,
        unreferenced,
        patch_code: registry.patch_code(),
        record,
    })
}

/// Plans to restore what a patch that was cut off has changed in functions and their ftrace records.
///
/// Bits are set behind the jumps, and cleared in front of them. Where no jump is there, they are the guest's: it may have unloaded the
/// module whose records they were of, and anything may lie there now.
fn restored_sites(live: &Live<'_>, record: &Record) -> Result<Vec<Change>, KernelError> {
    let restored = |change: &Change| {
        // Old, new, or cut in the middle: whatever is there becomes old.
        let restoration = change.restoration(live, change.what());
        restoration.map_err(|source: ChangeError| KernelError::Restore {
            what: "a site of a patch that was cut off",
            source,
        })
    };
    let (bits, jumps): (Vec<_>, Vec<_>) = record.changes.iter().rev().partition(|change| change.is_of_bits());
    let mut all = Vec::new();
    for jump in jumps {
        all.extend(restored(jump)?);
    }
    if all.is_empty() {
        return Ok(all);
    }
    let mut first = Vec::new();
    for bit in bits {
        first.extend(restored(bit)?.map(Change::of_data));
    }
    first.append(&mut all);
    Ok(first)
}

fn wipe(live: &Live<'_>, registry: &Registry, pages: std::ops::Range<u64>) -> Result<Vec<Change>, KernelError> {
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
