//! Patches are built from the very code that guests run. Over many files: `cargo run --release -p e2e --bin selfcheck`.

use e2e::selfcheck::Source;
use e2e::session;
use e2e::{bed, kit};
use images::kernel::Kernel;

/// Files, of which some are not in this kernel; few, as compiling takes seconds each.
const FILES: usize = 13;
/// Files that are.
const FILES_MIN: usize = 8;
/// Functions that so many files have at the least.
const FUNCTIONS_MIN: usize = 100;

#[test]
fn what_is_compiled_is_what_a_guest_runs_and_lines_in_front_change_nothing() {
    let guest = bed::lend(kit::guest(Kernel::CLOUD_6_1));
    let source = Source::of(&Kernel::CLOUD_6_1).unwrap();
    let session = session::open(&guest).unwrap();
    let files = source.files(FILES);
    let tally = source.check(&session.live(), &files, &|_| {}).unwrap();
    assert!(tally.is_clean(), "{tally}");
    assert!(tally.files >= FILES_MIN, "{tally}");
    assert!(tally.same >= FUNCTIONS_MIN, "{tally}");
}
