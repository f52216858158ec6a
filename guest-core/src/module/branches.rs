//! Patches return sites and indirect branches. The compiler lets both go through thunks; the loader patches each as this guest's kernel has
//! patched its own (`apply_returns`, `apply_retpolines` in arch/x86/kernel/alternative.c; 5.10, 6.1, 6.12).

use super::LinkError;
use super::link::Linker;
use super::nops::nops;
use super::sections::SectionOffset;
use super::sites::Pointer;
use super::thunks::{Indirect, LFENCE, RETURN_THUNK, ReturnThunk, branch_through};
use crate::addr::Gva;

const RETURNS: &str = ".return_sites";
const INDIRECT: &str = ".retpoline_sites";
const THUNK: &str = "__x86_indirect_thunk_";
/// Registers by their number in the instruction set.
const REGISTERS: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
];
const CALL32: u8 = 0xe8;
const JMP32: u8 = 0xe9;
const INT3: u8 = 0xcc;
/// Length of `jmp rel32`, in bytes.
const JMP32_LEN: usize = 5;

/// `ret`, and traps up to the length of the jump in its place.
const PLAIN_RETURN: [u8; JMP32_LEN] = [0xc3, INT3, INT3, INT3, INT3];

/// The kind of a branch to a thunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Branch {
    Call,
    Jump,
    /// Clang's conditional tail call; the opcode's second byte, 0x80 to 0x8f.
    Conditional(u8),
}

/// A branch to a thunk at a site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct ThunkSite {
    branch: Branch,
    /// Length of the instruction in bytes: 5, or 6 with a CS prefix or a two-byte opcode.
    len: usize,
}

impl ThunkSite {
    fn decode(bytes: &[u8]) -> Option<Self> {
        Some(match *bytes {
            [CALL32, ..] => Self {
                branch: Branch::Call,
                len: 5,
            },
            [JMP32, ..] => Self {
                branch: Branch::Jump,
                len: 5,
            },
            // The compiler's padding for a register that takes a REX prefix.
            [0x2e, CALL32, ..] => Self {
                branch: Branch::Call,
                len: 6,
            },
            [0x2e, JMP32, ..] => Self {
                branch: Branch::Jump,
                len: 6,
            },
            [0x0f, condition @ 0x80..=0x8f, ..] => Self {
                branch: Branch::Conditional(condition),
                len: 6,
            },
            _ => return None,
        })
    }

    /// The inline form, in place of the branch to the thunk: `lfence` and the indirect branch. `None` if it does not fit.
    fn inline(self, register: u8, lfence: bool) -> Option<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.len);
        if let Branch::Conditional(condition) = self.branch {
            // A jump with the opposite condition skips the rest.
            bytes.extend([0x70 | ((condition ^ 1) & 0xf), 4]);
        }
        if lfence {
            bytes.extend(LFENCE);
        }
        let call = self.branch == Branch::Call;
        bytes.extend(branch_through(register, if call { 0xd0 } else { 0xe0 }));
        if !call && bytes.len() < self.len {
            bytes.push(INT3);
        }
        bytes.extend(nops(self.len.checked_sub(bytes.len())?));
        Some(bytes)
    }

    /// Offset, in the inline form, of the byte behind the indirect branch.
    fn inline_end(self, register: u8, lfence: bool) -> u64 {
        let condition = if matches!(self.branch, Branch::Conditional(_)) {
            2
        } else {
            0
        };
        condition + if lfence { 3 } else { 0 } + if register >= 8 { 3 } else { 2 }
    }
}

