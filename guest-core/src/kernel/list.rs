//! The kernel's lists, walked with a bound: the guest may have made them cyclic or endless.

use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// More elements than any list that is walked here has.
const ELEMENTS_MAX: usize = 1 << 16;

/// The elements of a `list_head` at `head`: each one's address, where its node lies `node` bytes into it.
pub fn walk(live: &Live<'_>, what: &'static str, head: Gva, node: u64) -> Result<Vec<Gva>, KernelError> {
    chain(live, what, head, head.0, node)
}

/// The elements of a `hlist_head` at `head`, likewise.
pub fn walk_hlist(live: &Live<'_>, what: &'static str, head: Gva, node: u64) -> Result<Vec<Gva>, KernelError> {
    chain(live, what, head, 0, node)
}

fn chain(live: &Live<'_>, what: &'static str, head: Gva, end: u64, node: u64) -> Result<Vec<Gva>, KernelError> {
    let mut elements = Vec::new();
    let mut at = head;
    loop {
        let next = live
            .read_u64(at)
            .map_err(|source| KernelError::Unreadable { what, at, source })?;
        if next == end {
            return Ok(elements);
        }
        if elements.len() == ELEMENTS_MAX {
            return Err(KernelError::Disagrees {
                what,
                found: format!("more than {ELEMENTS_MAX} elements"),
                expected: "an end".to_owned(),
            });
        }
        elements.push(Gva(next.wrapping_sub(node)));
        at = Gva(next);
    }
}
