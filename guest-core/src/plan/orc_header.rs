//! The digest of the ORC format that a module was built with, against the guest's own.
//!
//! `.orc_header` (arch/x86/include/asm/orc_header.h, since 6.4) is a SHA-1 of the text that describes the format
//! (scripts/orc_hash.sh), in the kernel image as in each module. A module of another format would have its new functions
//! unwound wrongly.

use super::Refusal;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::module::PatchModule;

/// Bytes of a SHA-1.
const DIGEST_BYTES: usize = 20;
/// Where the image has it.
const SYMBOL: &str = "__start_orc_header";

/// Where module and kernel both have the digest, it must be the same.
pub(super) fn check(live: &Live<'_>, module: &PatchModule<'_>) -> Result<(), Refusal> {
    let (Some(found), Some(at)) = (module.orc_header(), live.kernel.symbols.unique(SYMBOL)) else {
        return Ok(());
    };
    let mut own = [0; DIGEST_BYTES];
    live.read(at, &mut own).map_err(|source| KernelError::Unreadable {
        what: SYMBOL,
        at,
        source,
    })?;
    if found == own {
        return Ok(());
    }
    Err(Refusal::OrcHeader {
        module: crate::change::hex::encode(found.get(..DIGEST_BYTES).unwrap_or(found)),
        guest: crate::change::hex::encode(&own),
    })
}
