//! A guest's UUID.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// A guest's UUID, as QEMU's `-uuid` and libvirt have it. Shown in libvirt's spelling: hexadecimal in groups of 8, 4, 4, 4 and 12 digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Uuid(pub [u8; 16]);

/// A text that is no UUID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no UUID")]
pub struct UuidError(String);

impl FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let digits: String = text.chars().filter(|&c| c != '-').collect();
        let is_uuid = digits.len() == 32 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        match u128::from_str_radix(&digits, 16) {
            Ok(number) if is_uuid => Ok(Self(number.to_be_bytes())),
            _ => Err(UuidError(text.to_owned())),
        }
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

impl TryFrom<String> for Uuid {
    type Error = UuidError;

    fn try_from(text: String) -> Result<Self, UuidError> {
        text.parse()
    }
}

impl From<Uuid> for String {
    fn from(uuid: Uuid) -> Self {
        uuid.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_read_in_both_spellings_and_shown_in_one() {
        let spelled = "8d0e9a3e-8b1c-4f0e-9d1b-2a1c3e4d5f60";
        for text in [spelled, "8D0E9A3E8B1C4F0E9D1B2A1C3E4D5F60"] {
            assert_eq!(text.parse::<Uuid>().unwrap().to_string(), spelled);
        }
        for text in [
            "",
            "vm42",
            "8d0e9a3e",
            "+d0e9a3e8b1c4f0e9d1b2a1c3e4d5f60",
            "8d0e9a3e-8b1c-4f0e-9d1b-2a1c3e4d5f6g",
        ] {
            assert!(text.parse::<Uuid>().is_err(), "{text}");
        }
    }
}
