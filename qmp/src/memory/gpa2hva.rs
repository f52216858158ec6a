//! The address in the QEMU process of a guest-physical address: HMP `gpa2hva`.
//!
//! Seen with QEMU 7.2.22 and 10.0.2: `Host virtual address for 0x100000 (pc.ram) is 0x7feea7f00000`.

use crate::text::{TextError, hex};
use guest_core::Hva;

/// Parses the answer.
///
/// # Errors
///
/// It is any other text, such as `Memory at address 0xb0000000 is not RAM`.
pub fn parse(text: &str) -> Result<Hva, TextError> {
    let text = text.trim_end();
    text.strip_prefix("Host virtual address for ")
        .and_then(|rest| rest.rsplit_once(") is "))
        .and_then(|(_, address)| hex(address))
        .map(Hva)
        .ok_or_else(|| TextError::new("gpa2hva", "a host virtual address", text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_and_a_refusal_is_quoted() {
        let text = "Host virtual address for 0x100000 (pc.ram) is 0x7feea7f00000\r\n";
        assert_eq!(parse(text), Ok(Hva(0x7fee_a7f0_0000)));
        let refused = parse("Memory at address 0xb0000000 is not RAM\r\n").unwrap_err();
        assert_eq!(refused.found, "Memory at address 0xb0000000 is not RAM");
    }
}
