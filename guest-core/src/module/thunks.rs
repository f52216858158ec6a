//! Finds out which mitigations of speculation the guest's kernel uses, from the code of its own thunks.
//!
//! The kernel records its decision in synthetic CPU feature bits (`X86_FEATURE_RETPOLINE`, `_RETHUNK`, `_INDIRECT_THUNK_ITS`, ...),
//! whose numbers differ between releases (ITS: 11*32+9 in 5.10, 21*32+5 in 6.1, 21*32+6 in 6.12) and are recorded nowhere in the guest. But its
//! thunks are alternatives themselves, patched at boot (arch/x86/lib/retpoline.S), and `x86_return_thunk` points to the return thunk in use
//! (arch/x86/kernel/cpu/bugs.c). Therefore the bytes in guest memory are read, not the bits.

use super::LinkError;
use super::ResolveError;
use super::link::GuestContext;
use crate::addr::Gva;

/// The thunk to which the compiler lets every return jump, until the loader patches the site.
pub(super) const RETURN_THUNK: &str = "__x86_return_thunk";
/// `ret`.
const RET: u8 = 0xc3;
/// `jmp rel32`.
const JMP32: u8 = 0xe9;
/// `endbr64`.
const ENDBR64: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// `lfence`.
pub(super) const LFENCE: [u8; 3] = [0x0f, 0xae, 0xe8];

/// What the kernel makes of return sites.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ReturnThunk {
    /// A plain return.
    Plain,
    /// A jump to this thunk, by default the compiler's.
    Thunk(Gva),
}

/// What the kernel makes of indirect calls and jumps through a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Indirect {
    /// A branch to the thunk.
    Retpoline,
    /// An indirect branch at the site.
    Plain,
    /// An indirect branch at the site, behind an LFENCE.
    Lfence,
}