impl Linker<'_, '_, '_> {
    /// Replaces each jump to the compiler's return thunk by a plain return, or by a jump to the thunk that this guest uses.
    pub(super) fn patch_returns(&mut self) -> Result<(), LinkError> {
        let sites = self.placed_sites(RETURNS)?;
        if sites.is_empty() {
            return Ok(());
        }
        let returns = self.guest.returns()?;
        let avoids_lower_half = self.guest.avoids_lower_half()?;
        for at in sites {
            let found = self.bytes(at, JMP32_LEN)?.to_vec();
            if found.first() != Some(&JMP32) || self.branch_symbol(at, JMP32_LEN) != RETURN_THUNK {
                return Err(self.site_error(RETURNS, at, JMP32_LEN, format!("jmp {RETURN_THUNK}")));
            }
            let upper_half = self.address(at)? & 0x20 != 0;
            let bytes = match returns {
                ReturnThunk::Thunk(_) if avoids_lower_half && upper_half => PLAIN_RETURN.to_vec(),
                ReturnThunk::Plain => PLAIN_RETURN.to_vec(),
                ReturnThunk::Thunk(thunk) => self.branch_to(&[JMP32], at, thunk, "the return thunk")?,
            };
            self.write(at, &bytes)?;
        }
        Ok(())
    }

    /// Keeps each branch to a retpoline thunk, or replaces it by the plain branch that the kernel has made of the thunk.
    pub(super) fn patch_indirect(&mut self) -> Result<(), LinkError> {
        let sites = self.placed_sites(INDIRECT)?;
        if sites.is_empty() {
            return Ok(());
        }
        let avoids_lower_half = self.guest.avoids_lower_half()?;
        for at in sites {
            let site = (5..=6)
                .rev()
                .find_map(|len| ThunkSite::decode(self.bytes(at, len).ok()?));
            let name = site.map_or("", |site| self.branch_symbol(at, site.len));
            let register = name
                .strip_prefix(THUNK)
                .and_then(|name| REGISTERS.iter().position(|r| *r == name));
            let register = register.and_then(|number| u8::try_from(number).ok());
            let (Some(site), Some(register)) = (site, register) else {
                return Err(self.site_error(INDIRECT, at, 6, format!("call or jmp {THUNK}...")));
            };
            let thunk = self.guest.exported(name, INDIRECT)?;
            let lfence = match self.guest.indirect(register, thunk, name)? {
                Indirect::Retpoline => continue,
                Indirect::Plain => false,
                Indirect::Lfence => true,
            };
            let last = self.address(at)?.wrapping_add(site.inline_end(register, lfence) - 1);
            let bytes = if avoids_lower_half && last & 0x20 == 0 {
                self.its_branch(at, site, register)?
            } else {
                // If there is no space for an LFENCE, the thunk has it.
                match site.inline(register, lfence) {
                    Some(bytes) => bytes,
                    None => continue,
                }
            };
            self.write(at, &bytes)?;
        }
        Ok(())
    }

    /// A branch to the kernel's thunk for `register` in the upper half of a cache line.
    fn its_branch(&self, at: SectionOffset, site: ThunkSite, register: u8) -> Result<Vec<u8>, LinkError> {
        let name = format!(
            "__x86_indirect_its_thunk_{}",
            REGISTERS.get(usize::from(register)).unwrap_or(&"")
        );
        let thunk = self
            .guest
            .symbols
            .any(None, &name, 0)
            .map_err(|cause| LinkError::Symbol {
                symbol: name.clone(),
                needed_by: INDIRECT.into(),
                cause,
            })?;
        let opcode: &[u8] = match (site.branch, site.len) {
            (Branch::Call, 5) => &[CALL32],
            (Branch::Call, _) => &[0x2e, CALL32],
            (Branch::Jump, 5) => &[JMP32],
            (Branch::Jump, _) => &[0x2e, JMP32],
            (Branch::Conditional(condition), _) => &[0x0f, condition],
        };
        self.branch_to(opcode, at, thunk, &name)
    }

    /// `opcode` with the 4-byte distance from `at` to `target`.
    pub(super) fn branch_to(
        &self,
        opcode: &[u8],
        at: SectionOffset,
        target: Gva,
        symbol: &str,
    ) -> Result<Vec<u8>, LinkError> {
        let place = self.address(at)?;
        let next = place.wrapping_add(opcode.len() as u64).wrapping_add(4);
        let distance = i32::try_from(target.0.wrapping_sub(next).cast_signed()).map_err(|_| LinkError::Overflow {
            at: self.image.module.place(at),
            place,
            kind: "a near branch",
            symbol: symbol.into(),
            target: target.0,
        })?;
        Ok([opcode, &distance.to_le_bytes()].concat())
    }

    /// The symbol that the branch of `len` bytes at `at` goes to. The relocation is at the branch's end.
    fn branch_symbol(&self, at: SectionOffset, len: usize) -> &str {
        let module = self.image.module;
        let field = at.plus(len.saturating_sub(4) as u64);
        let relocation = module
            .section(at.section)
            .and_then(|section| section.relocation_at(field.offset));
        relocation.map_or("", |relocation| module.symbol_name(relocation))
    }

    fn placed_sites(&self, table: &str) -> Result<Vec<SectionOffset>, LinkError> {
        let mut sites = self.image.module.sites(table, Pointer::Relative)?;
        sites.retain(|at| self.is_placed(*at));
        Ok(sites)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::testing::{ALT_6_1, TestElf, TestGuest};
    use object::elf::{R_X86_64_PC32, R_X86_64_PLT32, SHF_ALLOC};

    /// A module whose text is `text`, with a branch to `symbol` at offset 0 whose distance is at `field`.
    fn module(table: &'static str, text: &[u8], field: u64, symbol: &str) -> Vec<u8> {
        let mut elf = TestElf::livepatch(text);
        let symbol = elf.undefined(symbol);
        elf.relocation(1, field, R_X86_64_PLT32, symbol, -4);
        let table = elf.section(table, SHF_ALLOC.0, &[0; 4]);
        elf.relocation(table, 0, R_X86_64_PC32, 1, 0);
        elf.build()
    }

    fn guest(symbol: &'static str, bytes: &[u8]) -> TestGuest {
        let at = 0xffff_ffff_8100_1000;
        let mut bytes = bytes.to_vec();
        bytes.resize(16, 0xcc);
        TestGuest {
            exported: [(symbol, at)].into(),
            memory: [(at, bytes)].into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_return_site_becomes_a_return_where_the_kernel_returns_plainly() {
        let file = module(RETURNS, &[0xe9, 0, 0, 0, 0], 1, RETURN_THUNK);
        // The default thunk warns.
        let text = guest(RETURN_THUNK, &[0xe9]).link_text(&file, &ALT_6_1);
        assert_eq!(text, [0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
    }

    #[test]
    fn a_return_site_jumps_to_the_thunk_in_use() {
        let file = module(RETURNS, &[0xe9, 0, 0, 0, 0], 1, RETURN_THUNK);
        let mut guest = guest(RETURN_THUNK, &[0xc3]);
        guest.internal.insert("x86_return_thunk", 0xffff_ffff_8200_0000);
        guest
            .memory
            .insert(0xffff_ffff_8200_0000, 0xffff_ffff_8100_2000_u64.to_le_bytes().to_vec());
        // jmp 0xffffffff81002000 at 0xffffffff81000000
        assert_eq!(guest.link_text(&file, &ALT_6_1), [0xe9, 0xfb, 0x1f, 0, 0]);
    }

    #[test]
    fn a_return_in_the_upper_half_of_a_cache_line_needs_no_its_thunk() {
        let mut elf = TestElf::livepatch(&[[0xe9, 0, 0, 0, 0].as_slice(), &[0xcc; 27], &[0xe9, 0, 0, 0, 0]].concat());
        let symbol = elf.undefined(RETURN_THUNK);
        let table = elf.section(RETURNS, SHF_ALLOC.0, &[0; 8]);
        for (entry, site) in [(0, 0), (4, 32)] {
            elf.relocation(1, site + 1, R_X86_64_PLT32, symbol, -4);
            elf.relocation(table, entry, R_X86_64_PC32, 1, i64::try_from(site).unwrap());
        }
        let mut guest = guest(RETURN_THUNK, &[0xc3]);
        guest.internal.insert("x86_return_thunk", 0xffff_ffff_8200_0000);
        guest.internal.insert("its_return_thunk", 0xffff_ffff_8100_2000);
        guest
            .memory
            .insert(0xffff_ffff_8200_0000, 0xffff_ffff_8100_2000_u64.to_le_bytes().to_vec());
        let text = guest.link_text(&elf.build(), &ALT_6_1);
        assert_eq!(text[..5], [0xe9, 0xfb, 0x1f, 0, 0]);
        assert_eq!(text[32..], PLAIN_RETURN);
    }

    #[test]
    fn a_listed_site_without_a_return_is_refused() {
        use crate::module::testing::{BASES, KLP_6_1};
        let file = module(RETURNS, &[0xe8, 0, 0, 0, 0], 1, RETURN_THUNK);
        let module = crate::module::PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let image = module.image(&patch, &ALT_6_1).unwrap();
        let error = image.link(&BASES, &guest(RETURN_THUNK, &[0xc3]).context()).unwrap_err();
        assert!(
            matches!(&error, LinkError::Site { table: RETURNS, at, .. } if at == ".text+0x0"),
            "{error}"
        );
    }

    #[test]
    fn a_call_through_rax_is_inlined_where_retpolines_are_off() {
        let file = module(INDIRECT, &[0xe8, 0, 0, 0, 0], 1, "__x86_indirect_thunk_rax");
        let text = guest("__x86_indirect_thunk_rax", &[0xff, 0xe0]).link_text(&file, &ALT_6_1);
        // call *%rax; nopl (%rax)
        assert_eq!(text, [0xff, 0xd0, 0x0f, 0x1f, 0]);
    }

    #[test]
    fn a_jump_through_r13_is_followed_by_a_trap() {
        let file = module(INDIRECT, &[0x2e, 0xe9, 0, 0, 0, 0], 2, "__x86_indirect_thunk_r13");
        let text = guest("__x86_indirect_thunk_r13", &[0x41, 0xff, 0xe5]).link_text(&file, &ALT_6_1);
        // jmp *%r13; int3; xchg %ax,%ax
        assert_eq!(text, [0x41, 0xff, 0xe5, 0xcc, 0x66, 0x90]);
    }

    #[test]
    fn a_conditional_jump_becomes_the_opposite_condition() {
        let file = module(INDIRECT, &[0x0f, 0x84, 0, 0, 0, 0], 2, "__x86_indirect_thunk_r11");
        let text = guest("__x86_indirect_thunk_r11", &[0x41, 0xff, 0xe3]).link_text(&file, &ALT_6_1);
        // jne +4; jmp *%r11; int3
        assert_eq!(text, [0x75, 4, 0x41, 0xff, 0xe3, 0xcc]);
    }

    #[test]
    fn an_lfence_is_inlined_if_there_is_space() {
        let thunk = [0x0f, 0xae, 0xe8, 0xff, 0xe0];
        let file = module(INDIRECT, &[0xe8, 0, 0, 0, 0], 1, "__x86_indirect_thunk_rax");
        let text = guest("__x86_indirect_thunk_rax", &thunk).link_text(&file, &ALT_6_1);
        assert_eq!(text, [0x0f, 0xae, 0xe8, 0xff, 0xd0]);
        // With r13 it needs 6 bytes, and the site has 5: the thunk stays.
        let thunk = [0x0f, 0xae, 0xe8, 0x41, 0xff, 0xe5];
        let file = module(INDIRECT, &[0xe8, 0, 0, 0, 0], 1, "__x86_indirect_thunk_r13");
        let text = guest("__x86_indirect_thunk_r13", &thunk).link_text(&file, &ALT_6_1);
        assert_eq!(text, [0xe8, 0xfb, 0x0f, 0, 0]);
    }

    #[test]
    fn a_retpoline_that_is_in_force_stays() {
        let file = module(INDIRECT, &[0xe8, 0, 0, 0, 0], 1, "__x86_indirect_thunk_rax");
        let text = guest("__x86_indirect_thunk_rax", &[0xe8, 1, 0, 0, 0]).link_text(&file, &ALT_6_1);
        assert_eq!(text, [0xe8, 0xfb, 0x0f, 0, 0]);
    }

    #[test]
    fn a_branch_in_the_lower_half_of_a_cache_line_goes_to_the_its_thunk() {
        let file = module(INDIRECT, &[0xe8, 0, 0, 0, 0], 1, "__x86_indirect_thunk_rax");
        let mut guest = guest("__x86_indirect_thunk_rax", &[0xff, 0xe0]);
        guest.internal.insert("x86_return_thunk", 0xffff_ffff_8200_0000);
        guest.internal.insert("its_return_thunk", 0xffff_ffff_8100_3000);
        guest
            .internal
            .insert("__x86_indirect_its_thunk_rax", 0xffff_ffff_8100_3020);
        guest
            .memory
            .insert(0xffff_ffff_8200_0000, 0xffff_ffff_8100_3000_u64.to_le_bytes().to_vec());
        assert_eq!(guest.link_text(&file, &ALT_6_1), [0xe8, 0x1b, 0x30, 0, 0]);
    }
}
