//! Errors of linking.

use super::ResolveError;
use super::layout::AreaKind;
use super::sites::TableError;
use crate::addr::Gva;
use crate::memory::MemoryError;

/// Why a module cannot be linked for a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// The address of an area is not aligned, or has no space behind it.
    #[error("the {area:?} area ({size} bytes) can't be at {base}: expected a multiple of {align} bytes, and space")]
    Base {
        /// The area.
        area: AreaKind,
        /// Its bytes.
        size: u64,
        /// The address.
        base: Gva,
        /// The alignment needed, in bytes.
        align: u64,
    },
    /// A symbol has no address.
    #[error("cannot resolve {symbol}, needed by {needed_by}")]
    Symbol {
        /// Its name.
        symbol: String,
        /// The reference: section and offset, or the purpose.
        needed_by: String,
        /// Why not.
        #[source]
        cause: ResolveError,
    },
    /// A relocation type that is not handled.
    #[error("relocation type {kind} at {at} against {symbol} is not handled")]
    RelocationKind {
        /// Section and offset.
        at: String,
        /// `R_X86_64_*` as a number.
        kind: u32,
        /// The symbol's name.
        symbol: String,
    },
    /// The place of a relocation does not hold zeroes.
    #[error("relocation at {at} against {symbol}: found {found:02x?} there, expected zeroes")]
    NotZero {
        /// Section and offset.
        at: String,
        /// The symbol's name.
        symbol: String,
        /// The bytes there.
        found: Vec<u8>,
    },
    /// The value does not fit into the bytes of the relocation.
    #[error("{kind} at {at} ({place:#x}) cannot reach {symbol} at {target:#x}: the distance overflows 32 bits")]
    Overflow {
        /// Section and offset.
        at: String,
        /// The guest-virtual address of that place.
        place: u64,
        /// Name of the relocation type.
        kind: &'static str,
        /// The symbol's name.
        symbol: String,
        /// Guest-virtual address of the symbol, addend included.
        target: u64,
    },
    /// The bytes are not inside a placed section.
    #[error("{len} bytes at {at} are not inside a placed section")]
    Outside {
        /// Section and offset.
        at: String,
        /// Bytes.
        len: usize,
    },
    /// A table for the loader is malformed.
    #[error(transparent)]
    Table(#[from] TableError),
    /// Code that a table for the loader lists is not what the table is for.
    #[error("{table} lists {at}: found {found:02x?} there, expected {expected}")]
    Site {
        /// The table.
        table: &'static str,
        /// Section and offset of the code.
        at: String,
        /// The bytes there.
        found: Vec<u8>,
        /// What should be there.
        expected: String,
    },
    /// A thunk of the guest's kernel has unknown code.
    #[error("the guest's {symbol} at {at} begins with {found:02x?}, expected {expected}")]
    Thunk {
        /// The thunk's name.
        symbol: String,
        /// Its address.
        at: Gva,
        /// Its first bytes.
        found: Vec<u8>,
        /// The known beginnings.
        expected: &'static str,
    },
    /// The guest's kernel tracks call depth (`retbleed=stuff`), so that the patch's calls would have to count, too.
    #[error("the guest's kernel tracks call depth (its return thunk is call_depth_return_thunk), which is not handled")]
    CallDepth,
    /// It is unknown which NOP the kernel leaves in ftrace sites.
    #[error("can't tell which NOP the guest's kernel leaves in ftrace sites: {cause}")]
    SiteNop {
        /// Why.
        cause: String,
    },
    /// An alternative asks for a CPU feature that the guest's kernel does not have in its list.
    #[error("the alternative at {at} asks for CPU feature {feature}, the guest has {known}")]
    Feature {
        /// Section and offset of the entry.
        at: String,
        /// The feature's number.
        feature: u16,
        /// How many features the guest's kernel knows.
        known: usize,
    },
    /// A paravirt call goes through a null pointer of the guest's `pv_ops`.
    #[error("the paravirt call at {at} goes through {pointer}, which is null")]
    NoOperation {
        /// Section and offset of the call.
        at: String,
        /// Name and address of the pointer.
        pointer: Gva,
    },
    /// Guest memory that linking needs cannot be read.
    #[error("cannot read {what}: {cause}")]
    Memory {
        /// What was being read.
        what: String,
        /// Why not.
        cause: MemoryError,
    },
}
