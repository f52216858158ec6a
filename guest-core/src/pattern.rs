//! A pattern of code: the bytes that are the same in every running kernel of one build.
//!
//! The kernel and its loader change code at known sites: addresses (KASLR), ftrace sites, return and retpoline sites, alternatives, static
//! calls, jump labels, paravirtual calls, lock prefixes. The pattern masks these bytes; all others must be equal.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest, Sha256};
use std::ops::Range;

/// Longest code of a pattern, in bytes.
const BYTES_MAX: usize = 1 << 20;
/// The text of a masked byte.
const MASKED: &[u8] = b"??";

/// Code, with the bytes masked that may differ. As text: two hexadecimal digits a byte, `??` for a masked one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pattern(Vec<Option<u8>>);

/// A byte of a guest's code that differs from the pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Offset in the function, in bytes.
    pub offset: usize,
    /// The guest's byte; `None` behind the end of its code.
    pub found: Option<u8>,
    /// The pattern's byte.
    pub expected: u8,
}

impl Pattern {
    /// The pattern of `code` with nothing masked.
    pub fn new(code: &[u8]) -> Self {
        Self(code.iter().copied().map(Some).collect())
    }

    /// Masks the bytes of a range. Bytes behind the end are ignored.
    pub fn mask(&mut self, range: Range<usize>) {
        let end = range.end.min(self.0.len());
        if let Some(bytes) = self.0.get_mut(range.start.min(end)..end) {
            bytes.fill(None);
        }
    }

    /// Length of the code in bytes, with masked ones.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True for a pattern without bytes.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Number of masked bytes.
    pub fn masked(&self) -> usize {
        self.0.iter().filter(|byte| byte.is_none()).count()
    }

    /// SHA-256 of the code, in which masked bytes are zero.
    pub fn digest(&self) -> [u8; 32] {
        let bytes: Vec<u8> = self.0.iter().map(|byte| byte.unwrap_or(0)).collect();
        Sha256::digest(bytes).into()
    }

    /// The first byte of `code` that differs; `None` if the code fits.
    pub fn mismatch(&self, code: &[u8]) -> Option<Mismatch> {
        let expected = self.0.iter().enumerate();
        let mut wrong = expected.filter_map(|(offset, byte)| {
            let expected = (*byte)?;
            let found = code.get(offset).copied();
            (found != Some(expected)).then_some(Mismatch {
                offset,
                found,
                expected,
            })
        });
        wrong.next()
    }

    /// Parses the text form; `None` for another text.
    pub fn parse(text: &str) -> Option<Self> {
        let pairs = text.as_bytes().chunks(MASKED.len());
        if pairs.len() > BYTES_MAX {
            return None;
        }
        let byte = |pair: &[u8]| {
            if pair == MASKED {
                return Some(None);
            }
            // from_str_radix alone would accept a sign.
            let digits = std::str::from_utf8(pair).ok()?;
            let whole = digits.len() == MASKED.len() && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
            u8::from_str_radix(digits, 16).ok().filter(|_| whole).map(Some)
        };
        pairs.map(byte).collect::<Option<Vec<_>>>().map(Self)
    }
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| match byte {
            Some(byte) => write!(f, "{byte:02x}"),
            None => f.write_str("??"),
        })
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| D::Error::custom("not a pattern of code"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern() -> Pattern {
        let mut pattern = Pattern::new(&[0xe8, 1, 2, 3, 4, 0xc3]);
        pattern.mask(1..5);
        pattern
    }

    #[test]
    fn masked_bytes_may_differ_and_others_may_not() {
        assert_eq!(pattern().mismatch(&[0xe8, 9, 9, 9, 9, 0xc3]), None);
        let wrong = Mismatch {
            offset: 5,
            found: Some(0xcc),
            expected: 0xc3,
        };
        assert_eq!(pattern().mismatch(&[0xe8, 9, 9, 9, 9, 0xcc]), Some(wrong));
    }

    #[test]
    fn code_that_ends_early_does_not_fit() {
        let wrong = pattern().mismatch(&[0xe8]).unwrap();
        assert_eq!((wrong.offset, wrong.found), (5, None));
    }

    #[test]
    fn the_digest_is_that_of_the_code_without_the_masked_bytes() {
        let mut other = Pattern::new(&[0xe8, 5, 6, 7, 8, 0xc3]);
        assert_ne!(other.digest(), pattern().digest());
        other.mask(1..5);
        assert_eq!(other.digest(), pattern().digest());
    }

    #[test]
    fn the_text_form_is_parsed_to_the_same_pattern() {
        assert_eq!(pattern().to_string(), "e8????????c3");
        assert_eq!(Pattern::parse("e8????????c3"), Some(pattern()));
        assert_eq!(Pattern::parse("e8?"), None);
        assert_eq!(Pattern::parse("+8"), None);
    }

    #[test]
    fn masking_behind_the_end_does_nothing() {
        let mut short = Pattern::new(&[1, 2]);
        short.mask(1..9);
        short.mask(5..7);
        assert_eq!(short.to_string(), "01??");
    }
}
