//! What the fuzz targets do, as plain functions: the fuzzer calls them, and so does the ordinary test
//! `tests/fuzz_replay.rs`, with every input under `corpus/`.
//!
//! Each takes any bytes, and must come back: with an error or without, in bounded time and memory, never with a panic.
//!
//!     cargo fuzz run --sanitizer none kallsyms        # in guest-core/; works with a stable compiler
//!
//! An input that was found worth keeping goes into `corpus/<target>/`, small, and of our own making: no bytes of a
//! real kernel.

pub mod btf;
pub mod find;
pub mod kallsyms;
pub mod live;
pub mod module;
pub mod page_tables;
pub mod registry;
pub mod spoil;

#[path = "../../tests/common/mod.rs"]
pub mod common;

use common::guest::Guest;
use guest_core::Kernel;

thread_local! {
    static SOUND: (Guest, Kernel) = {
        let guest = Guest::new();
        let kernel = guest.kernel();
        (guest, kernel)
    };
}

/// Calls `f` with a copy of a sound guest, and its kernel.
fn with_sound<R>(f: impl FnOnce(Guest, &Kernel) -> R) -> R {
    SOUND.with(|(guest, kernel)| f(guest.clone(), kernel))
}

/// No input makes a target read guest memory more often than this.
const READS_MAX: u64 = 60_000_000;
/// Nor fill a bigger buffer from it.
const READ_BYTES_MAX: usize = 64 << 20;

/// Panics where too much was read since the guest was cloned.
fn assert_bounded(guest: &Guest) {
    let (reads, largest) = (guest.ram.counted().0, guest.ram.largest_read());
    assert!(reads <= READS_MAX, "{reads} reads");
    assert!(largest <= READ_BYTES_MAX, "{largest} bytes in one read");
}
