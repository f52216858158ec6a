//! The stacks that one context may use, and the rule that each is used once and upwards.

use crate::addr::Gva;
use std::ops::Range;

/// What a stack is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StackKind {
    /// A task's own.
    Task,
    /// A CPU's, for hardware and software interrupts.
    Irq,
    /// A CPU's, for NMI, debug, double fault, machine check.
    Exception,
    /// A CPU's few words for entering from user mode.
    Entry,
}

/// One stack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// What it is for.
    pub kind: StackKind,
    /// All of it, from the lowest address on.
    pub range: Range<Gva>,
}

impl Stack {
    /// True where `len` bytes at `at` lie on it.
    pub fn holds(&self, at: u64, len: u64) -> bool {
        at >= self.range.start.0 && at.checked_add(len).is_some_and(|end| end <= self.range.end.0)
    }
}

/// The stacks of one context, and which of them a walk has entered.
#[derive(Debug)]
pub(super) struct Stacks<'a> {
    all: &'a [Stack],
    entered: Vec<bool>,
    current: Option<usize>,
}

impl<'a> Stacks<'a> {
    pub fn new(all: &'a [Stack]) -> Self {
        Self {
            all,
            entered: vec![false; all.len()],
            current: None,
        }
    }

    /// True where `len` bytes at `at` lie on the stack the walk is on, or on one that it has not yet been on; the
    /// walk is then on that.
    pub fn reach(&mut self, at: u64, len: u64) -> bool {
        let holds = |index: usize| self.all.get(index).is_some_and(|stack| stack.holds(at, len));
        if self.current.is_some_and(holds) {
            return true;
        }
        let next = (0..self.all.len()).find(|&index| holds(index));
        let Some(entered) = next.and_then(|index| self.entered.get_mut(index)) else {
            return false;
        };
        if *entered {
            return false;
        }
        *entered = true;
        self.current = next;
        true
    }

    /// Which stack the walk is on.
    pub fn current(&self) -> Option<usize> {
        self.current
    }

    /// True where `at` is at most `len` bytes before the end of the stack the walk is on, and that is one on which a walk may end:
    /// interrupts and exceptions come from somewhere, and what they interrupted in the kernel is on another stack.
    pub fn is_near_end(&self, at: u64, len: u64) -> bool {
        let current = self.current.and_then(|index| self.all.get(index));
        current.is_some_and(|stack| {
            let left = stack.range.end.0.checked_sub(at);
            stack.kind != StackKind::Irq && left.is_some_and(|left| left <= len)
        })
    }

    /// True where the word at `at` lies on the stack the walk is on.
    pub fn is_on_current(&self, at: u64) -> bool {
        self.current
            .and_then(|index| self.all.get(index))
            .is_some_and(|stack| stack.holds(at, 8))
    }
}
