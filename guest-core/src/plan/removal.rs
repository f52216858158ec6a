//! Plans to take a patch out of force: a revert, and the recovery of a commit that was cut off.

use super::replace::{Replaced, Restored};
use super::{Marks, Plan, RevertError, guard, registration, targets};
use crate::addr::{Gpa, Gva};
use crate::change::{Change, ChangeError};
use crate::kernel::livepatch::{self, Held};
use crate::kernel::{KernelError, Live, ftrace, modules, sites, tracers};
use crate::paging::PAGE_SIZE;
use crate::reads::Preconditions;
use crate::registry::{Entry, FILLER, PatchedFunction, Record, Redirect, Registry, State};
use crate::trampoline::TRAMPOLINE_BYTES;
use crate::transaction::recovery::{Keep, Sites};
use crate::unwind::OldFunction;
use std::collections::BTreeSet;
use std::ops::Range;

/// A patch that is taken out of force.
#[derive(Clone, Copy)]
pub(super) struct Removal<'a> {
    pub live: &'a Live<'a>,
    pub registry: &'a Registry,
    pub entry: &'a Entry,
    pub record: &'a Record,
}

/// The changes for a patch's code, the functions that must be quiescent for them, and the memory that must be unreferenced.
type Code = (Vec<Change>, Vec<OldFunction>, Range<Gva>);

