//! Whether a module was made for the guest's kernel.

use super::{Refusal, this_module};
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{KernelError, Live, exports, livepatch};
use crate::memory::VirtMemory;
use crate::module::{OrcTables, PatchModule};
use crate::text::plain;
use std::collections::BTreeSet;

/// Longest `vermagic` read.
const VERMAGIC_BYTES_MAX: usize = 256;
/// Bytes of a SHA-1.
const DIGEST_BYTES: usize = 20;
/// What every kernel with modules exports, and modules are compiled against.
const IN_EACH_KERNEL: &str = "module_layout";
/// Where the image has the digest of its ORC format.
const ORC_HEADER: &str = "__start_orc_header";

/// Requires that the module was made for this kernel: compares `vermagic`, the types of what the module uses, and the ORC format.
pub(super) fn check(live: &Live<'_>, module: &PatchModule<'_>) -> Result<(), Refusal> {
    let live = &live.constant();
    check_vermagic(live, module.info().get("vermagic").unwrap_or_default())?;
    check_versions(live, module)?;
    check_sizes(live, module)?;
    this_module::check_layout(live, module)?;
    check_orc_header(live, module)
}

/// Refuses a module that replaces all other livepatches in a guest that has livepatches of its own: the guest alone can take those out.
pub(super) fn refuse_beside_own_livepatches(live: &Live<'_>) -> Result<(), Refusal> {
    let mut own: Vec<_> = livepatch::held(live)?.into_iter().map(|held| held.livepatch).collect();
    own.dedup();
    if own.is_empty() {
        return Ok(());
    }
    let livepatches = own.join(", ");
    Err(Refusal::Replace { livepatches })
}

/// Requires that the module's `vermagic` is the kernel's own. Where the kernel has no such symbol, compares the release alone.
fn check_vermagic(live: &Live<'_>, module: &str) -> Result<(), Refusal> {
    let own = live.kernel.symbols.unique("vermagic").and_then(|at| {
        let mut bytes = [0; VERMAGIC_BYTES_MAX];
        live.read(at, &mut bytes).ok()?;
        let text = bytes.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(text).trim_end().to_owned())
    });
    let fits = match &own {
        Some(own) => own == module.trim_end(),
        None => module.split(' ').next() == Some(live.kernel.release.as_str()),
    };
    let guest = own.unwrap_or_else(|| live.kernel.release.clone());
    if fits {
        Ok(())
    } else {
        Err(Refusal::Vermagic {
            module: module.to_owned(),
            guest,
        })
    }
}

/// How far the types that a module was compiled against were compared with the guest's (`CONFIG_MODVERSIONS`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checksums {
    /// All checksums were compared. A difference is a refusal.
    Compared,
    /// The checksums in the module were compared. The module has none for these symbols, which it imports and for which the guest has
    /// checksums.
    Incomplete(Vec<String>),
    /// The guest's kernel has checksums, the module has none.
    NotInModule,
    /// The guest's kernel has no checksums (Debian's since 7.0).
    NotInKernel,
    /// The guest's kernel has no checksums, but the sizes of the module's types were compared. A difference is a refusal.
    Sizes,
}

/// Tells how far a module's types can be compared with the guest's.
///
/// # Errors
///
/// The module's types or the guest's exports cannot be read.
pub fn checksums(live: &Live<'_>, module: &PatchModule<'_>) -> Result<Checksums, Refusal> {
    let live = &live.constant();
    if exports::find(live, IN_EACH_KERNEL)?
        .and_then(|export| export.crc)
        .is_none()
    {
        let types = module.base_types().map_err(Refusal::BaseTypes)?;
        let has_any = types.is_some_and(|types| types.named_sizes().next().is_some());
        return Ok(if has_any {
            Checksums::Sizes
        } else {
            Checksums::NotInKernel
        });
    }
    let versions = module.versions()?;
    if versions.is_empty() {
        return Ok(Checksums::NotInModule);
    }
    let known: BTreeSet<_> = versions.iter().map(|(symbol, _)| *symbol).collect();
    let guest = GuestSymbols::new(live);
    let mut missing = Vec::new();
    for symbol in module.undefined().filter(|symbol| !known.contains(symbol)) {
        if guest.export(symbol)?.is_some_and(|export| export.crc.is_some()) {
            missing.push(symbol.to_owned());
        }
    }
    Ok(match missing.as_slice() {
        [] => Checksums::Compared,
        [..] => Checksums::Incomplete(missing),
    })
}

/// Compares the module's checksums of types with those of the exports of the image and of the guest's modules, as the kernel's own
/// loader does (kernel/module/version.c, `check_version`).
fn check_versions(live: &Live<'_>, module: &PatchModule<'_>) -> Result<(), Refusal> {
    let guest = GuestSymbols::new(live);
    for (symbol, crc) in module.versions()? {
        let found = guest.export(symbol)?.and_then(|export| export.crc);
        if let Some(guest) = found.filter(|guest| *guest != crc) {
            return Err(Refusal::Version {
                symbol: symbol.to_owned(),
                module: crc,
                guest,
            });
        }
    }
    Ok(())
}

/// Requires that the kernel has each type of the module's `.BTF.base` in the same size, as the kernel itself does when it loads a module's
/// BTF (kernel/bpf/btf.c, `btf_relocate` of tools/lib/bpf/btf_relocate.c, since 6.11).
fn check_sizes(live: &Live<'_>, module: &PatchModule<'_>) -> Result<(), Refusal> {
    let Some(types) = module.base_types().map_err(Refusal::BaseTypes)? else {
        return Ok(());
    };
    for (name, bytes) in types.named_sizes() {
        let name = plain(name);
        let guest = live.kernel.btf.sizes_of(&name);
        if !guest.contains(&bytes) {
            return Err(Refusal::TypeSize {
                name,
                module: bytes,
                guest,
            });
        }
    }
    Ok(())
}

/// Requires that the module's ORC entries have the length of the kernel's, which reads them.
pub(super) fn check_orc_entry(live: &Live<'_>, orc: &OrcTables) -> Result<(), Refusal> {
    let guest = live
        .kernel
        .btf
        .structure("orc_entry")
        .map_err(KernelError::from)?
        .size();
    match orc.rows.is_empty() || orc.entry_size == guest {
        true => Ok(()),
        false => Err(Refusal::OrcEntry {
            module: orc.entry_size,
            guest,
        }),
    }
}

/// Requires that module and kernel have the same digest of the ORC format, where both have one. With another format, stacks would be
/// unwound wrongly through new functions.
///
/// `.orc_header` (arch/x86/include/asm/orc_header.h, since 6.4) is a SHA-1 of the text that describes the format
/// (scripts/orc_hash.sh), in the kernel image as in each module.
fn check_orc_header(live: &Live<'_>, module: &PatchModule<'_>) -> Result<(), Refusal> {
    let (Some(found), Some(at)) = (module.orc_header(), live.kernel.symbols.unique(ORC_HEADER)) else {
        return Ok(());
    };
    let mut own = [0; DIGEST_BYTES];
    live.read(at, &mut own).map_err(|source| KernelError::Unreadable {
        what: ORC_HEADER,
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
