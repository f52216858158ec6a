//! Plans the redirects of a patch, from each old function to its new one.

use super::stack::{Holder, Holders};
use super::{Refusal, removal, targets, verify_code};
use crate::addr::Gva;
use crate::change::Change;
use crate::kernel::Live;
use crate::kernel::livepatch::{self, Held};
use crate::kernel::resolve::GuestSymbols;
use crate::module::{LinkedFunction, Note};
use crate::redirect::{redirect, require_no_livepatch};
use crate::registry::{PatchedFunction, Redirect, Registry};
use crate::unwind::OldFunction;

/// The redirects of a patch.
#[derive(Debug, Default)]
pub(super) struct Redirects {
    /// The functions, as the record keeps them.
    pub functions: Vec<PatchedFunction>,
    /// The changes that redirect the functions.
    pub changes: Vec<Change>,
    /// The changes that a revert undoes.
    pub recorded: Vec<Change>,
    /// The old functions and their split parts; of a function that other patches hold, theirs too.
    pub must_be_quiescent: Vec<OldFunction>,
    /// The code of the patch that holds each function, which runs until now; `None` where the kernel's own does.
    pub covered: Vec<Option<Gva>>,
}

/// What a patch does to functions that other patches hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum HeldByOthers {
    /// It covers them: a revert leads them to the other patch's code again.
    Cover,
    /// It replaces the other patches: a revert restores the kernel's own code.
    Replace,
    /// It leaves them: the other patches came later than the first part of this one.
    Refuse,
}

/// Finds the old function of each of `functions`, verifies its code, and plans its redirect.
pub(super) fn plan(
    live: &Live<'_>,
    symbols: &GuestSymbols<'_>,
    registry: &Registry,
    note: Option<&Note>,
    functions: &[LinkedFunction],
    others: HeldByOthers,
) -> Result<Redirects, Refusal> {
    let own = livepatch::held(live)?;
    let holders = Holders::of(registry.records());
    let mut redirects = Redirects::default();
    for function in functions {
        let targets::Target { at, len, parts } = targets::find(live, symbols, function)?;
        let holders = holders.at(at.0);
        verify_code::check(live, note, function, at, holders.first())?;
        let redirected = match holders {
            [] => free(live, function, (at, len), &own)?,
            [bottom, .., top] => held(live, function, (bottom, top), others, &own)?,
            [only] => held(live, function, (only, only), others, &own)?,
        };
        for Holder { record, function, .. } in holders {
            let parts = removal::replacements_among(live, record, std::slice::from_ref(function))?;
            redirects.must_be_quiescent.extend(parts);
        }
        let jump = redirected.changes.first().map_or(0, |change| change.gpa().0);
        redirects.changes.extend(redirected.changes);
        redirects.recorded.extend(redirected.recorded);
        redirects.must_be_quiescent.extend(parts);
        redirects.functions.push(PatchedFunction {
            object: function.object.clone(),
            name: function.old_name.clone(),
            sympos: function.sympos,
            old: at.0,
            old_len: len,
            new: function.new.0,
            new_len: function.size,
            redirect: redirected.kind,
            jump,
            trampoline: None,
        });
        redirects.covered.push(holders.last().map(|top| Gva(top.function.new)));
    }
    Ok(redirects)
}

/// The redirect of one function.
struct Redirected {
    kind: Redirect,
    changes: Vec<Change>,
    recorded: Vec<Change>,
}

/// Redirects a function that no patch holds, `len` bytes at `at`.
fn free(
    live: &Live<'_>,
    function: &LinkedFunction,
    (at, len): (Gva, u64),
    own: &[Held],
) -> Result<Redirected, Refusal> {
    let (kind, changes) = redirect(live, &function.old_name, at, len, function.new, own)?;
    let recorded = changes.clone();
    Ok(Redirected {
        kind,
        changes,
        recorded,
    })
}

/// Redirects a function that other patches hold. The code of the one on top runs.
fn held(
    live: &Live<'_>,
    function: &LinkedFunction,
    (bottom, top): (&Holder<'_>, &Holder<'_>),
    others: HeldByOthers,
    own: &[Held],
) -> Result<Redirected, Refusal> {
    require_no_livepatch(&function.old_name, Gva(top.function.old), own)?;
    top.require_in_place(live)?;
    let changes = top.led_to(function.new)?;
    let recorded = match others {
        HeldByOthers::Cover => changes.clone(),
        HeldByOthers::Replace => bottom.and_then(top, &changes)?,
        HeldByOthers::Refuse => {
            let (function, id) = (function.old_name.clone(), top.record.id.clone());
            return Err(Refusal::Held { function, id });
        }
    };
    Ok(Redirected {
        kind: top.function.redirect,
        changes,
        recorded,
    })
}
