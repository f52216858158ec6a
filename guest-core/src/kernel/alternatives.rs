//! The layout of alternatives, and the CPU features by which the kernel has chosen among them.

use super::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::module::AltLayout;
use crate::paging::PAGE_SIZE;

/// The layout of the kernel's `struct alt_instr`. The module was compiled with the same.
///
/// # Errors
///
/// The kernel's types lack a member.
pub fn layout(live: &Live<'_>) -> Result<AltLayout, KernelError> {
    let entry = live.kernel.btf.structure("alt_instr")?;
    Ok(AltLayout {
        size: entry.size(),
        instr_offset: entry.offset("instr_offset")?,
        repl_offset: entry.offset("repl_offset")?,
        // Since 6.3 it is a bit field of 16 bits, which ends where the bytes of `flags` begin.
        cpuid: entry.member("cpuid")?.offset(),
        flags: entry.try_member("flags").map(|member| member.offset()),
        instrlen: entry.offset("instrlen")?,
        replacementlen: entry.offset("replacementlen")?,
    })
}

/// Reads `boot_cpu_data.x86_capability`: the words of CPU features, and behind them those of CPU bugs.
///
/// # Errors
///
/// The member does not exist or cannot be read.
pub fn capabilities(live: &Live<'_>) -> Result<Vec<u32>, KernelError> {
    let member = live
        .kernel
        .btf
        .structure("cpuinfo_x86")
        .and_then(|cpu| cpu.member("x86_capability"));
    let member = member.map_err(KernelError::from)?;
    let at = live.kernel.symbol("boot_cpu_data")?.wrapping_add(member.offset());
    let mut bytes = vec![0; usize::try_from(member.size.min(PAGE_SIZE)).unwrap_or(0)];
    let what = "boot_cpu_data.x86_capability";
    live.constant()
        .read(at, &mut bytes)
        .map_err(|source| KernelError::Unreadable { what, at, source })?;
    Ok(bytes
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect())
}
