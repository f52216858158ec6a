//! `inspect`: what was found in the guest.

use super::target::open;
use crate::program::cli::Options;
use crate::program::failure::Failure;
use crate::program::report::{Address, AddressRange, Guest, Inspection};
use guest_core::Gva;
use guest_core::paging::PAGE_SIZE;
use host_agent::session::Access;

/// Reads all there is to know.
pub fn inspect(options: &Options) -> Result<Inspection, Failure> {
    let session = open(options, Access::Read)?;
    let (kernel, registry) = (session.kernel(), session.registry());
    let range = |start: Gva, len| AddressRange {
        start: Address(start.0),
        len,
    };
    let ram = session
        .memory()
        .ram()
        .iter()
        .map(|range| range.end.0 - range.start.0)
        .sum();
    Ok(Inspection {
        guest: Guest::of(&session),
        qemu: session.identity().version_text(),
        accelerator: session.identity().accelerator.to_string(),
        vcpus: session.vcpus().len(),
        ram,
        banner: kernel.banner.clone(),
        image: range(kernel.image.start(), kernel.image.end().0 - kernel.image.start().0),
        image_physical: Address(kernel.image.start().0.wrapping_sub(kernel.image.distance)),
        page_table_levels: kernel.space.levels,
        page_table_root: Address(kernel.space.root.0),
        symbols: kernel.symbols.len(),
        types: kernel.btf.type_count(),
        caves: session.caves().iter().map(|cave| range(cave.start, cave.len)).collect(),
        registry: registry
            .exists
            .then(|| range(registry.cave, registry.arena_pages * PAGE_SIZE)),
        sources: kernel.sources.clone(),
    })
}
