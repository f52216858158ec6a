//! How a module's symbols become guest addresses: the caller knows the guest's kernel.

use crate::addr::Gva;

/// Why a symbol has no address, or not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// No such symbol.
    #[error("not found in {object}")]
    NotFound {
        /// Where it was looked for: `vmlinux` or a module.
        object: String,
    },
    /// There is such a symbol, but modules may not use it.
    #[error("not exported by the guest's kernel")]
    NotExported,
    /// More than one symbol of that name, and no position given.
    #[error("{} symbols of that name in {object}: {addresses:?}", addresses.len())]
    Ambiguous {
        /// Where it was looked for.
        object: String,
        /// Their addresses.
        addresses: Vec<Gva>,
    },
    /// A position behind the last symbol of that name.
    #[error("symbol position {sympos} in {object}, which has {found} of that name")]
    Position {
        /// Where it was looked for.
        object: String,
        /// The position asked for, from 1 on.
        sympos: u64,
        /// How many there are.
        found: usize,
    },
    /// A module that the guest has not loaded.
    #[error("module {object} is not loaded in the guest")]
    NotLoaded {
        /// The module's name.
        object: String,
    },
    /// The guest's tables could not be read.
    #[error("{0}")]
    Guest(String),
}

/// Finds symbols in the guest.
pub trait ResolveSymbol {
    /// The address of a symbol that the guest's kernel exports to modules.
    ///
    /// Errors: [`ResolveError::NotFound`], [`ResolveError::NotExported`].
    fn exported(&self, name: &str) -> Result<Gva, ResolveError>;

    /// The address of any symbol of `object` (none: the kernel image): the one at position `sympos`, from 1 on, or with 0 the
    /// only one of that name.
    ///
    /// Errors: [`ResolveError::NotFound`], [`ResolveError::Ambiguous`], [`ResolveError::Position`], [`ResolveError::NotLoaded`].
    fn any(&self, object: Option<&str>, name: &str, sympos: u64) -> Result<Gva, ResolveError>;
}
