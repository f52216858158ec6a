//! Verifies that the guest runs the code that a patch was made for, where the module carries that code
//! ([`Note`](crate::module::Note)).

use super::Refusal;
use super::stack::Holder;
use crate::addr::Gva;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::module::{LinkedFunction, Note};

/// Compares the code at `old` with the code that the note has for `function`. The jump of `bottom`, the first patch that holds the function,
/// is not compared. Without a note, or without the function in it, there is nothing to compare: the caller reports that.
///
/// # Errors
///
/// [`Refusal::OtherCode`] with the first byte that differs.
pub(super) fn check(
    live: &Live<'_>,
    note: Option<&Note>,
    function: &LinkedFunction,
    old: Gva,
    bottom: Option<&Holder<'_>>,
) -> Result<(), Refusal> {
    let name = &function.old_name;
    let object = function.object.as_deref();
    let Some(noted) = note.and_then(|note| note.function(name, function.sympos, object)) else {
        return Ok(());
    };
    let mut code = vec![0; noted.code.len()];
    live.constant()
        .read(old, &mut code)
        .map_err(|source| KernelError::Unreadable {
            what: "code that the patch was made for",
            at: old,
            source,
        })?;
    if let Some(bottom) = bottom {
        bottom.uncover(old, &mut code)?;
    }
    match noted.code.mismatch(&code) {
        None => Ok(()),
        Some(mismatch) => Err(Refusal::OtherCode {
            function: name.clone(),
            offset: mismatch.offset,
            at: old.wrapping_add(u64::try_from(mismatch.offset).unwrap_or(0)),
            found: mismatch.found.unwrap_or(0),
            expected: mismatch.expected,
        }),
    }
}