impl Removal<'_> {
    /// What the sites hold.
    pub fn sites(&self) -> Result<Sites, KernelError> {
        let changes = Replaced::cut_off_by(self.registry, self.entry).redirected_by(self.record)?;
        let mut is_new = !changes.is_empty();
        for change in &changes {
            is_new &= change.is_made_now(self.live).map_err(unreadable)?;
        }
        if is_new {
            return Ok(Sites::New);
        }
        for jump in changes.iter().filter(|change| !change.is_of_bits()) {
            if restored(self.live, jump)?.is_some() {
                return Ok(Sites::Mixed);
            }
        }
        Ok(Sites::Old)
    }

    /// Plans the removal in one pause, from the state that the registry has then. The sites of a patch in force must hold what a commit wrote.
    /// Where a commit was cut off, other bytes are the guest's, and stay.
    ///
    /// # Errors
    ///
    /// The guest uses the patch, or cannot be read.
    pub fn plan(&self, from: State, keep: Keep) -> Result<Plan, RevertError> {
        let Self {
            live,
            registry,
            entry,
            record,
        } = *self;
        let in_force = entry.state == State::Applied;
        guard::require_survival::<RevertError>(live)?;
        let replaced = Replaced::cut_off_by(registry, entry);
        // Where another patch has replaced it, the sites are that one's or the guest's.
        let sites = match entry.state {
            State::Replaced => Vec::new(),
            _ => replaced.redirected_by(record)?,
        };
        self.require_untraced(&sites, in_force)?;
        let mut atomic = match in_force {
            true => self.sites_in_force(),
            false => self.restored_sites(&sites)?,
        };
        let Restored { changes, original } = replaced.restored(live, registry, record)?;
        atomic.extend(changes);
        let keeps = self.keeps(keep)?;
        let (code, mut must_be_quiescent, unreferenced) = match keeps {
            true => self.keep()?,
            false => self.wipe(matches!(
                entry.state,
                State::Applied | State::Replaced | State::Transition
            ))?,
        };
        must_be_quiescent.extend(original);
        atomic.extend(code);
        let after = if keeps { State::Kept } else { State::Reverted };
        atomic.push(registry.state_change(entry.slot, from, after));
        Ok(Plan {
            staged: Vec::new(),
            atomic,
            sites,
            requires: Preconditions::default(),
            must_be_quiescent,
            unreferenced,
            patch_code: registry.patch_code(),
            marks: Marks::Leave,
            record: record.clone(),
        })
    }

    fn keeps(&self, keep: Keep) -> Result<bool, KernelError> {
        let references = match &self.record.registration {
            Some(module) if keep == Keep::IfUsed => module.references(self.live)?,
            _ => 0,
        };
        Ok(match keep {
            Keep::Never => false,
            Keep::IfHandedOut => self.record.must_stay(),
            Keep::IfUsed => self.record.must_stay() || references != 0,
            Keep::Always => true,
        })
    }

    /// Plans to restore the sites of a patch that is in force.
    fn sites_in_force(&self) -> Vec<Change> {
        let (bits, jumps) = bits_and_jumps(&self.record.changes);
        let undone = bits.into_iter().chain(jumps).map(Change::undone);
        // A change that cannot be read here fails in the commit.
        undone
            .filter(|change| !matches!(change.is_made_now(self.live), Ok(true)))
            .collect()
    }

    /// Plans to restore what a patch that was cut off has changed in functions and their ftrace records.
    ///
    /// Bits are set behind the jumps, and cleared in front of them. Where no jump is there, they are the guest's: it may have unloaded the
    /// module whose records they were of, and anything may lie there now.
    fn restored_sites(&self, changes: &[Change]) -> Result<Vec<Change>, KernelError> {
        let restored = |change| restored(self.live, change);
        let (bits, jumps) = bits_and_jumps(changes);
        let mut all = Vec::new();
        for jump in jumps {
            all.extend(restored(jump)?);
        }
        if all.is_empty() {
            return Ok(all);
        }
        let mut first = Vec::new();
        for bit in bits {
            first.extend(restored(bit)?);
        }
        first.append(&mut all);
        Ok(first)
    }

    /// Keeps the code, and renames its module in the guest.
    fn keep(&self) -> Result<Code, RevertError> {
        let Self { live, record, .. } = *self;
        let module = record.registration.as_ref();
        let renamed = module
            .map(|module| module.rename(live, &record.kept_name()))
            .transpose()?;
        let changes = renamed.flatten().into_iter().collect();
        Ok((changes, replacements(live, record)?, Gva(0)..Gva(0)))
    }

    /// Wipes the code, and unregisters its module from the guest.
    fn wipe(&self, is_registered: bool) -> Result<Code, RevertError> {
        let Self { live, record, .. } = *self;
        let id = &record.id;
        let text = whole_text(record);
        if let Some(at) = sites::probe_in(live, &text.code)? {
            return Err(RevertError::Probed { id: id.clone(), at });
        }
        // All code comes first: from then on, a supervisor can make what is left.
        let mut changes = vec![self.wipe_text()?];
        if let Some(module) = &record.registration {
            registration::require_unused(live, id, module)?;
            registration::require_untraced(live, module)?;
            changes.extend(registration::unlist(live, id, module)?);
            let doubtful = (!is_registered).then(|| record.memory());
            changes.extend(registration::unregister(live, module, doubtful)?);
            changes.extend(registration::free_per_cpu(live, module)?);
        }
        Ok((changes, vec![text], record.registered_memory()))
    }

    /// Requires that no tracer was started on a function whose ftrace record these changes of `sites` have disabled.
    fn require_untraced(&self, sites: &[Change], in_force: bool) -> Result<(), RevertError> {
        let places: BTreeSet<Gpa> = sites.iter().map(Change::gpa).collect();
        let own = |change: &Change| places.contains(&change.gpa());
        for (function, changes) in self.record.changes_by_function() {
            let (bits, jumps): (Vec<_>, Vec<_>) = changes.iter().partition(|change| change.is_of_bits());
            if bits.is_empty() || !changes.iter().any(own) {
                continue;
            }
            let mut has_jump = in_force;
            for jump in jumps {
                has_jump = has_jump || restored(self.live, jump)?.is_some();
            }
            if has_jump {
                require_untraced(self.live, function)?;
            }
        }
        Ok(())
    }

    /// Plans filler over the patch's text. The record says how many bytes of the entry's first pages are text.
    fn wipe_text(&self) -> Result<Change, KernelError> {
        let Self {
            live,
            registry,
            entry,
            record,
        } = *self;
        let pages = record.text.len.div_ceil(PAGE_SIZE).min(entry.pages.count);
        let mut old = vec![0; usize::try_from(record.text.len.min(pages * PAGE_SIZE)).unwrap_or(0)];
        let (gpa, at) = (registry.page(entry.pages.first), registry.mapped(entry.pages.first));
        live.memory
            .read(gpa, &mut old)
            .map_err(|source| KernelError::Unreadable {
                what: "the patch's text",
                at,
                source,
            })?;
        let filler = vec![FILLER; old.len()];
        Ok(Change::replace("the patch's text", gpa, old, filler))
    }
}

