//! The text cave: filler inside the kernel's text, which the kernel owns and never uses.
//!
//! In a kernel with page-table isolation, the linker script pads `.text` to 2 MiB around the entry code
//! (`ALIGN_ENTRY_TEXT_BEGIN`, arch/x86/kernel/vmlinux.lds.S, since 4.16), and to 1 MiB around the SRSO thunks. It pads
//! with 0xCC (int3).

use crate::addr::Gva;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::paging::PAGE_SIZE;
use std::ops::Range;

/// The byte that the linker pads text with: int3.
pub const FILLER: u8 = 0xcc;
/// Shortest run of filler that counts as a cave, in bytes. A shorter run may be an accident; the real ones have 1 MiB and more.
pub const CAVE_BYTES_MIN: u64 = 256 << 10;
/// Bytes that are read at once, whole pages.
const READ_BYTES: usize = 64 << 10;
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
/// of the kernel lies inside. Therefore only the gaps between symbols are read that are as long as a cave.
///
/// # Errors
///
/// The kernel has no such symbols, or its text cannot be read.
pub fn find(live: &Live<'_>) -> Result<Vec<Cave>, KernelError> {
    let start = live.kernel.symbol("_stext")?;
    let end = live.kernel.symbol("_etext")?;
    let end = Gva(end.0.min(start.0.saturating_add(TEXT_BYTES_MAX))).align_down(PAGE_SIZE);
    let mut caves = Vec::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut last = start;
    for next in live
        .kernel
        .symbols
        .addresses_from(start)
        .take_while(|at| *at < end)
        .chain([end])
    {
        if next.0.saturating_sub(last.0) >= CAVE_BYTES_MIN {
            find_between(live, last..next, end, &mut buffer, &mut caves)?;
        }
        last = next;
    }
    Ok(caves)
}

/// Finds the caves between two symbols, or behind the last one. A run of filler that a symbol lies in is no cave, also where it is only the first
/// or the last page.
fn find_between(
    live: &Live<'_>,
    symbols: Range<Gva>,
    end: Gva,
    buffer: &mut [u8],
    caves: &mut Vec<Cave>,
) -> Result<(), KernelError> {
    let is_cave = |run: &Cave| {
        let run_end = run.start.wrapping_add(run.len);
        run.len >= CAVE_BYTES_MIN && run.start > symbols.start && run_end <= symbols.end
    };
    let end = end.min(symbols.end.align_down(PAGE_SIZE).wrapping_add(PAGE_SIZE));
    let mut run: Option<Cave> = None;
    let mut at = symbols.start.align_down(PAGE_SIZE);
    while at < end {
        let left = usize::try_from(end.0 - at.0).unwrap_or(usize::MAX);
        let (some, _) = buffer.split_at_mut(left.min(buffer.len()));
        live.read(at, some).map_err(|source| KernelError::Unreadable {
            what: "kernel text",
            at,
            source,
        })?;
        for page in some.chunks(PAGE_SIZE as usize) {
            match (is_filler(page), &mut run) {
                (true, Some(run)) => run.len += PAGE_SIZE,
                (true, None) => {
                    run = Some(Cave {
                        start: at,
                        len: PAGE_SIZE,
                    });
                }
                (false, _) => caves.extend(run.take().filter(is_cave)),
            }
            at = at.wrapping_add(PAGE_SIZE);
        }
    }
    caves.extend(run.filter(is_cave));
    Ok(())
}

/// True where every byte is [`FILLER`].
pub fn is_filler(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<128>();
    // No branch within a chunk, so that many bytes are compared at once.
    let is_filler = |chunk: &[u8]| chunk.iter().fold(0, |differing, byte| differing | (byte ^ FILLER)) == 0;
    chunks.iter().all(|chunk| is_filler(chunk)) && is_filler(rest)
}
