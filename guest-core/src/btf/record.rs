//! One type record: its kind, and where its parts lie.
//!
//! Format: `struct btf_type` in the kernel's include/uapi/linux/btf.h. `info` holds the element count in its low
//! bits (16, and 24 in kernels after 7.1), the kind from bit 24 on and the kind flag in bit 31; the bits between
//! are zero in the older form, so that one reading does for both.

/// Bytes of `struct btf_type`, before what its kind adds.
pub(super) const RECORD: usize = 12;
/// Bytes of one member, section variable or 64-bit enumerator.
pub(super) const WIDE_ELEMENT: usize = 12;
/// Bytes of one enumerator or parameter.
pub(super) const NARROW_ELEMENT: usize = 8;

/// The kinds whose meaning is used here; those that only need to be skipped are [`Kind::Other`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Int,
    Ptr,
    Array,
    Struct,
    Union,
    Enum,
    Enum64,
    /// Typedef, const, volatile, restrict, type tag: an alias of the type it refers to.
    Alias {
        typedef: bool,
    },
    Var,
    Float,
    Other,
}

/// A decoded record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record {
    pub name_off: u32,
    pub kind: Kind,
    pub kind_flag: bool,
    /// A size in bytes, or the type referred to, by kind.
    pub size_or_type: u32,
    /// Bytes that follow the record and belong to it.
    pub extra: usize,
}

impl Record {
    /// Decodes the three words of a record. Error: the unknown kind.
    pub fn decode(name_off: u32, info: u32, size_or_type: u32) -> Result<Self, u32> {
        let elements = (info & 0x00ff_ffff) as usize;
        let number = (info >> 24) & 0x7f;
        let (kind, extra) = match number {
            1 => (Kind::Int, 4),
            2 => (Kind::Ptr, 0),
            3 => (Kind::Array, 12),
            4 => (Kind::Struct, elements * WIDE_ELEMENT),
            5 => (Kind::Union, elements * WIDE_ELEMENT),
            6 => (Kind::Enum, elements * NARROW_ELEMENT),
            8 => (Kind::Alias { typedef: true }, 0),
            // volatile, const, restrict, type tag
            9 | 10 | 11 | 18 => (Kind::Alias { typedef: false }, 0),
            14 => (Kind::Var, 4),
            16 => (Kind::Float, 0),
            19 => (Kind::Enum64, elements * WIDE_ELEMENT),
            // forward declaration, function
            7 | 12 => (Kind::Other, 0),
            // function prototype
            13 => (Kind::Other, elements * NARROW_ELEMENT),
            // data section
            15 => (Kind::Other, elements * WIDE_ELEMENT),
            // declaration tag
            17 => (Kind::Other, 4),
            unknown => return Err(unknown),
        };
        let kind_flag = info >> 31 == 1;
        Ok(Self {
            name_off,
            kind,
            kind_flag,
            size_or_type,
            extra,
        })
    }

    /// True for what is looked up by name.
    pub fn is_named_type(&self) -> bool {
        matches!(self.kind, Kind::Struct | Kind::Union | Kind::Alias { typedef: true })
    }
}
