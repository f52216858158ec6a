//! What tests of plans and commits do over and over.

use super::guest::Guest;
use super::machine::Vm;
use super::module::{Function, livepatch, livepatch_with_sections};
use guest_core::Kernel;
use guest_core::commit::{CommitError, CommitOptions, Model, commit, stage};
use guest_core::plan::{ApplyOptions, Plan, Refusal, apply, cleanup, recovery};
use guest_core::registry::{Registry, cave};
use std::time::Duration;

/// One try, under the clean-cut model.
pub const OPTIONS: CommitOptions = CommitOptions {
    model: Model::CleanCut,
    timeout: Duration::ZERO,
    pause_max: Duration::from_secs(1),
};

/// The registry of a guest, or where it would be.
pub fn registry(guest: &Guest, kernel: &Kernel) -> Registry {
    let live = kernel.live(&guest.ram);
    Registry::find(&live, &cave::find(&live).unwrap()).unwrap()
}

/// The plan for a module; planning must change nothing.
pub fn plan(guest: &Guest, kernel: &Kernel, file: &[u8]) -> Result<Plan, Refusal> {
    let options = ApplyOptions {
        model: "clean-cut".to_owned(),
        now: 7,
        in_transition: false,
    };
    let before = guest.ram.differences();
    let planned = apply(&kernel.live(&guest.ram), &registry(guest, kernel), file, &options);
    assert!(guest.ram.differences() == before, "planning changed the guest");
    planned
}

/// The plan for a module that replaces one function.
pub fn plan_for(guest: &Guest, kernel: &Kernel, old: &'static str) -> Result<Plan, Refusal> {
    plan(guest, kernel, &livepatch("fix", &[Function::returning_one(old)]))
}

/// Why there is no such plan.
pub fn refusal(guest: &Guest, kernel: &Kernel, old: &'static str) -> Refusal {
    plan_for(guest, kernel, old).unwrap_err()
}

/// Commits a plan.
pub fn commit_plan(guest: &Guest, kernel: &Kernel, plan: &Plan) -> Result<(), CommitError> {
    commit(&kernel.live(&guest.ram), &mut Vm::new(guest), plan, &OPTIONS).map(|_| ())
}

/// Two functions, one of which has no ftrace site.
pub fn two() -> Vec<u8> {
    livepatch(
        "fix",
        &[
            Function::returning_one("victim"),
            Function::returning_one("notrace_victim"),
        ],
    )
}

/// The same with tables for the loader, and variables on each CPU.
pub fn two_with_sections() -> Vec<u8> {
    livepatch_with_sections("fix", &["victim", "notrace_victim"])
}

/// A guest with those two patched, as the state that differences are told from.
pub fn patched() -> (Guest, Kernel) {
    let mut guest = Guest::new();
    let kernel = guest.kernel();
    commit_plan(&guest, &kernel, &plan(&guest, &kernel, &two()).unwrap()).unwrap();
    guest.ram.take_baseline();
    (guest, kernel)
}

/// Where the jump at `at` leads.
pub fn target(guest: &Guest, at: u64) -> u64 {
    let bytes = guest.bytes_at(at, 5);
    assert_eq!(bytes[0], 0xe9, "no jump at {at:#x}");
    let distance = i32::from_le_bytes(bytes[1..].try_into().unwrap());
    at.wrapping_add(5).wrapping_add_signed(distance.into())
}

/// What the next vmpatch does first: undoes what was cut off, and wipes what is not in force.
pub fn recover(guest: &Guest, kernel: &Kernel) {
    let live = kernel.live(&guest.ram);
    if let Some(plan) = recovery(&live, &registry(guest, kernel)).unwrap() {
        commit_plan(guest, kernel, &plan).unwrap();
    }
    stage(&live, &cleanup(&live, &registry(guest, kernel)).unwrap()).unwrap();
}
