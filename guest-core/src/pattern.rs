//! Code as it is in every running kernel of one build: its bytes, but for those that the kernel, its loader or the place that it
//! was loaded at may have changed.
//!
//! What differs between a kernel's file and the kernel in memory lies at known places: addresses (KASLR), ftrace sites, return and
//! retpoline sites, alternatives, static calls, jump labels, paravirtual calls, lock prefixes. These are masked; the rest must
//! be equal.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};
use sha2::{Digest, Sha256};
use std::ops::Range;

/// More bytes than any function has that a patch replaces.
const BYTES_MAX: usize = 1 << 20;
/// Stands for a masked byte.
const MASKED: &[u8] = b"??";

/// Code, with the bytes masked that may differ. As text: two hexadecimal digits a byte, `??` for a masked one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pattern(Vec<Option<u8>>);

/// A byte of a guest's code that is not what the pattern says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mismatch {
    /// Bytes from the function's start.
    pub offset: usize,
    /// What is there; none behind the end.
    pub found: Option<u8>,
    /// What should be there.
    pub expected: u8,
}

impl Pattern {
    /// The pattern of `code` with nothing masked.
    pub fn new(code: &[u8]) -> Self {
        Self(code.iter().copied().map(Some).collect())
    }

    /// Masks the bytes of a range, as far as there are such.
    pub fn mask(&mut self, range: Range<usize>) {
        let end = range.end.min(self.0.len());
        if let Some(bytes) = self.0.get_mut(range.start.min(end)..end) {
            bytes.fill(None);
        }
    }

    /// Bytes of the code, masked ones among them.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True where there is no code.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes that are masked.
    pub fn masked(&self) -> usize {
        self.0.iter().filter(|byte| byte.is_none()).count()
    }

    /// SHA-256 over the code, masked bytes being zero.
    pub fn digest(&self) -> [u8; 32] {
        let bytes: Vec<u8> = self.0.iter().map(|byte| byte.unwrap_or(0)).collect();
        Sha256::digest(bytes).into()
    }

    /// The first byte of `code` that does not fit; none where all do.
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

    /// Reads the text form. None where it is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let pairs = text.as_bytes().chunks(MASKED.len());
        if pairs.len() > BYTES_MAX {
            return None;
        }
        let byte = |pair: &[u8]| {
            if pair == MASKED {
                return Some(None);
            }
            // from_str_radix alone would take a sign, too.
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
    fn the_text_form_reads_back() {
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
