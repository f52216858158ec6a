//! The map of the guest's RAM: guest-physical ranges, and the memory of the QEMU process that holds them.

pub mod backing;
pub mod devices;
pub mod gpa2hva;
pub mod map;
pub mod mtree;
pub mod ramblock;

pub use backing::{Backing, BackingError};
pub use map::{RamMap, RamMapError, RamRegion};
