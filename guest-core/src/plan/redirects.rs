//! Plans the redirects of a patch, from each old function to its new one.

use super::{Refusal, targets, verify_code};
use crate::change::Change;
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{Live, livepatch};
use crate::module::{LinkedFunction, Note};
use crate::redirect::redirect;
use crate::registry::{PatchedFunction, Registry};
use crate::unwind::OldFunction;

/// The redirects of a patch.
#[derive(Debug, Default)]
pub(super) struct Redirects {
    /// The functions, as the record keeps them.
    pub functions: Vec<PatchedFunction>,
    /// The changes that redirect the old functions.
    pub changes: Vec<Change>,
    /// The old functions and their split parts.
    pub must_be_quiescent: Vec<OldFunction>,
}

/// Finds the old function of each of `functions`, verifies its code, and plans its redirect.
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
        let targets::Target { at, len, parts } = targets::find(live, symbols, registry, function)?;
        verify_code::check(live, note, function, at)?;
        let (kind, sites) = redirect(live, &function.old_name, at, len, function.new, &held)?;
        let jump = sites.first().map_or(0, |change| change.gpa().0);
        redirects.changes.extend(sites);
        redirects.must_be_quiescent.extend(parts);
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
