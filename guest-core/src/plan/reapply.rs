//! Applies a patch again whose code a revert has kept: at its old addresses, with its variables as they are. The guest may hold pointers
//! to code and variables, and each new copy would take space until the guest reboots.

use super::redirects::{self, HeldByOthers, Redirects};
use super::{Marks, Plan, Refusal, registration};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::Live;
use crate::kernel::resolve::GuestSymbols;
use crate::module::{LinkedFunction, Note, Patch};
use crate::reads::Preconditions;
use crate::registry::{PatchedFunction, Record, Registry, State};

/// Plans to apply the kept patch of that name and digest again. `None` where no such patch is kept, or where it does not fit as it is: the
/// caller then applies a new copy.
pub(super) fn plan(
    live: &Live<'_>,
    symbols: &GuestSymbols<'_>,
    registry: &Registry,
    (id, digest, note): (&str, &str, Option<&Note>),
    patch: &Patch,
) -> Result<Option<Plan>, Refusal> {
    let mut kept = registry.kept();
    let same = |record: &Record| record.id == id && record.digest == digest && replaces_the_same(record, patch);
    let Some((entry, record)) = kept.find(|(_, record)| same(record)) else {
        return Ok(None);
    };
    let Some(module) = &record.registration else {
        return Ok(None);
    };
    // No other module may have taken the name since.
    registration::layout(live, id)?;
    let functions = record.functions.iter().map(|function| LinkedFunction {
        object: function.object.clone(),
        old_name: function.name.clone(),
        sympos: function.sympos,
        new: Gva(function.new),
        size: function.new_len,
    });
    let functions: Vec<_> = functions.collect();
    let Redirects {
        functions,
        changes,
        must_be_quiescent,
        ..
    } = redirects::plan(live, symbols, registry, note, &functions, HeldByOthers::Cover)?;
    // A function that is traced now, but was not then, is redirected at another address than the record says.
    let without_trampoline = |function: &PatchedFunction| PatchedFunction {
        trampoline: None,
        ..function.clone()
    };
    let recorded: Vec<_> = record.functions.iter().map(without_trampoline).collect();
    let direct: Vec<_> = record.changes.iter().map(Change::without_via).collect();
    if functions != recorded || changes != direct {
        return Ok(None);
    }
    let mut atomic: Vec<_> = module.rename(live, id)?.into_iter().collect();
    atomic.extend(changes);
    atomic.push(registry.state_change(entry.slot, State::Reapplying, State::Applied));
    Ok(Some(Plan {
        staged: vec![registry.state_change(entry.slot, State::Kept, State::Reapplying)],
        atomic,
        sites: record.changes.clone(),
        requires: Preconditions::default(),
        must_be_quiescent,
        unreferenced: Gva(0)..Gva(0),
        patch_code: registry.patch_code(),
        marks: Marks::Leave,
        record: record.clone(),
    }))
}

/// True where the patch replaces exactly the record's functions. An earlier part of the same module may have replaced others.
fn replaces_the_same(record: &Record, patch: &Patch) -> bool {
    let functions = patch.objects.iter().flat_map(|object| {
        let of = move |function| (object.name.as_deref(), function);
        object.functions.iter().map(of)
    });
    let named = functions.map(|(object, function)| (object, function.old_name.as_str(), function.sympos));
    let recorded = record.functions.iter();
    named.eq(recorded.map(|function| (function.object.as_deref(), function.name.as_str(), function.sympos)))
}
