//! Walks the kernel's doubly linked lists (`struct list_head`) with a bound: in a running or hostile guest they may lead anywhere.

use super::error::SetupError;
use super::view::KernelView;
use crate::addr::Gva;

/// Offset of `prev` in `struct list_head`.
const PREV: u64 = 8;

/// The addresses of the elements of the list at `head`, from first to last. The list node is `node` bytes into each element.
///
/// # Errors
///
/// A node cannot be read, or the list has more than `max` elements.
pub(crate) fn forward(
    view: &dyn KernelView,
    what: &'static str,
    head: Gva,
    node: u64,
    max: usize,
) -> Result<Vec<Gva>, SetupError> {
    let mut elements = Vec::new();
    let mut at = head;
    loop {
        let next = view
            .read_u64(at)
            .map_err(|source| SetupError::Unreadable { what, at, source })?;
        if next == head.0 {
            return Ok(elements);
        }
        if elements.len() == max {
            return Err(endless(what, max));
        }
        elements.push(Gva(next.wrapping_sub(node)));
        at = Gva(next);
    }
}

/// The addresses of the elements of the list at `head`, from the last one back to the first for which `stop` is true, without that one.
///
/// # Errors
///
/// As [`forward`].
pub(crate) fn backward(
    view: &dyn KernelView,
    what: &'static str,
    head: Gva,
    node: u64,
    max: usize,
    stop: &dyn Fn(Gva) -> bool,
) -> Result<Vec<Gva>, SetupError> {
    let mut elements = Vec::new();
    let mut at = head;
    loop {
        let place = at.wrapping_add(PREV);
        let previous = view.read_u64(place).map_err(|source| SetupError::Unreadable {
            what,
            at: place,
            source,
        })?;
        let element = Gva(previous.wrapping_sub(node));
        if previous == head.0 || stop(element) {
            return Ok(elements);
        }
        if elements.len() == max {
            return Err(endless(what, max));
        }
        elements.push(element);
        at = Gva(previous);
    }
}

fn endless(what: &'static str, max: usize) -> SetupError {
    let (found, expected) = (format!("more than {max} elements"), "an end".to_owned());
    SetupError::NotUnderstood { what, found, expected }
}