impl GuestContext<'_> {
    /// The address of a symbol of the kernel image, exported or not; `None` if there is no such symbol.
    fn internal(&self, name: &str) -> Result<Option<Gva>, LinkError> {
        match self.symbols.any(None, name, 0) {
            Ok(address) => Ok(Some(address)),
            Err(ResolveError::NotFound { .. }) => Ok(None),
            Err(cause) => Err(LinkError::Symbol {
                symbol: name.into(),
                needed_by: "return and retpoline sites".into(),
                cause,
            }),
        }
    }

    /// What this guest makes of return sites.
    pub(super) fn returns(&self) -> Result<ReturnThunk, LinkError> {
        let default = self.exported(RETURN_THUNK, "return sites")?;
        if let Some(variable) = self.internal("x86_return_thunk")? {
            let thunk = Gva(self.read_u64(variable, "x86_return_thunk")?);
            // Tracking call depth needs more than a thunk: every call would have to count (arch/x86/kernel/callthunks.c).
            if self.internal("call_depth_return_thunk")? == Some(thunk) {
                return Err(LinkError::CallDepth);
            }
            if thunk != default {
                return Ok(ReturnThunk::Thunk(thunk));
            }
        }
        // The default thunk is in use. Then either returns are plain, or (before 6.1.44 and 5.10.189) this thunk is the safe one. A function that
        // the kernel patched itself shows which.
        if let Some(returns) = self.witness()? {
            return Ok(returns);
        }
        let [first] = self.bytes(default, RETURN_THUNK)?;
        match first {
            // A return through it is right in both cases.
            RET => Ok(ReturnThunk::Thunk(default)),
            // `jmp warn_thunk_thunk` (6.9): only a site that was not patched by mistake comes here, so returns are plain.
            JMP32 => Ok(ReturnThunk::Plain),
            _ => {
                let found: [u8; 8] = self.bytes(default, RETURN_THUNK)?;
                Err(LinkError::Thunk {
                    symbol: RETURN_THUNK.into(),
                    at: default,
                    found: found.to_vec(),
                    expected: "ret or jmp",
                })
            }
        }
    }

    /// The return of a kernel function in assembly, whose code before the return is the same in every release.
    fn witness(&self) -> Result<Option<ReturnThunk>, LinkError> {
        // arch/x86/lib/clear_page_64.S (5.10 to 6.12; 7.2 has none): mov $4096,%ecx; xor %eax,%eax; rep stosb; RET
        const NAME: &str = "clear_page_erms";
        const BODY: [u8; 9] = [0xb9, 0x00, 0x10, 0x00, 0x00, 0x31, 0xc0, 0xf3, 0xaa];
        let Some(mut at) = self.internal(NAME)? else {
            return Ok(None);
        };
        if self.bytes::<4>(at, NAME)? == ENDBR64 {
            at = at.wrapping_add(4);
        }
        if self.bytes::<9>(at, NAME)? != BODY {
            return Ok(None);
        }
        let at = at.wrapping_add(9);
        let [opcode, displacement @ ..] = self.bytes::<5>(at, NAME)?;
        Ok(match opcode {
            RET => Some(ReturnThunk::Plain),
            JMP32 => {
                let distance = i32::from_le_bytes(displacement);
                Some(ReturnThunk::Thunk(at.wrapping_add(5).wrapping_offset(distance.into())))
            }
            _ => None,
        })
    }

    /// What this guest makes of branches through register number `register`, whose thunk is at `thunk`.
    pub(super) fn indirect(&self, register: u8, thunk: Gva, name: &str) -> Result<Indirect, LinkError> {
        let found: [u8; 8] = self.bytes(thunk, name)?;
        let jump = jump_to(register);
        if found.starts_with(&jump) {
            return Ok(Indirect::Plain);
        }
        if found.strip_prefix(&LFENCE).is_some_and(|rest| rest.starts_with(&jump)) {
            return Ok(Indirect::Lfence);
        }
        // `call 1f`: a retpoline of any form.
        if found.first() == Some(&0xe8) {
            return Ok(Indirect::Retpoline);
        }
        let expected = "jmp through the register, lfence and that, or call";
        Err(LinkError::Thunk {
            symbol: name.into(),
            at: thunk,
            found: found.to_vec(),
            expected,
        })
    }

    /// True if branches must not end in the lower half of a cache line (ITS, Indirect Target Selection). The kernel then returns through
    /// `its_return_thunk`, and lets plain indirect branches avoid the lower half, too (`its_select_mitigation`).
    pub(super) fn avoids_lower_half(&self) -> Result<bool, LinkError> {
        let (Some(variable), Some(its)) = (self.internal("x86_return_thunk")?, self.internal("its_return_thunk")?)
        else {
            return Ok(false);
        };
        Ok(self.read_u64(variable, "x86_return_thunk")? == its.0)
    }

    /// An exported symbol that the loader itself needs.
    pub(super) fn exported(&self, name: &str, needed_by: &str) -> Result<Gva, LinkError> {
        self.symbols.exported(name).map_err(|cause| LinkError::Symbol {
            symbol: name.into(),
            needed_by: needed_by.into(),
            cause,
        })
    }

    pub(super) fn read_u64(&self, at: Gva, what: &str) -> Result<u64, LinkError> {
        self.bytes(at, what).map(u64::from_le_bytes)
    }

    fn bytes<const N: usize>(&self, at: Gva, what: &str) -> Result<[u8; N], LinkError> {
        let mut bytes = [0; N];
        self.memory.read(at, &mut bytes).map_err(|cause| LinkError::Memory {
            what: what.into(),
            cause,
        })?;
        Ok(bytes)
    }
}

/// `jmp *%register`.
fn jump_to(register: u8) -> Vec<u8> {
    branch_through(register, 0xe0)
}

