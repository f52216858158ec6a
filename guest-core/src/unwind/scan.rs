//! The cheap first pass over a stack: checks whether any word of it is an address in an old function.
//!
//! If no word does, no frame can be in an old function, however the stack is unwound: every address at which the kernel may continue is a
//! word in memory, either a return address or the instruction pointer among saved registers. There are three exceptions. [`Finding`] tells
//! hooked returns and unknown code (see [`super::code`]), after which only a walk can decide; and the caller checks a vCPU's own registers.

use super::code::CodeMap;
use super::hooked_returns::HookedReturns;
use crate::addr::Gva;
use std::ops::Range;

/// All kernel code is above this address.
const CODE_START: u64 = 0xffff_ffff_8000_0000;

/// A function that must be quiescent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OldFunction {
    /// Name of the function, for reports.
    pub name: String,
    /// Guest-virtual address range of its code. A part that the compiler has placed elsewhere (`name.cold`) is an element of its own: code
    /// jumps there, so that a stack may hold an address of the part alone.
    pub code: Range<Gva>,
}

/// The functions that must be quiescent, and the memory that must be unreferenced.
#[derive(Debug, Clone, Default)]
pub struct OldCode {
    /// Sorted by start.
    functions: Vec<OldFunction>,
    span: Range<u64>,
    data: Range<u64>,
}

impl OldCode {
    /// For functions in any order.
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

    /// The same, with memory that is going to be wiped and must be unreferenced.
    #[must_use]
    pub fn with_data(mut self, data: &Range<Gva>) -> Self {
        self.data = data.start.0..data.end.0;
        self
    }

    /// The function that holds the instruction at `at`.
    pub fn at_instruction(&self, at: Gva) -> Option<&OldFunction> {
        self.holding(at.0, |code, at| code.start.0 <= at && at < code.end.0)
    }

    /// The function that a return to `at` continues. If a function ends with a call, the return address is one past its end; a return to the
    /// start of a function therefore belongs to the function before.
    pub fn at_return(&self, at: Gva) -> Option<&OldFunction> {
        self.holding(at.0, |code, at| code.start.0 < at && at <= code.end.0)
    }

    /// The function that a word belongs to, as an instruction or as a return address.
    pub(crate) fn at_word(&self, word: u64) -> Option<&OldFunction> {
        if word < self.span.start || word > self.span.end {
            return None;
        }
        self.holding(word, |code, at| code.start.0 <= at && at <= code.end.0)
    }

    fn holding(&self, at: u64, holds: impl Fn(&Range<Gva>, u64) -> bool) -> Option<&OldFunction> {
        // Ranges of different functions do not overlap, but two may meet at `at`.
        let behind = self.functions.partition_point(|function| function.code.start.0 <= at);
        let from = behind.saturating_sub(2);
        self.functions
            .get(from..behind)?
            .iter()
            .find(|function| holds(&function.code, at))
    }
}

/// The result of a scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Finding {
    /// A word that is an address in an old function.
    pub old: Option<u64>,
    /// True if a word shows that the task may have hooked returns.
    pub hidden: bool,
    /// A word that may point into unknown code.
    pub unknown: Option<u64>,
    /// A word that points into memory that must be unreferenced.
    pub data: Option<u64>,
}

impl Finding {
    /// True if no word can mean that a frame is in an old function.
    pub fn is_clear(&self) -> bool {
        self.old.is_none() && !self.hidden && self.unknown.is_none()
    }
}

/// Scans all aligned words of `bytes`, a part of a stack that starts at an aligned address.
pub fn scan(bytes: &[u8], old: &OldCode, code: &CodeMap, returns: &HookedReturns) -> Finding {
    let mut finding = Finding::default();
    for word in bytes.as_chunks::<8>().0 {
        scan_word(u64::from_le_bytes(*word), old, code, returns, &mut finding);
    }
    finding
}

/// Scans words that are not on a stack: a vCPU's registers.
pub fn scan_words(words: &[u64], old: &OldCode, code: &CodeMap, returns: &HookedReturns) -> Finding {
    let mut finding = Finding::default();
    for &word in words {
        scan_word(word, old, code, returns, &mut finding);
    }
    finding
}

fn scan_word(word: u64, old: &OldCode, code: &CodeMap, returns: &HookedReturns, finding: &mut Finding) {
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
