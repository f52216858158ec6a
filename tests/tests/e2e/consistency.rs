//! Functions patched together change at one instant. A thousand cycles and more: `cargo xtask storm --consistency 1000`.

use e2e::consistency;

/// Cycles of apply and revert.
const CYCLES: u64 = 150;

#[test]
fn over_many_cycles_no_old_function_reaches_a_new_one_nor_the_reverse() {
    consistency::run(CYCLES);
}
