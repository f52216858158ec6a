//! Plans to take a patch out of force: a revert, and the recovery of a commit that was cut off.

use super::{Plan, RevertError, guard, registration, targets};
use crate::addr::Gva;
use crate::change::{Change, ChangeError};
use crate::kernel::livepatch::{self, Held};
use crate::kernel::{KernelError, Live, ftrace, modules, sites, tracers};
use crate::paging::PAGE_SIZE;
use crate::reads::Preconditions;
use crate::registry::{Entry, FILLER, PatchedFunction, Record, Redirect, Registry, State};
use crate::transaction::recovery::{Keep, Sites};
use crate::unwind::OldFunction;
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
        let mut is_new = !self.record.changes.is_empty();
        for change in &self.record.changes {
            is_new &= change.is_made_now(self.live).map_err(unreadable)?;
        }
        if is_new {
            return Ok(Sites::New);
        }
        for function in &self.record.functions {
            if self.has_jump(function)? {
                return Ok(Sites::Mixed);
            }
        }
        Ok(Sites::Old)
    }

    /// True where the function's site holds the jump, or a part of it.
    fn has_jump(&self, function: &PatchedFunction) -> Result<bool, KernelError> {
        let mut changes = self.record.changes.iter();
        let jump = changes.find(|change| change.gpa().0 == function.jump);
        let restored = jump.map(|jump| jump.restoration(self.live, jump.what())).transpose();
        Ok(restored.map_err(unreadable)?.flatten().is_some())
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
        self.require_untraced(in_force)?;
        let mut atomic = match in_force {
            true => self.sites_in_force(),
            false => self.restored_sites()?,
        };
        let keeps = self.keeps(keep)?;
        let (code, must_be_quiescent, unreferenced) = match keeps {
            true => self.keep()?,
            false => self.wipe(in_force)?,
        };
        atomic.extend(code);
        let after = if keeps { State::Kept } else { State::Reverted };
        atomic.push(registry.state_change(entry.slot, from, after));
        Ok(Plan {
            staged: Vec::new(),
            atomic,
            requires: Preconditions::default(),
            must_be_quiescent,
            unreferenced,
            patch_code: registry.patch_code(),
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

    /// The bits of ftrace records, and the jumps, each in the order in which they are undone. A jump that has its bit needs it until it is gone.
    fn bits_and_jumps(&self) -> (Vec<&Change>, Vec<&Change>) {
        self.record.changes.iter().rev().partition(|change| change.is_of_bits())
    }

    /// Plans to restore the sites of a patch that is in force.
    fn sites_in_force(&self) -> Vec<Change> {
        let (bits, jumps) = self.bits_and_jumps();
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
    fn restored_sites(&self) -> Result<Vec<Change>, KernelError> {
        // Old, new, or cut in the middle: whatever is there becomes old.
        let restored = |change: &Change| change.restoration(self.live, change.what()).map_err(unreadable);
        let (bits, jumps) = self.bits_and_jumps();
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
        Ok((changes, self.replacements()?, Gva(0)..Gva(0)))
    }

    /// Wipes the code, and unregisters its module from the guest.
    fn wipe(&self, in_force: bool) -> Result<Code, RevertError> {
        let Self { live, record, .. } = *self;
        let id = &record.id;
        let text = self.whole_text();
        if let Some(at) = sites::probe_in(live, &text.code)? {
            return Err(RevertError::Probed { id: id.clone(), at });
        }
        // All code comes first: from then on, a supervisor can make what is left.
        let mut changes = vec![self.wipe_text()?];
        if let Some(module) = &record.registration {
            registration::require_unused(live, id, module)?;
            registration::require_untraced(live, module)?;
            changes.extend(registration::unlist(live, id, module)?);
            let doubtful = (!in_force).then(|| record.memory());
            changes.extend(registration::unregister(live, module, doubtful)?);
            changes.extend(registration::free_per_cpu(live, module)?);
        }
        Ok((changes, vec![text], record.registered_memory()))
    }

    /// The new functions and their split parts: what must be quiescent for a revert that keeps the code. A thread or timer of the patch's own
    /// does not block such a revert.
    fn replacements(&self) -> Result<Vec<OldFunction>, KernelError> {
        let Self { live, record, .. } = *self;
        let Some(module) = modules::containing(live, Gva(record.text.start))? else {
            return Ok(vec![self.whole_text()]);
        };
        let symbols = modules::symbols(&live.constant(), &module)?;
        let parts = record.functions.iter().flat_map(|function| {
            let at = Gva(function.new);
            let symbol = symbols.iter().find(|symbol| symbol.address == at && symbol.size != 0);
            let name = symbol.map_or(function.name.as_str(), |symbol| symbol.name.as_str());
            targets::module_parts(&symbols, name, at, function.new_len)
        });
        Ok(parts.collect())
    }

    /// All of the patch's code.
    fn whole_text(&self) -> OldFunction {
        let record = self.record;
        OldFunction {
            name: format!("the new code of {}", record.id),
            code: Gva(record.text.start)..Gva(record.text.start.saturating_add(record.text.len)),
        }
    }

    /// Requires that no tracer was started on an old function since it was redirected in its site.
    ///
    /// ftrace does not count the tracers that start while a record is disabled. If one of them ended after the revert has enabled the record,
    /// ftrace would count below zero, warn, and turn itself off for good (`__ftrace_hash_rec_update`, kernel/trace/ftrace.c).
    fn require_untraced(&self, in_force: bool) -> Result<(), RevertError> {
        let Self { live, record, .. } = *self;
        for function in record.functions.iter().filter(|f| f.redirect == Redirect::Ftrace) {
            if !in_force && !self.has_jump(function)? {
                continue;
            }
            let Some(site) = ftrace::record(live, Gva(function.old))? else {
                continue;
            };
            if tracers::is_wanted(live, site.site)? {
                let function = (function.name.clone(), Gva(function.old));
                return Err(wanted(live, function)?);
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

fn unreadable(source: ChangeError) -> KernelError {
    KernelError::Restore {
        what: "a site of a patch that was cut off",
        source,
    }
}