/// An indirect branch through a register; `modrm` says call (0xd0) or jump (0xe0) for register 0.
pub(super) fn branch_through(register: u8, modrm: u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(3);
    if register >= 8 {
        bytes.push(0x41);
    }
    bytes.extend([0xff, modrm | (register & 7)]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::testing::TestGuest;

    const DEFAULT: u64 = 0xffff_ffff_8180_0000;
    const CLEAR_PAGE: u64 = 0xffff_ffff_8170_0000;

    fn guest(thunk_bytes: &[u8]) -> TestGuest {
        let mut guest = TestGuest {
            exported: [(RETURN_THUNK, DEFAULT)].into(),
            ..Default::default()
        };
        let mut bytes = thunk_bytes.to_vec();
        bytes.resize(16, 0xcc);
        guest.memory.insert(DEFAULT, bytes);
        guest
    }

    fn add_witness(guest: &mut TestGuest, end: &[u8]) {
        guest.internal.insert("clear_page_erms", CLEAR_PAGE);
        let body = [&[0xb9, 0x00, 0x10, 0x00, 0x00, 0x31, 0xc0, 0xf3, 0xaa], end].concat();
        guest.memory.insert(CLEAR_PAGE, body);
    }

    fn add_variable(guest: &mut TestGuest, value: u64) {
        guest.internal.insert("x86_return_thunk", 0xffff_ffff_8220_0000);
        guest.memory.insert(0xffff_ffff_8220_0000, value.to_le_bytes().to_vec());
    }

    #[test]
    fn a_thunk_that_the_kernel_chose_is_used() {
        let mut guest = guest(&[0xc3, 0xcc]);
        add_variable(&mut guest, 0xffff_ffff_8180_1000);
        assert_eq!(
            guest.context().returns(),
            Ok(ReturnThunk::Thunk(Gva(0xffff_ffff_8180_1000)))
        );
    }

    #[test]
    fn with_the_default_thunk_the_kernels_own_code_decides() {
        let mut guest = guest(&[0xc3, 0xcc]);
        add_variable(&mut guest, DEFAULT);
        add_witness(&mut guest, &[0xc3, 0xcc, 0xcc, 0xcc, 0xcc]);
        assert_eq!(guest.context().returns(), Ok(ReturnThunk::Plain));
        // jmp __x86_return_thunk
        add_witness(&mut guest, &[0xe9, 0xf2, 0xff, 0x0f, 0]);
        assert_eq!(guest.context().returns(), Ok(ReturnThunk::Thunk(Gva(DEFAULT))));
    }

    #[test]
    fn without_a_witness_the_default_thunk_is_used_where_it_returns() {
        assert_eq!(
            guest(&[0xc3, 0xcc]).context().returns(),
            Ok(ReturnThunk::Thunk(Gva(DEFAULT)))
        );
        // jmp warn_thunk_thunk
        assert_eq!(guest(&[0xe9, 0, 1, 0, 0]).context().returns(), Ok(ReturnThunk::Plain));
        assert!(matches!(
            guest(&[0x90]).context().returns(),
            Err(LinkError::Thunk { .. })
        ));
    }

    #[test]
    fn a_guest_that_tracks_call_depth_is_refused() {
        let mut guest = guest(&[0xc3]);
        add_variable(&mut guest, 0xffff_ffff_8180_2000);
        guest.internal.insert("call_depth_return_thunk", 0xffff_ffff_8180_2000);
        assert_eq!(guest.context().returns(), Err(LinkError::CallDepth));
    }

    #[test]
    fn a_patched_thunk_shows_what_the_kernel_makes_of_retpolines() {
        let mut guest = TestGuest::default();
        let mut is = |register, bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            bytes.resize(8, 0xcc);
            guest.memory.insert(0x1000, bytes);
            guest.context().indirect(register, Gva(0x1000), "thunk")
        };
        assert_eq!(is(0, &[0xff, 0xe0, 0xcc]), Ok(Indirect::Plain));
        assert_eq!(is(11, &[0x41, 0xff, 0xe3]), Ok(Indirect::Plain));
        assert_eq!(is(8, &[0x0f, 0xae, 0xe8, 0x41, 0xff, 0xe0]), Ok(Indirect::Lfence));
        assert_eq!(is(0, &[0xe8, 1, 0, 0, 0, 0xcc]), Ok(Indirect::Retpoline));
        // A jump through another register than the thunk's.
        assert!(is(1, &[0xff, 0xe0]).is_err());
    }
}
