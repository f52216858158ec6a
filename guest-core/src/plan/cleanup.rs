//! Giving pages back: after a revert, and after a vmpatch that was killed.

use super::{Plan, from_reads, known, revert};
use crate::addr::{Gpa, Gva};
use crate::change::{Change, ChangeError};
use crate::guest_module;
use crate::kernel::{KernelError, Live};
use crate::paging::PAGE_SIZE;
use crate::place::{Entry, FILLER, Record, Registry, State};
use crate::reads::Preconditions;

/// The changes that wipe every patch that is not in force and not half committed; and, when none is left, the registry.
/// To be made in this order, while the guest runs: nothing there is reachable for it.
pub fn cleanup(live: &Live<'_>, registry: &Registry) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    if !registry.exists {
        return Ok(changes);
    }
    let (gone, kept): (Vec<&Entry>, Vec<&Entry>) = registry
        .entries
        .iter()
        .partition(|entry| matches!(entry.state, State::Placing | State::Reverted));
    for entry in &gone {
        for page in entry.pages.range() {
            let at = registry.table_entry(page);
            let word = read_word(live, registry, at)?;
            if word != 0 {
                changes.push(Change::word(
                    format!("page-table entry of pool page {page}"),
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

/// The plan that puts back the sites of a patch whose commit was cut off; `None` where there is none.
///
/// Code that may have run, and that the guest may use from then on, stays: that of a patch which was applied again after a revert,
/// and where the guest was resumed with a jump in place, if that code hands itself to the guest or holds a reference to its module.
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
    let mut paused = Vec::new();
    for change in record.changes.iter().rev() {
        let unreadable = |error: ChangeError| KernelError::Disagrees {
            what: "a site of a patch that was cut off",
            found: error.to_string(),
            expected: "readable memory".to_owned(),
        };
        // Old, new, or cut in the middle: whatever is there becomes old.
        paused.extend(change.restoration(live, change.what()).map_err(unreadable)?);
    }
    // Jumps are written when all is there that the guest is to know of the code.
    let is_jump = |change: &&Change| record.functions.iter().any(|one| one.jump == change.gpa().0);
    let mut jumps = record.changes.iter().filter(is_jump);
    let is_used = match &record.known {
        Some(module) => record.must_stay() || module.references(live)? != 0,
        None => record.must_stay(),
    };
    let has_run = is_used && jumps.any(|jump| matches!(jump.is_made(live), Ok(true)));
    let stays = entry.state == State::Reapplying || has_run;
    if let (Some(module), true) = (&record.known, stays) {
        paused.extend(module.rename(live, &record.kept_name())?);
    } else if let Some(module) = &record.known {
        let unlisted = guest_module::unlist(live, &module.keys)?;
        paused.extend(unlisted.map_err(|key| KernelError::Disagrees {
            what: "the list of a static key",
            found: format!("a module that the guest has loaded hangs on the key at {key}"),
            expected: "only the patch that was cut off".to_owned(),
        })?);
        paused.extend(known::forget(live, module)?);
        paused.extend(known::give_back(live, module)?);
    }
    let after = if stays { State::Kept } else { State::Reverted };
    paused.push(registry.state_change(entry.slot, entry.state, after));
    let (occupied, unread) = match stays {
        true => (revert::replacements(live, &record)?, Gva(0)..Gva(0)),
        false => (vec![revert::whole_text(&record)], record.known_memory()),
    };
    Ok(Plan {
        before: Vec::new(),
        paused,
        requires: Preconditions::default(),
        occupied,
        unread,
        laid: registry.laid_code(),
        record,
    })
}

fn wipe(live: &Live<'_>, registry: &Registry, pages: std::ops::Range<u64>) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    for page in pages {
        let mut old = vec![0; PAGE_SIZE as usize];
        registry.read_pool(live, registry.page(page), &mut old)?;
        if old != filler() {
            changes.push(Change::replace(
                format!("pool page {page}"),
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
    registry.read_pool(live, gpa, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
