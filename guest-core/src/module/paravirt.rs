//! Calls through `pv_ops`, the kernel's table of operations that a hypervisor may replace. The loader makes each a direct
//! call of what the table holds (`apply_paravirt`, `paravirt_patch_call` in arch/x86/kernel/paravirt.c; up to 6.7, since then
//! they are alternatives with `ALT_FLAG_DIRECT_CALL`). The table does not change after boot.

use super::LinkError;
use super::link::Linker;
use super::nops::nops;
use super::sections::SectionOffset;
use super::sites::{Pointer, TableError};
use crate::addr::Gva;

/// `struct paravirt_patch_site`: an 8-byte pointer to the code, the operation, the code's length in bytes, padding.
const TABLE: &str = ".parainstructions";
/// Offset of the length.
const LEN: u64 = 9;

impl Linker<'_, '_, '_> {
    /// Makes the calls through `pv_ops` direct ones.
    pub(super) fn patch_paravirt(&mut self) -> Result<(), LinkError> {
        let module = self.image.module;
        for (_, table) in module.sections_named(TABLE) {
            for relocation in &table.relocations {
                let entry = relocation.offset;
                let at = module.site(table, entry, Pointer::Absolute)?;
                let Some([len]) = table.bytes::<1>(entry.saturating_add(LEN)) else {
                    return Err(TableError::new(table, entry, "the end of the section", "a whole entry").into());
                };
                if self.is_placed(at) {
                    let bytes = self.direct_call(TABLE, at, len.into())?;
                    self.write(at, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// The `len` bytes that make the indirect call through memory at `at` a direct one, the rest filled with NOPs.
    pub(super) fn direct_call(&self, table: &'static str, at: SectionOffset, len: usize) -> Result<Vec<u8>, LinkError> {
        let place = Gva(self.address(at)?);
        let pointer = match *self.bytes(at, len)? {
            // call *disp32(%rip)
            [0xff, 0x15, a, b, c, d, ..] => place.wrapping_add(6).wrapping_offset(displacement([a, b, c, d])),
            // call *disp32
            [0xff, 0x14, 0x25, a, b, c, d, ..] => Gva(0).wrapping_offset(displacement([a, b, c, d])),
            _ => return Err(self.site_error(table, at, len, "an indirect call through memory".into())),
        };
        let target = self
            .guest
            .read_u64(pointer, "the operation that a paravirt call goes to")?;
        if target == 0 {
            return Err(LinkError::NoOperation {
                at: self.image.module.place(at),
                pointer,
            });
        }
        let mut bytes = self.branch_to(&[0xe8], at, Gva(target), "a paravirt operation")?;
        bytes.extend(nops(len.saturating_sub(bytes.len())));
        Ok(bytes)
    }
}

fn displacement(bytes: [u8; 4]) -> i64 {
    i32::from_le_bytes(bytes).into()
}

#[cfg(test)]
mod tests {
    use crate::module::testing::{ALT_6_1, TestElf, TestGuest};
    use object::elf::{R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, SHF_ALLOC};

    #[test]
    fn calls_through_pv_ops_become_direct() {
        // call *pv_ops+0x10; call *pv_ops+0x18(%rip); nop
        let mut elf = TestElf::livepatch(&[0xff, 0x14, 0x25, 0, 0, 0, 0, 0xff, 0x15, 0, 0, 0, 0, 0x90]);
        let pv_ops = elf.undefined("pv_ops");
        elf.relocation(1, 3, R_X86_64_32S, pv_ops, 0x10);
        elf.relocation(1, 9, R_X86_64_PC32, pv_ops, 0x18 - 4);
        let mut entries = [0; 32];
        (entries[9], entries[25]) = (7, 7);
        let table = elf.section(".parainstructions", SHF_ALLOC.0, &entries);
        elf.relocation(table, 0, R_X86_64_64, 1, 0);
        elf.relocation(table, 16, R_X86_64_64, 1, 7);
        let operations = [0xffff_ffff_8100_1000_u64, 0xffff_ffff_8100_2000]
            .map(u64::to_le_bytes)
            .concat();
        let guest = TestGuest {
            exported: [("pv_ops", 0xffff_ffff_8240_0000)].into(),
            memory: [(0xffff_ffff_8240_0010, operations)].into(),
            ..Default::default()
        };
        let text = guest.link_text(&elf.build(), &ALT_6_1);
        // From 0xffffffff81000000 and 0xffffffff81000007.
        assert_eq!(
            text,
            [0xe8, 0xfb, 0x0f, 0, 0, 0x66, 0x90, 0xe8, 0xf4, 0x1f, 0, 0, 0x66, 0x90]
        );
    }
}
