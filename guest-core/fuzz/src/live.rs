//! A guest that is spoilt after its kernel was found: everything that is read of it later.

use super::common::guest::{FUNCTIONS, Guest};
use super::common::module::{Function, livepatch};
use super::spoil::spoil;
use guest_core::kernel::locks::Locks;
use guest_core::kernel::{exports, ftrace, modules, sites};
use guest_core::plan::{ApplyOptions, apply, cleanup, recovery, revert};
use guest_core::registry::{Registry, cave};
use guest_core::task::Quiescence;
use guest_core::unwind::{OldCode, OldFunction};
use guest_core::{Gva, Kernel};

/// Spoils and looks.
pub fn run(data: &[u8]) {
    super::with_sound(|guest, kernel| {
        spoil(&guest, data);
        guest.ram.count_from_here();
        look(&guest, kernel);
        super::assert_bounded(&guest);
    });
}

/// Everything that vmpatch reads of a kernel that was found. Nothing of it writes.
pub fn look(guest: &Guest, kernel: &Kernel) {
    let live = kernel.live(&guest.ram);
    let before = guest.ram.differences();
    let _ = exports::find(&live, "schedule");
    let _ = ftrace::record(&live, Gva(FUNCTIONS));
    let _ = Locks::find(&live).and_then(|locks| locks.held(&live));
    let _ = sites::rewritten_in(&live, &(Gva(FUNCTIONS)..Gva(FUNCTIONS + 5)));
    for module in modules::all(&live).unwrap_or_default().iter().take(2) {
        let _ = modules::symbols(&live, module).and_then(|_| modules::export(&live, module, "victim"));
    }
    if let Ok(caves) = cave::find(&live)
        && let Ok(registry) = Registry::find(&live, &caves)
    {
        let file = livepatch(
            "fix",
            &[
                Function::returning_one("victim"),
                Function::returning_one("notrace_victim"),
            ],
        );
        let options = ApplyOptions {
            model: "none".to_owned(),
            now: 0,
            in_transition: false,
        };
        let _ = apply(&live, &registry, &file, &options);
        let _ = cleanup(&live, &registry);
        let _ = recovery(&live, &registry);
        for record in registry.entries.iter().filter_map(|entry| entry.record.as_ref()) {
            let _ = revert(&live, &registry, &record.id);
        }
    }
    let code = Gva(FUNCTIONS + 64 * 3)..Gva(FUNCTIONS + 64 * 4);
    let old = OldCode::new(vec![OldFunction {
        name: "victim".to_owned(),
        code,
    }]);
    if let Ok(finder) = Quiescence::find(&live)
        && let Ok(mut snapshot) = finder.snapshot(&live, old, Vec::new())
    {
        let _ = snapshot.preview(&live);
        let _ = snapshot.recheck(&live, &guest.vcpus, &|| false);
    }
    assert!(guest.ram.differences() == before, "looking changed the guest");
}
