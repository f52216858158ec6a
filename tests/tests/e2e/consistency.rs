//! Functions patched together change at one instant. A thousand cycles and more: `cargo xtask storm --consistency 1000`.

use e2e::consistency;
use guest_core::commit::Model;

/// Cycles of apply and revert.
const CYCLES: u64 = 150;
/// The same of those that may be transitions.
const CYCLES_HYBRID: u64 = 60;

#[test]
fn over_many_cycles_no_old_function_reaches_a_new_one_nor_the_reverse() {
    consistency::run(CYCLES, Model::CleanCut);
}

/// Task by task, where a vCPU is inside at the first instant that is tried.
#[test]
fn over_many_transitions_no_task_runs_old_and_new_functions() {
    consistency::run(CYCLES_HYBRID, Model::Hybrid);
}
