//! Where the guest's RAM is: guest-physical ranges, and what in the QEMU process holds them.

pub mod backing;
pub mod devices;
pub mod gpa2hva;
pub mod map;
pub mod mtree;
pub mod ramblock;

pub use backing::{Backing, BackingError};
pub use map::{RamMap, RamMapError, RamRegion};
