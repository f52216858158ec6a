//! The stacks that one context may use. A walk uses each stack once, and upwards.

use crate::addr::Gva;
use std::ops::Range;

/// What a stack is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StackKind {
    /// The stack of a task.
    Task,
    /// A CPU's stack for hardware and software interrupts.
    Irq,
    /// A CPU's stack for NMI, debug, double fault or machine check.
    Exception,
    /// A CPU's short stack for the entry from user mode.
    Entry,
}

/// A stack in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stack {
    /// What the stack is for.
    pub kind: StackKind,
    /// Its guest-virtual address range.
    pub range: Range<Gva>,
}

impl Stack {
    /// True where `len` bytes at `at` are on the stack.
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

    /// True where `len` bytes at `at` are on the current stack, or on one that the walk has not used yet; that becomes the current stack.
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

    /// Index of the current stack.
    pub fn current(&self) -> Option<usize> {
        self.current
    }

    /// True where `at` is at most `len` bytes before the end of the current stack, and a walk may end on this stack. It may not end on the stack
    /// of an interrupt or exception, because the interrupted code of the kernel is on another stack.
    pub fn is_near_end(&self, at: u64, len: u64) -> bool {
        let current = self.current.and_then(|index| self.all.get(index));
        current.is_some_and(|stack| {
            let left = stack.range.end.0.checked_sub(at);
            stack.kind != StackKind::Irq && left.is_some_and(|left| left <= len)
        })
    }

    /// True where the word at `at` is on the current stack.
    pub fn is_on_current(&self, at: u64) -> bool {
        self.current
            .and_then(|index| self.all.get(index))
            .is_some_and(|stack| stack.holds(at, 8))
    }
}
