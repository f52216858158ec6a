//! A livepatch module file.

use super::common::guest::FUNCTIONS;
use guest_core::Gva;
use guest_core::kernel::resolve::GuestSymbols;
use guest_core::module::{Bases, GuestContext, PatchModule};
use guest_core::plan::{ApplyOptions, apply};
use guest_core::registry::{Registry, cave};

thread_local! {
    /// Where the registry of a sound guest would be.
    static REGISTRY: Registry = super::with_sound(|guest, kernel| {
        let live = kernel.live(&guest.ram);
        let caves = cave::find(&live).expect("the caves of a sound guest");
        Registry::find(&live, &caves).expect("room for a registry in a sound guest")
    });
}

/// Parses, places and links against a sound guest; then plans to apply it there.
pub fn run(data: &[u8]) {
    super::with_sound(|guest, kernel| {
        let live = kernel.live(&guest.ram);
        if let Ok(module) = PatchModule::parse(data)
            && let Ok(layout) = guest_core::kernel::livepatch::layout(&live)
            && let Ok(patch) = module.patch(&layout)
            && let Ok(image) = module.image(&patch, &ALTERNATIVES)
        {
            let bases = Bases {
                text: Gva(FUNCTIONS),
                rodata: Gva(FUNCTIONS + 0x10_0000),
                data: Gva(FUNCTIONS + 0x20_0000),
                per_cpu: Gva(0x2_f000),
                module: Gva(FUNCTIONS + 0x28_0000),
            };
            let context = GuestContext {
                symbols: &GuestSymbols::new(&live),
                pending: &[],
                jump_labels: guest_core::module::JumpLayout { enabled: 0, entries: 8 },
                memory: &live,
                capabilities: &[0xaaaa_aaaa; 21],
            };
            let _ = image.link(&bases, &context);
        }
        let options = ApplyOptions {
            model: "none".to_owned(),
            now: 0,
            in_transition: false,
        };
        REGISTRY.with(|registry| {
            let _ = apply(&live, registry, data, &options);
        });
        assert!(guest.ram.differences().is_empty(), "planning changed the guest");
    });
}

const ALTERNATIVES: guest_core::module::AltLayout = guest_core::module::AltLayout {
    size: 12,
    instr_offset: 0,
    repl_offset: 4,
    cpuid: 8,
    flags: None,
    instrlen: 10,
    replacementlen: 11,
};
