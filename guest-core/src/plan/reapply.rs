//! Bringing a patch back into force that was reverted and whose code was kept: in its old place, with its variables as they are.
//! The guest may hold pointers to both, and each new copy would take room until the guest reboots.

use super::redirects::{self, Redirects};
use super::{Plan, Refusal, known};
use crate::addr::Gva;
use crate::kernel::Live;
use crate::kernel::resolve::GuestSymbols;
use crate::module::{LinkedFunction, Note, Patch};
use crate::place::{Record, Registry, State};
use crate::reads::Preconditions;

/// Plans to bring the patch of that name and digest back into force. `None` where there is none whose code was kept, or where it
/// does not fit any more as it is: it becomes a new copy then.
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
    let Some(module) = &record.known else { return Ok(None) };
    // The name must be free again, too.
    known::layout(live, id)?;
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
        occupied,
    } = redirects::plan(live, symbols, registry, note, &functions)?;
    // A function that is traced now, and was not then, is redirected elsewhere, which the record does not say.
    if functions != record.functions || changes != record.changes {
        return Ok(None);
    }
    let mut paused: Vec<_> = module.rename(live, id)?.into_iter().collect();
    paused.extend(changes);
    paused.push(registry.state_change(entry.slot, State::Reapplying, State::Applied));
    Ok(Some(Plan {
        before: vec![registry.state_change(entry.slot, State::Kept, State::Reapplying)],
        paused,
        requires: Preconditions::default(),
        occupied,
        unread: Gva(0)..Gva(0),
        laid: registry.laid_code(),
        record: record.clone(),
    }))
}

/// True where a patch is of the very functions that the record is of: an earlier part of the same module may have been of others.
fn replaces_the_same(record: &Record, patch: &Patch) -> bool {
    let functions = patch.objects.iter().flat_map(|object| {
        let of = move |function| (object.name.as_deref(), function);
        object.functions.iter().map(of)
    });
    let named = functions.map(|(object, function)| (object, function.old_name.as_str(), function.sympos));
    let recorded = record.functions.iter();
    named.eq(recorded.map(|function| (function.object.as_deref(), function.name.as_str(), function.sympos)))
}
