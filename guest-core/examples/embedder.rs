//! Applies a patch to a guest, and reverts it: what a VMM does that embeds the core. The guest is the one of the core's own tests, 16 MiB
//! with a kernel made by hand, and the machine only pretends to pause it; a VMM gives its own in their place.
//!
//! usage: cargo run --package guest-core --example embedder

#[path = "../tests/common/mod.rs"]
mod common;

use common::machine::Vm;
use common::module::{Function, livepatch};
use guest_core::commit::Model;
use guest_core::guest::{Embedded, Guest, PatchFile, PatchOptions};
use std::error::Error;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let made_by_hand = common::guest::Guest::new();
    let mut guest = Guest::open(Embedded {
        memory: &made_by_hand.ram,
        machine: Vm::new(&made_by_hand),
    })?;
    println!("{}", guest.kernel().banner);
    // What an earlier process left half done comes first.
    guest.recover()?;

    let bytes = &livepatch("fix", &[Function::returning_one("victim")]);
    let name = "fix";
    let options = PatchOptions {
        model: Model::CleanCut,
        timeout: Duration::from_secs(1),
        grace: Duration::ZERO,
    };
    match guest.apply(PatchFile { name, bytes }, &options) {
        Ok(applied) => println!("applied {} at attempt {}", applied.record.id, applied.committed.tries),
        Err(error) => {
            println!("the guest is {:?}", error.guest_state());
            return Err(error.into());
        }
    }
    for patch in guest.status().patches {
        for status in patch.functions {
            let function = status.function;
            println!(
                "  {} {:#x} -> {:#x}: {:?}",
                function.name, function.old, function.new, status.runs
            );
        }
    }
    let reverted = guest.revert("fix", &options)?;
    println!("reverted {}", reverted.record.id);
    Ok(())
}
