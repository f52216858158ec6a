//! C text as tokens, as far as the kernel's coding style makes them matter.

use std::ops::Range;

/// A piece of C text that is neither space nor comment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Word,
    /// A string or character constant, or a number.
    Constant,
    Punctuation(u8),
    /// A whole preprocessor line with its continuations.
    Directive,
    /// An empty line.
    Blank,
}

#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) range: Range<usize>,
}

/// All tokens of a text, in its order.
pub(super) fn tokens(text: &str) -> Vec<Token> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut at = 0;
    let mut line_is_empty = true;
    while let Some(&byte) = bytes.get(at) {
        let rest = bytes.get(at..).unwrap_or_default();
        let (kind, length) = match byte {
            b'\n' => (line_is_empty.then_some(Kind::Blank), 1),
            byte if byte.is_ascii_whitespace() => (None, 1),
            b'#' if line_is_empty => (Some(Kind::Directive), directive(rest)),
            b'/' if rest.starts_with(b"/*") => (None, until(rest, 2, b"*/")),
            b'/' if rest.starts_with(b"//") => (None, until(rest, 2, b"\n") - 1),
            b'"' | b'\'' => (Some(Kind::Constant), quoted(rest, byte)),
            byte if byte.is_ascii_digit() => (Some(Kind::Constant), run_of(rest, is_word)),
            byte if is_word(byte) => (Some(Kind::Word), run_of(rest, is_word)),
            byte => (Some(Kind::Punctuation(byte)), 1),
        };
        line_is_empty = match byte {
            b'\n' => true,
            byte if byte.is_ascii_whitespace() => line_is_empty,
            _ => false,
        };
        if let Some(kind) = kind {
            let range = at..at + length;
            tokens.push(Token { kind, range });
        }
        at += length.max(1);
    }
    tokens
}

pub(super) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || !byte.is_ascii()
}

pub(super) fn run_of(bytes: &[u8], belongs: fn(u8) -> bool) -> usize {
    bytes.iter().take_while(|&&byte| belongs(byte)).count()
}

/// The length up to and with `end`, which is looked for from `skip` on; everything where it is missing.
fn until(bytes: &[u8], skip: usize, end: &[u8]) -> usize {
    let rest = bytes.get(skip..).unwrap_or_default();
    let found = rest.windows(end.len()).position(|window| window == end);
    found.map_or(bytes.len() + 1, |found| skip + found + end.len())
}

/// The length of a string or character constant, its quotes with it.
fn quoted(bytes: &[u8], quote: u8) -> usize {
    let mut escaped = false;
    let inside = bytes.iter().skip(1).take_while(|&&byte| {
        let ends = !escaped && byte == quote;
        escaped = !escaped && byte == b'\\';
        !ends
    });
    (inside.count() + 2).min(bytes.len())
}

/// The length of a preprocessor line without its line break; a backslash before the break continues it.
fn directive(bytes: &[u8]) -> usize {
    let mut previous = 0;
    let line = bytes.iter().take_while(|&&byte| {
        let ends = byte == b'\n' && previous != b'\\';
        previous = byte;
        !ends
    });
    line.count()
}
