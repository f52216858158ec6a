//! Calls to `__fentry__` at the entries of new functions. The kernel turns them into NOPs when it loads a module, and
//! later into calls when somebody traces the function (`ftrace_process_locs`, kernel/trace/ftrace.c).

use super::link::Linker;
use super::nops::nops;
use super::sections::SectionOffset;
use super::sites::{Pointer, TableError};
use super::{LinkError, PatchModule};
use crate::addr::Gva;
use crate::kernel::nops::{IDEAL_NOPS, in_sites};

/// The table of calls (include/linux/ftrace.h, `FTRACE_CALLSITE_SECTION`).
const TABLE: &str = "__mcount_loc";
/// Bytes of the call, and of the NOP in its place.
const SITE_LEN: usize = 5;

impl PatchModule<'_> {
    /// All calls of `__fentry__` that the module lists.
    pub(super) fn fentry_sites(&self) -> Result<Vec<SectionOffset>, TableError> {
        self.sites(TABLE, Pointer::Absolute)
    }
}

impl Linker<'_, '_, '_> {
    /// The NOP that this kernel expects where a 5-byte call or jump may come, see [`in_sites`].
    pub(super) fn site_nop(&self) -> Result<[u8; SITE_LEN], LinkError> {
        let ideal_nops = self.guest.symbols.any(None, IDEAL_NOPS, 0).ok();
        in_sites(self.guest.memory, ideal_nops).map_err(|error| LinkError::SiteNop {
            cause: error.to_string(),
        })
    }

    /// Puts NOPs in the place of the calls at function entries, and gives their addresses, sorted as the loader does it.
    pub(super) fn silence_fentry(&mut self) -> Result<Vec<Gva>, LinkError> {
        let nop = self.site_nop()?;
        let mut sites = Vec::new();
        for at in self.image.fentry_sites.clone() {
            let found = self.bytes(at, SITE_LEN)?;
            // Since 5.18 objtool may have put the NOP there already (CONFIG_HAVE_OBJTOOL_NOP_MCOUNT).
            if found.first() != Some(&0xe8) && found != nops(SITE_LEN) {
                let expected = "a call to __fentry__, or the NOP in its place".into();
                return Err(self.site_error(TABLE, at, SITE_LEN, expected));
            }
            self.write(at, &nop)?;
            sites.push(Gva(self.address(at)?));
        }
        sites.sort_unstable();
        if let Some([twice, _]) = sites
            .array_windows()
            .find(|[site, next]| next.0 - site.0 < SITE_LEN as u64)
        {
            let found = format!("sites that overlap, at {twice}");
            return Err(TableError::named(TABLE, 0, found, "each site once").into());
        }
        Ok(sites)
    }
}

#[cfg(test)]
mod tests {
    use crate::module::testing::{ALT_6_1, TestElf, TestGuest};
    use object::elf::{R_X86_64_64, R_X86_64_PLT32, SHF_ALLOC};

    #[test]
    fn the_call_at_a_functions_entry_becomes_a_nop() {
        // call __fentry__; nopl 0(%rax,%rax,1); ret
        let mut elf = TestElf::livepatch(&[0xe8, 0, 0, 0, 0, 0x0f, 0x1f, 0x44, 0, 0, 0xc3]);
        let fentry = elf.undefined("__fentry__");
        elf.relocation(1, 1, R_X86_64_PLT32, fentry, -4);
        let table = elf.section("__mcount_loc", SHF_ALLOC.0, &[0; 24]);
        elf.relocation(table, 0, R_X86_64_64, 1, 0);
        elf.relocation(table, 8, R_X86_64_64, 1, 5);
        // An entry for init code, which is not placed.
        elf.relocation(table, 16, R_X86_64_64, 4, 0);
        let guest = TestGuest {
            exported: [("__fentry__", 0xffff_ffff_8100_8000)].into(),
            ..Default::default()
        };
        let text = guest.link_text(&elf.build(), &ALT_6_1);
        assert_eq!(text, [0x0f, 0x1f, 0x44, 0, 0, 0x0f, 0x1f, 0x44, 0, 0, 0xc3]);
    }
}
