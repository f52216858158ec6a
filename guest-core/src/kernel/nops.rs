//! The NOP that the kernel leaves where a 5-byte call or jump may come: in ftrace sites, jump labels and static calls.
//!
//! Up to 5.12, a kernel chose its NOPs by the CPU: `ideal_nops` points to an array of pointers to the NOPs, by length. Behind the longest is
//! the 5-byte NOP that is a single instruction (`NOP_ATOMIC5`, arch/x86/include/asm/nops.h). Since 5.13 all CPUs have the same NOP,
//! `x86_nops[5]` (arch/x86/kernel/alternative.c), and the symbol is gone.

use super::KernelError;
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Bytes of a site.
pub const SITE_BYTES: usize = 5;
/// The symbol of the array's address.
pub const IDEAL_NOPS: &str = "ideal_nops";
/// `NOP_ATOMIC5`: `ASM_NOP_MAX` (8) + 1.
const ATOMIC5: u64 = 9;
/// Bytes of a pointer in the array.
const POINTER_BYTES: u64 = 8;
/// `nopl 0(%rax,%rax,1)`: x86_nops[5], and P6_NOP5 before.
const NOPL: [u8; SITE_BYTES] = [0x0f, 0x1f, 0x44, 0x00, 0x00];
/// `data16 data16 data16 xchg %ax,%ax`: K8_NOP5_ATOMIC. A 64-bit kernel uses this one or the other.
const K8: [u8; SITE_BYTES] = [0x66, 0x66, 0x66, 0x66, 0x90];

/// The kernel's 5-byte NOP. `ideal_nops` is the address of that symbol, if the kernel has it.
pub fn in_sites(memory: &dyn VirtMemory, ideal_nops: Option<Gva>) -> Result<[u8; SITE_BYTES], KernelError> {
    let Some(symbol) = ideal_nops else { return Ok(NOPL) };
    let unreadable = |at| {
        move |source| KernelError::Unreadable {
            what: IDEAL_NOPS,
            at,
            source,
        }
    };
    let array = Gva(memory.read_u64(symbol).map_err(unreadable(symbol))?);
    let entry = array.wrapping_add(ATOMIC5 * POINTER_BYTES);
    let at = Gva(memory.read_u64(entry).map_err(unreadable(entry))?);
    let mut bytes = [0; SITE_BYTES];
    memory.read(at, &mut bytes).map_err(unreadable(at))?;
    if [NOPL, K8].contains(&bytes) {
        return Ok(bytes);
    }
    Err(KernelError::Disagrees {
        what: "the kernel's NOP for sites",
        found: format!("{bytes:02x?} at {at}"),
        expected: format!("{NOPL:02x?} or {K8:02x?}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryError;
    use std::collections::BTreeMap;

    /// Memory by the address at which it is read.
    struct Bytes(BTreeMap<u64, Vec<u8>>);

    impl VirtMemory for Bytes {
        fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError> {
            let bytes = self
                .0
                .get(&at.0)
                .ok_or(MemoryError::NotMapped { at, level: 1, entry: 0 })?;
            buf.copy_from_slice(&bytes[..buf.len()]);
            Ok(())
        }
    }

    fn guest(nop: [u8; 5]) -> Bytes {
        let word = |value: u64| value.to_le_bytes().to_vec();
        // the symbol → the array → its tenth pointer → the bytes
        Bytes([(0x1000, word(0x2000)), (0x2048, word(0x3000)), (0x3000, nop.to_vec())].into())
    }

    #[test]
    fn a_kernel_that_chooses_no_nops_has_the_one_for_all_cpus() {
        assert_eq!(in_sites(&Bytes(BTreeMap::new()), None).unwrap(), NOPL);
    }

    #[test]
    fn a_kernel_that_chooses_its_nops_is_asked() {
        for nop in [NOPL, K8] {
            assert_eq!(in_sites(&guest(nop), Some(Gva(0x1000))).unwrap(), nop);
        }
    }

    #[test]
    fn bytes_that_are_no_nop_are_refused() {
        let error = in_sites(&guest([0xe9, 0, 0, 0, 0]), Some(Gva(0x1000))).unwrap_err();
        assert!(error.to_string().contains("e9, 00"), "{error}");
        let wild = Bytes([(0x1000, vec![0xff; 8])].into());
        assert!(matches!(
            in_sites(&wild, Some(Gva(0x1000))),
            Err(KernelError::Unreadable { .. })
        ));
    }
}
