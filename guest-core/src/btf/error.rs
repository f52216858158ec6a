//! What can be wrong with type information, or with what was asked of it.

/// A type's number in BTF; 0 is `void`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TypeId(pub u32);

/// Why the guest's type information could not be read, or does not hold what was looked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BtfError {
    /// The header is not one of BTF version 1, or its sections leave the blob.
    #[error("BTF header: {what} is {found:#x}, expected {expected:#x}")]
    Header {
        /// The header's field.
        what: &'static str,
        /// Its value.
        found: u64,
        /// What it must be, or may be at most.
        expected: u64,
    },
    /// A type record is cut off by the end of the type section.
    #[error("BTF type {id} at offset {offset:#x} does not fit into the {section}-byte type section")]
    Truncated {
        /// Number of the type.
        id: u32,
        /// Its offset in the type section, in bytes.
        offset: usize,
        /// Length of the type section, in bytes.
        section: usize,
    },
    /// A kind this reader does not know, so that it cannot tell where the next type starts.
    #[error("BTF type {id} is of kind {kind}, known are 1 to 19")]
    UnknownKind {
        /// Number of the type.
        id: u32,
        /// The kind found.
        kind: u32,
    },
    /// No struct or union of that name.
    #[error("BTF has no struct or union `{name}`")]
    NoStruct {
        /// The name looked for.
        name: String,
    },
    /// Several structs of that name that differ in what was asked.
    #[error("BTF has {count} structs `{name}`, which differ in {what}")]
    Ambiguous {
        /// The name looked for.
        name: String,
        /// How many there are.
        count: usize,
        /// In what they differ: the size, or a member.
        what: String,
    },
    /// A struct without that member.
    #[error("BTF: struct `{structure}` has no member `{path}`: no `{part}` in it")]
    NoMember {
        /// Name of the struct.
        structure: String,
        /// The whole path looked for.
        path: String,
        /// The part of the path that was not found.
        part: String,
    },
    /// The path goes through something that has no members, or indexes what is no array.
    #[error("BTF: `{path}` in struct `{structure}`: {problem} at `{part}`")]
    BadPath {
        /// Name of the struct.
        structure: String,
        /// The whole path looked for.
        path: String,
        /// The part at which it goes wrong.
        part: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// No enumerator of that name.
    #[error("BTF has no enumerator `{name}`")]
    NoEnumerator {
        /// The name looked for.
        name: String,
    },
    /// A type without a size: a forward declaration, a function, `void`, or a chain of types that does not end.
    #[error("BTF type {id} has no size")]
    NoSize {
        /// Number of the type.
        id: u32,
    },
}
