//! NOPs of any length, as the kernel fills gaps with (arch/x86/include/asm/nops.h; Intel SDM, "NOP", recommended forms).

/// The longest one used: longer ones are slow to decode on some CPUs.
const LONGEST: usize = 8;

#[rustfmt::skip]
const NOPS: [&[u8]; LONGEST] = [
    &[0x90],
    &[0x66, 0x90],
    &[0x0f, 0x1f, 0x00],
    &[0x0f, 0x1f, 0x40, 0x00],
    &[0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00],
    &[0x0f, 0x1f, 0x80, 0x00, 0x00, 0x00, 0x00],
    &[0x0f, 0x1f, 0x84, 0x00, 0x00, 0x00, 0x00, 0x00],
];

/// `len` bytes of NOPs, as few as possible.
pub(super) fn nops(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        let next = (len - bytes.len()).min(LONGEST);
        bytes.extend(NOPS.iter().find(|nop| nop.len() == next).copied().unwrap_or(&[0x90]));
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_gaps_take_several_nops() {
        assert!(nops(0).is_empty());
        assert_eq!(nops(3), [0x0f, 0x1f, 0]);
        assert_eq!(nops(10), [0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0, 0x66, 0x90]);
    }
}
