//! The common parts of the parsers of human-readable QEMU output.

/// Output of QEMU, or of the host's /proc, that has an unknown form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{source_name}` printed what is not understood: expected {expected}, found {found:?}")]
pub struct TextError {
    /// The command or file that the text comes from.
    pub source_name: &'static str,
    /// The expected form.
    pub expected: &'static str,
    /// The line, or the beginning of the text.
    pub found: String,
}

/// Most characters of a text that an error quotes.
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

/// Parses a hexadecimal number, with or without `0x`. Refuses signs and separators.
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
