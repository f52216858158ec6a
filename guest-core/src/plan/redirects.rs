//! The redirects of a patch: from each old function to its new one.

use super::{Refusal, old, old_code};
use crate::change::Change;
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{Live, livepatch};
use crate::module::{LinkedFunction, Note};
use crate::place::{PatchedFunction, Registry};
use crate::redirect::redirect;
use crate::unwind::OldFunction;

/// What the redirects are.
#[derive(Debug, Default)]
pub(super) struct Redirects {
    /// For the record.
    pub functions: Vec<PatchedFunction>,
    /// At the old functions' beginnings.
    pub changes: Vec<Change>,
    /// The old functions, with what the compiler split off them.
    pub occupied: Vec<OldFunction>,
}

/// Finds the old function of each of `functions`, makes sure that it is the one which the patch was made for, and plans its redirect.
pub(super) fn plan(
    live: &Live<'_>,
    symbols: &GuestSymbols<'_>,
    registry: &Registry,
    note: Option<&Note>,
    functions: &[LinkedFunction],
) -> Result<Redirects, Refusal> {
    let held = livepatch::held(live)?;
    let mut redirects = Redirects::default();
    for function in functions {
        let old::Old { at, len, parts } = old::find(live, symbols, registry, function)?;
        old_code::check(live, note, function, at)?;
        let (kind, sites) = redirect(live, &function.old_name, at, len, function.new, &held)?;
        let jump = sites.first().map_or(0, |change| change.gpa().0);
        redirects.changes.extend(sites);
        redirects.occupied.extend(parts);
        redirects.functions.push(PatchedFunction {
            object: function.object.clone(),
            name: function.old_name.clone(),
            sympos: function.sympos,
            old: at.0,
            old_len: len,
            new: function.new.0,
            new_len: function.size,
            redirect: kind,
            jump,
        });
    }
    Ok(redirects)
}
