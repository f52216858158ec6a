//! vmpatch beside the guest's own use of ftrace: tracers, kprobes, livepatches. Neither may harm the other.

use std::sync::LazyLock;

use e2e::bed::{self, Lent};
use e2e::ftrace::Ftrace;
use e2e::kit::{self, Modules};
use e2e::probe::{Seen, see};
use e2e::report::redirects;
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::kernel::Kernel;

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));
/// The patched function, the program that sees it, and a module for it.
const CVE: Cve = Cve::Y2026N52928;
const FUNCTION: &str = "unix_ioctl";

fn guest() -> Lent {
    bed::lend(kit::guest(Kernel::CLOUD_6_1))
}

#[test]
fn a_guest_traces_all_functions_after_a_patch_and_the_fix_stays_in_force() {
    let guest = guest();
    let vmpatch = Vmpatch::on(&guest);
    let tracing = Ftrace::of(&guest);
    let applied = vmpatch.apply(&MODULES.cve(CVE));
    assert_eq!(redirects(&applied), [(FUNCTION, "ftrace")]);

    for tracer in ["function", "function_graph"] {
        tracing.start(tracer);
        assert_eq!(see(&guest, CVE.program()), Seen::Fixed, "while {tracer} runs");
        tracing.set("tracing_on", "0");
        let trace = tracing.get("trace");
        assert!(trace.lines().count() > 1000, "{tracer} sees next to nothing: {trace}");
        tracing.reset();
        bed::assert_healthy(&guest);
    }
    tracing.assert_alive();
    assert_eq!(see(&guest, CVE.program()), Seen::Fixed);

    vmpatch.revert_all();
    assert_eq!(see(&guest, CVE.program()), Seen::Flawed);
    tracing.assert_alive();
}
