//! The cheap first pass over a stack: does any word of it, taken for an address, lie in an old function?
//!
//! Where none does, no frame can be in an old function, however the stack is to be unwound, because every place at
//! which the kernel may go on is a word in memory: a return address, or the instruction pointer among saved
//! registers. There are three exceptions, which [`Finding`] tells, and after which only a walk can say more:
//! return addresses that a tracer has taken off the stack, code that is not known (see [`super::code`]), and a
//! vCPU's own registers, which the caller looks at.

use super::code::CodeMap;
use super::returns::Returns;
use crate::addr::Gva;
use std::ops::Range;

/// All kernel code lies above this address.
const CODE_START: u64 = 0xffff_ffff_8000_0000;

/// A function that must not be running.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OldFunction {
    /// Its name, for reports.
    pub name: String,
    /// Its code. A part that the compiler has put elsewhere (`name.cold`) is a range of its own with the same name:
    /// it is jumped to, so that a stack may hold it alone.
    pub code: Range<Gva>,
}

/// The functions that must not be running.
#[derive(Debug, Clone, Default)]
pub struct OldCode {
    /// Sorted by start.
    functions: Vec<OldFunction>,
    span: Range<u64>,
    data: Range<u64>,
}

impl OldCode {
    /// Takes the functions, in any order.
    pub fn new(mut functions: Vec<OldFunction>) -> Self {
        functions.sort_by_key(|function| function.code.start);
        let start = functions.first().map_or(0, |function| function.code.start.0);
        let end = functions.iter().map(|function| function.code.end.0).max().unwrap_or(0);
        Self {
            functions,
            span: start..end,
            data: 0..0,
        }
    }

    /// The same, with memory that nobody may be reading: it is going to be wiped.
    #[must_use]
    pub fn with_data(mut self, data: &Range<Gva>) -> Self {
        self.data = data.start.0..data.end.0;
        self
    }

    /// The function in which the instruction at `at` lies.
    pub fn at_instruction(&self, at: Gva) -> Option<&OldFunction> {
        self.holding(at.0, |code, at| code.start.0 <= at && at < code.end.0)
    }

    /// The function that a return to `at` goes back into. Where a function ends with a call, that is one past its end;
    /// a return to its very start belongs to the function before.
    pub fn at_return(&self, at: Gva) -> Option<&OldFunction> {
        self.holding(at.0, |code, at| code.start.0 < at && at <= code.end.0)
    }

    /// The function that a word belongs to, were it either.
    pub(crate) fn at_word(&self, word: u64) -> Option<&OldFunction> {
        if word < self.span.start || word > self.span.end {
            return None;
        }
        self.holding(word, |code, at| code.start.0 <= at && at <= code.end.0)
    }

    fn holding(&self, at: u64, holds: impl Fn(&Range<Gva>, u64) -> bool) -> Option<&OldFunction> {
        // ranges of different functions do not overlap, but two may meet at `at`
        let behind = self.functions.partition_point(|function| function.code.start.0 <= at);
        let from = behind.saturating_sub(2);
        self.functions
            .get(from..behind)?
            .iter()
            .find(|function| holds(&function.code, at))
    }
}

/// What a scan has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Finding {
    /// A word that lies in an old function.
    pub old: Option<u64>,
    /// A word that says that a tracer may have taken a return address off the stack.
    pub hidden: bool,
    /// A word that may point into unknown code.
    pub unknown: Option<u64>,
    /// A word that points into memory that nobody may be reading.
    pub data: Option<u64>,
}

impl Finding {
    /// True where nothing was found that could mean an old function.
    pub fn is_clear(&self) -> bool {
        self.old.is_none() && !self.hidden && self.unknown.is_none()
    }
}

/// Looks at all aligned words of `bytes`, part of a stack that starts at an aligned address.
pub fn scan(bytes: &[u8], old: &OldCode, code: &CodeMap, returns: &Returns) -> Finding {
    let mut finding = Finding::default();
    for word in bytes.as_chunks::<8>().0 {
        look_at(u64::from_le_bytes(*word), old, code, returns, &mut finding);
    }
    finding
}

/// Looks at words that are not on a stack: a vCPU's registers.
pub fn scan_words(words: &[u64], old: &OldCode, code: &CodeMap, returns: &Returns) -> Finding {
    let mut finding = Finding::default();
    for &word in words {
        look_at(word, old, code, returns, &mut finding);
    }
    finding
}

fn look_at(word: u64, old: &OldCode, code: &CodeMap, returns: &Returns, finding: &mut Finding) {
    if word < CODE_START {
        return;
    }
    if old.at_word(word).is_some() {
        finding.old = finding.old.or(Some(word));
    } else if old.data.contains(&word) {
        finding.data = finding.data.or(Some(word));
    } else if returns.concerns(word) {
        finding.hidden = true;
    } else if code.may_be_unknown_code(word) {
        finding.unknown = finding.unknown.or(Some(word));
    }
}
