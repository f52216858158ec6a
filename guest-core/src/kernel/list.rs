//! Walks the kernel's lists with a bound: the guest may have made them cyclic or endless.

use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Most elements of all lists of one walk.
const ELEMENTS_MAX: usize = 1 << 16;

/// Walks lists, and lists of lists, with one bound for all of them.
pub struct Walker<'a> {
    live: Live<'a>,
    left: usize,
}

impl<'a> Walker<'a> {
    /// Starts a walk.
    pub fn new(live: &Live<'a>) -> Self {
        let left = ELEMENTS_MAX;
        Self { live: *live, left }
    }

    /// The addresses of the elements of the `list_head` at `head`. The list node is `node` bytes into each element.
    pub fn list(&mut self, what: &'static str, head: Gva, node: u64) -> Result<Vec<Gva>, KernelError> {
        self.chain(what, head, head.0, node)
    }

    /// The same for the `hlist_head` at `head`.
    pub fn hlist(&mut self, what: &'static str, head: Gva, node: u64) -> Result<Vec<Gva>, KernelError> {
        self.chain(what, head, 0, node)
    }

    fn chain(&mut self, what: &'static str, head: Gva, end: u64, node: u64) -> Result<Vec<Gva>, KernelError> {
        let mut elements = Vec::new();
        let mut at = head;
        loop {
            let next = self
                .live
                .read_u64(at)
                .map_err(|source| KernelError::Unreadable { what, at, source })?;
            if next == end {
                return Ok(elements);
            }
            self.left = self.left.checked_sub(1).ok_or_else(|| KernelError::Disagrees {
                what,
                found: format!("more than {ELEMENTS_MAX} elements"),
                expected: "an end".to_owned(),
            })?;
            elements.push(Gva(next.wrapping_sub(node)));
            at = Gva(next);
        }
    }
}
