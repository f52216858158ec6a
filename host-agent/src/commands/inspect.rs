//! `inspect`: what was found in the guest.

use crate::cli::Options;
use crate::error::Failure;
use crate::progress::Progress;
use crate::report::{Address, AddressRange, Inspection};
use crate::session::{Session, Target};
use guest_core::Gva;
use guest_core::paging::PAGE_SIZE;

/// Reads all there is to know.
pub fn inspect(options: &Options, progress: &Progress) -> Result<Inspection, Failure> {
    let session = Session::open_to_read(&Target::from_options(options)?, progress)?;
    let (kernel, registry) = (&session.kernel, &session.registry);
    let range = |start: Gva, len| AddressRange {
        start: Address(start.0),
        len,
    };
    let ram = session
        .attached
        .memory()
        .ram()
        .iter()
        .map(|range| range.end.0 - range.start.0)
        .sum();
    Ok(Inspection {
        guest: session.guest(),
        qemu: session.attached.qemu_version(),
        accelerator: session.attached.accelerator().to_owned(),
        vcpus: session.vcpus.len(),
        ram,
        banner: kernel.banner.clone(),
        image: range(kernel.image.start(), kernel.image.end().0 - kernel.image.start().0),
        image_physical: Address(kernel.image.start().0.wrapping_sub(kernel.image.distance)),
        page_table_levels: kernel.space.levels,
        page_table_root: Address(kernel.space.root.0),
        symbols: kernel.symbols.len(),
        types: kernel.btf.type_count(),
        caves: session.caves.iter().map(|cave| range(cave.start, cave.len)).collect(),
        registry: registry
            .exists
            .then(|| range(registry.cave, registry.pool_pages * PAGE_SIZE)),
        sources: kernel.sources.clone(),
    })
}