/// Requires that no tracer was started on a function that a patch has redirected in its site.
///
/// ftrace does not count the tracers that start while a record is disabled. If one of them ended after the record is enabled again,
/// ftrace would count below zero, warn, and turn itself off for good (`__ftrace_hash_rec_update`, kernel/trace/ftrace.c).
pub(super) fn require_untraced(live: &Live<'_>, function: &PatchedFunction) -> Result<(), RevertError> {
    if function.redirect != Redirect::Ftrace {
        return Ok(());
    }
    match ftrace::record(live, Gva(function.old))? {
        Some(site) if tracers::is_wanted(live, site.site)? => {
            let function = (function.name.clone(), Gva(function.old));
            Err(wanted(live, function)?)
        }
        _ => Ok(()),
    }
}

/// The new functions and their split parts: what must be quiescent where functions lead elsewhere and the code stays. A thread or timer of the
/// patch's own does not block that.
pub(super) fn replacements(live: &Live<'_>, record: &Record) -> Result<Vec<OldFunction>, KernelError> {
    replacements_among(live, record, &record.functions)
}

/// The same for some of the patch's functions.
pub(super) fn replacements_among(
    live: &Live<'_>,
    record: &Record,
    functions: &[PatchedFunction],
) -> Result<Vec<OldFunction>, KernelError> {
    let Some(module) = modules::containing(live, Gva(record.text.start))? else {
        return Ok(vec![whole_text(record)]);
    };
    let symbols = modules::symbols(&live.constant(), &module)?;
    let parts = functions.iter().flat_map(|function| {
        let at = Gva(function.new);
        let symbol = symbols.iter().find(|symbol| symbol.address == at && symbol.size != 0);
        let name = symbol.map_or(function.name.as_str(), |symbol| symbol.name.as_str());
        let parts = targets::module_parts(&symbols, name, at, function.new_len);
        parts.into_iter().chain(trampoline_of(function))
    });
    Ok(parts.collect())
}

/// A function's trampoline.
pub(super) fn trampoline_of(function: &PatchedFunction) -> Option<OldFunction> {
    let at = Gva(function.trampoline?);
    Some(OldFunction {
        name: format!("the trampoline of {}", function.name),
        code: at..at.wrapping_add(TRAMPOLINE_BYTES),
    })
}

/// All of a patch's code.
fn whole_text(record: &Record) -> OldFunction {
    OldFunction {
        name: format!("the new code of {}", record.id),
        code: Gva(record.text.start)..Gva(record.text.start.saturating_add(record.text.len)),
    }
}

/// The error for a function, given by name and address, that a livepatch of the guest's own or a tracer uses.
fn wanted(live: &Live<'_>, (function, at): (String, Gva)) -> Result<RevertError, KernelError> {
    let held = livepatch::held(live)?;
    Ok(match Held::last_of(&held, at) {
        Some(held) => RevertError::OwnLivepatch {
            function,
            livepatch: held.livepatch.clone(),
        },
        None => RevertError::Traced { function },
    })
}

/// The bits of ftrace records, and the jumps, each in the order in which they are undone. A jump that has its bit needs it until it is gone.
fn bits_and_jumps(changes: &[Change]) -> (Vec<&Change>, Vec<&Change>) {
    changes.iter().rev().partition(|change| change.is_of_bits())
}

/// The change that restores what was there: old, new, or cut in the middle, whatever is there becomes old.
pub(super) fn restored(live: &Live<'_>, change: &Change) -> Result<Option<Change>, KernelError> {
    change.restoration(live, change.what()).map_err(unreadable)
}

fn unreadable(source: ChangeError) -> KernelError {
    KernelError::Restore {
        what: "a site of a patch that was cut off",
        source,
    }
}
