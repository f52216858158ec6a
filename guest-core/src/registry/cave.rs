//! The text cave: filler inside the kernel's text, which the kernel owns and never uses.
//!
//! In a kernel with page-table isolation, the linker script pads `.text` to 2 MiB around the entry code
//! (`ALIGN_ENTRY_TEXT_BEGIN`, arch/x86/kernel/vmlinux.lds.S, since 4.16), and to 1 MiB around the SRSO thunks. It pads
//! with 0xCC (int3).

use crate::addr::Gva;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::paging::PAGE_SIZE;

/// The byte that the linker pads text with: int3.
pub const FILLER: u8 = 0xcc;
/// Shortest run of filler that counts as a cave, in bytes. A shorter run may be an accident; the real ones have 1 MiB and more.
pub const CAVE_BYTES_MIN: u64 = 256 << 10;
/// Bytes of text that are scanned: more than a kernel has.
const TEXT_BYTES_MAX: u64 = 256 << 20;

/// A run of whole pages of filler inside the kernel's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cave {
    /// Guest-virtual address of the first byte; a multiple of the page size.
    pub start: Gva,
    /// Length in bytes; a multiple of the page size.
    pub len: u64,
}

/// Finds all caves between `_stext` and `_etext`, in ascending order. It has read every byte of each cave as filler, and no symbol
/// of the kernel lies inside.
///
/// # Errors
///
/// The kernel has no such symbols, or its text cannot be read.
pub fn find(live: &Live<'_>) -> Result<Vec<Cave>, KernelError> {
    let start = live.kernel.symbol("_stext")?;
    let end = live.kernel.symbol("_etext")?;
    let end = Gva(end.0.min(start.0.saturating_add(TEXT_BYTES_MAX))).align_down(PAGE_SIZE);
    let mut caves: Vec<Cave> = Vec::new();
    let mut page = [0; PAGE_SIZE as usize];
    let mut at = start.align_down(PAGE_SIZE);
    while at < end {
        live.read(at, &mut page).map_err(|source| KernelError::Unreadable {
            what: "kernel text",
            at,
            source,
        })?;
        if is_filler(&page) {
            match caves.last_mut().filter(|cave| cave.start.wrapping_add(cave.len) == at) {
                Some(cave) => cave.len += PAGE_SIZE,
                None => caves.push(Cave {
                    start: at,
                    len: PAGE_SIZE,
                }),
            }
        }
        at = at.wrapping_add(PAGE_SIZE);
    }
    caves.retain(|cave| cave.len >= CAVE_BYTES_MIN && !holds_a_symbol(live, cave));
    Ok(caves)
}

/// True where every byte is [`FILLER`].
pub fn is_filler(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == FILLER)
}

fn holds_a_symbol(live: &Live<'_>, cave: &Cave) -> bool {
    let next = live
        .kernel
        .symbols
        .containing(Gva(cave.start.0.wrapping_sub(1)))
        .map(|(_, next)| next);
    next.is_none_or(|next| next < cave.start.wrapping_add(cave.len))
}
