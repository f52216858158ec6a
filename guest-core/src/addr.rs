//! Addresses as types: an address of one address space cannot be passed where another is meant.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on; `None` where that leaves 64 bits.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// The address `bytes` further on, modulo 2^64: for addresses whose use is checked afterwards.
            pub fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The address moved by a signed `distance` in bytes, modulo 2^64.
            pub fn wrapping_offset(self, distance: i64) -> Self {
                Self(self.0.wrapping_add_signed(distance))
            }

            /// Bytes from `base` up to here; `None` where `base` lies behind.
            pub fn checked_sub(self, base: Self) -> Option<u64> {
                self.0.checked_sub(base.0)
            }

            /// The address rounded down to a multiple of `align` bytes, a power of two.
            pub fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align - 1))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, " {:#x}"), self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, " {:#x}"), self.0)
            }
        }
    };
}

address!(
    /// A guest-physical address, in bytes.
    Gpa,
    "GPA"
);
address!(
    /// A guest-virtual address, in bytes. Its user defines which page table maps it.
    Gva,
    "GVA"
);
address!(
    /// A virtual address in the VMM's process on the host, in bytes.
    Hva,
    "HVA"
);
