//! Finding the kernel in a spoilt guest, and all that follows.

use super::spoil::spoil;
use guest_core::Kernel;

/// Spoils, finds, and goes on with what was found.
pub fn run(data: &[u8]) {
    super::with_sound(|guest, _| {
        spoil(&guest, data);
        guest.ram.count_from_here();
        if let Ok(kernel) = Kernel::find(&guest.ram, &guest.vcpus) {
            super::live::look(&guest, &kernel);
        }
        super::assert_bounded(&guest);
    });
}
