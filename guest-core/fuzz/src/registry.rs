//! A registry that the guest wrote itself: header as it must be, slots and records from the input.

use super::common::guest::{CAVE, Guest, gpa};
use guest_core::Kernel;
use guest_core::plan::{cleanup, recovery, revert};
use guest_core::registry::{Registry, cave};

/// Where the slots start in the registry's page, and their bytes.
const SLOTS: (u64, usize) = (64, 32);
/// The arena's first page, behind the registry and the page table.
const RECORDS: u64 = CAVE + 2 * 4096;

thread_local! {
    /// A guest with an empty registry.
    static LAID: Guest = super::with_sound(|guest, kernel| {
        let live = kernel.live(&guest.ram);
        let caves = cave::find(&live).expect("the caves of a sound guest");
        let registry = Registry::find(&live, &caves).expect("room for a registry in a sound guest");
        for change in registry.creation() {
            change.make(&guest.ram).expect("an empty registry");
        }
        guest
    });
}

/// The input is a number of slots, the slots, and what is behind them in the arena.
pub fn run(data: &[u8]) {
    let Some((slots, rest)) = data.split_first() else {
        return;
    };
    let (slots, rest) = rest.split_at(rest.len().min(usize::from(*slots % 8) * SLOTS.1));
    let guest = LAID.with(Guest::clone);
    lay(&guest, slots, rest);
    guest.ram.count_from_here();
    super::with_sound(|_, kernel| look(&guest, kernel));
    super::assert_bounded(&guest);
}

fn lay(guest: &Guest, slots: &[u8], pool: &[u8]) {
    guest.put(CAVE + SLOTS.0, slots);
    let room = (0x10_0000 - 2 * 4096).min(pool.len());
    guest.put(RECORDS, &pool[..room]);
    // A checksum is no obstacle for whoever writes the record: where a slot's is all ones, it is made to fit.
    for (number, slot) in slots.chunks_exact(SLOTS.1).enumerate() {
        let word = |at: usize| u64::from(u32::from_le_bytes(slot[at..at + 4].try_into().expect("4 bytes")));
        let (first, offset, len) = (word(8), word(16), word(20));
        if word(24) == 0xffff_ffff && first * 4096 + offset + len <= 0x10_0000 {
            let record = guest.bytes_at(CAVE + first * 4096 + offset, len as usize);
            let at = CAVE + SLOTS.0 + (number * SLOTS.1) as u64 + 24;
            guest.ram.put(gpa(at), &crc32fast::hash(&record).to_le_bytes());
        }
    }
}

fn look(guest: &Guest, kernel: &Kernel) {
    let live = kernel.live(&guest.ram);
    let Ok(registry) = Registry::find(&live, &[]) else {
        return;
    };
    assert!(registry.exists);
    let _ = registry.patch_code();
    let _ = registry.allocate(3);
    let _ = cleanup(&live, &registry);
    let _ = recovery(&live, &registry);
    for record in registry.entries.iter().filter_map(|entry| entry.record.as_ref()) {
        let _ = revert(&live, &registry, &record.id);
    }
}
