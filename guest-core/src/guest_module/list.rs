//! The kernel's doubly linked lists (`struct list_head`, include/linux/types.h): insertion and removal as changes of words.

use super::words::{WORD, Words};
use crate::addr::Gva;
use crate::kernel::KernelError;

/// Offset of `prev` in `struct list_head`; `next` is in front.
const PREV: u64 = WORD;

/// Inserts `node` at the front of the list at `head`.
pub(super) fn add_first(words: &mut Words<'_>, head: Gva, node: Gva) -> Result<(), KernelError> {
    let first = Gva(words.get(head)?);
    words.set(node, first.0)?;
    words.set(node.wrapping_add(PREV), head.0)?;
    words.set(first.wrapping_add(PREV), node.0)?;
    words.set(head, node.0)
}

/// Makes `head` an empty list.
pub(super) fn init(words: &mut Words<'_>, head: Gva) -> Result<(), KernelError> {
    words.set(head, head.0)?;
    words.set(head.wrapping_add(PREV), head.0)
}

/// Removes `node` from its list. After half of an insertion or removal, one neighbour or none points at `node`: only a neighbour that does
/// is changed. One whose memory is not mapped any more does not: while `node` was not linked, the guest could free it.
pub(super) fn remove(words: &mut Words<'_>, node: Gva) -> Result<(), KernelError> {
    let (next, previous) = (Gva(words.get(node)?), Gva(words.get(node.wrapping_add(PREV))?));
    if words.get_mapped(previous)? == Some(node.0) {
        words.set(previous, next.0)?;
    }
    if words.get_mapped(next.wrapping_add(PREV))? == Some(node.0) {
        words.set(next.wrapping_add(PREV), previous.0)?;
    }
    Ok(())
}
