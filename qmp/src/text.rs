//! What the parsers of human-readable QEMU output have in common.

/// Output of QEMU, or of the host's /proc, that is not of a form seen before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{source_name}` printed what is not understood: expected {expected}, found {found:?}")]
pub struct TextError {
    /// The command or file that the text is from.
    pub source_name: &'static str,
    /// What should have been there.
    pub expected: &'static str,
    /// The line, or the beginning of the text.
    pub found: String,
}

/// Characters of a foreign text quoted in an error.
const QUOTED_CHARS: usize = 160;

impl TextError {
    pub(crate) fn new(source_name: &'static str, expected: &'static str, found: &str) -> Self {
        Self {
            source_name,
            expected,
            found: found.chars().take(QUOTED_CHARS).collect(),
        }
    }
}

/// A hexadecimal number, with or without `0x`. Signs and separators are refused.
pub(crate) fn hex(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_takes_digits_only() {
        assert_eq!(hex("0x00007f56e00fd000"), Some(0x7f56_e00f_d000));
        assert_eq!(hex("ffffffffffffffff"), Some(u64::MAX));
        for bad in ["", "0x", "+1", "-1", "1_0", "10000000000000000", "xyz"] {
            assert_eq!(hex(bad), None, "{bad}");
        }
    }
}
