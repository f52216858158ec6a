//! The tokens of preprocessed text that matter to the code.

use std::collections::HashMap;

use super::super::tokens::{Kind, Token, tokens};

/// Keywords and type names that no declaration introduces.
pub(super) const KEYWORDS: [&str; 44] = [
    "__auto_type",
    "__const",
    "__const__",
    "__complex__",
    "__extension__",
    "__inline",
    "__inline__",
    "__int128",
    "__restrict",
    "__restrict__",
    "__seg_fs",
    "__seg_gs",
    "__signed",
    "__signed__",
    "__thread",
    "__volatile",
    "__volatile__",
    "_Atomic",
    "_Bool",
    "_Complex",
    "_Float128",
    "_Noreturn",
    "_Thread_local",
    "auto",
    "bool",
    "char",
    "const",
    "double",
    "extern",
    "float",
    "inline",
    "int",
    "long",
    "register",
    "restrict",
    "short",
    "signed",
    "static",
    "typedef",
    "unsigned",
    "void",
    "volatile",
    "_Float16",
    "_Float64",
];
/// What counts up in each file that uses it (`__COUNTER__`): names that differ in the number alone.
const COUNTED: [&str; 2] = ["__UNIQUE_ID_", "__compiletime_assert_"];

/// A token of preprocessed text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::source) struct Word<'a> {
    pub(in crate::source) text: &'a str,
    pub(in crate::source) kind: Kind,
    /// No space before it: two marks may be one operator.
    pub(in crate::source) joined: bool,
}

impl Word<'_> {
    pub(in crate::source) fn is(&self, mark: u8) -> bool {
        self.kind == Kind::Punctuation(mark)
    }

    pub(in crate::source) fn is_name(&self) -> bool {
        self.kind == Kind::Word && !KEYWORDS.contains(&self.text)
    }
}

pub(super) fn words(text: &str) -> Vec<Word<'_>> {
    let mut end = 0;
    let mut all = Vec::new();
    for Token { kind, range } in tokens(text) {
        let joined = range.start == end;
        end = range.end;
        let Some(text) = text.get(range) else {
            continue;
        };
        let is_mark_of_line = || {
            text.strip_prefix('#')
                .is_some_and(|rest| rest.trim_start().starts_with(|c: char| c.is_ascii_digit()))
        };
        match kind {
            Kind::Blank => {}
            Kind::Directive if is_mark_of_line() || text.starts_with("#pragma GCC diagnostic") => {}
            Kind::Punctuation(_) => all.push(Word { text, kind, joined }),
            _ => all.push(Word {
                text,
                kind,
                joined: false,
            }),
        }
    }
    all
}

/// Counted names of one text by those of another: each stands for one.
#[derive(Debug, Default)]
pub(super) struct Renaming<'a> {
    there: HashMap<&'a str, &'a str>,
    back: HashMap<&'a str, &'a str>,
}

impl<'a> Renaming<'a> {
    pub(super) fn same(mut self, one: &[Word<'a>], other: &[Word<'a>]) -> bool {
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| self.agree(one, other))
    }

    fn agree(&mut self, one: &Word<'a>, other: &Word<'a>) -> bool {
        // A mark behind a mark may be one operator with it; what is behind a name is another thing in any case.
        if one.kind != other.kind
            || (one.joined != other.joined
                && matches!(
                    one.kind,
                    Kind::Punctuation(b'+' | b'-' | b'<' | b'>' | b'=' | b'&' | b'|' | b'.' | b'#')
                ))
        {
            return false;
        }
        if one.kind == Kind::Word && counted(one.text).is_some() && counted(one.text) == counted(other.text) {
            let there = *self.there.entry(one.text).or_insert(other.text);
            let back = *self.back.entry(other.text).or_insert(one.text);
            return there == other.text && back == one.text;
        }
        one.text == other.text
    }
}

/// The part of a counted name before its number.
pub(super) fn counted(name: &str) -> Option<&str> {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    (stem.len() < name.len() && COUNTED.iter().any(|prefix| name.starts_with(prefix))).then_some(stem)
}
