//! Resolves the symbols that a module imports. The caller knows the guest's kernel.

use crate::addr::Gva;
use crate::kernel::KernelError;

/// Why a symbol was not resolved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// The object has no such symbol.
    #[error("not found in {object}")]
    NotFound {
        /// The object: `vmlinux` or a module.
        object: String,
    },
    /// The symbol is not exported to modules.
    #[error("not exported by the guest's kernel")]
    NotExported,
    /// Several symbols have that name, and no position was given.
    #[error("{} symbols of that name in {object}: {addresses:?}", addresses.len())]
    Ambiguous {
        /// The object.
        object: String,
        /// Their addresses.
        addresses: Vec<Gva>,
    },
    /// The position is behind the last symbol of that name.
    #[error("symbol position {sympos} in {object}, which has {found} of that name")]
    Position {
        /// The object.
        object: String,
        /// The position, from 1.
        sympos: u64,
        /// Number of symbols of that name.
        found: usize,
    },
    /// The guest has not loaded the module.
    #[error("module {object} is not loaded in the guest")]
    NotLoaded {
        /// The module's name.
        object: String,
    },
    /// The guest's kernel cannot be read.
    #[error(transparent)]
    Guest(#[from] KernelError),
}

/// Finds symbols in the guest.
pub trait ResolveSymbol {
    /// The guest-virtual address of a symbol that the guest exports to modules.
    ///
    /// # Errors
    ///
    /// [`ResolveError::NotFound`] or [`ResolveError::NotExported`].
    fn exported(&self, name: &str) -> Result<Gva, ResolveError>;

    /// The guest-virtual address of any symbol of `object` (`None` for the kernel image): the one at position `sympos`, from 1, or with 0 the only one of that
    /// name.
    ///
    /// # Errors
    ///
    /// [`ResolveError::NotFound`], [`ResolveError::Ambiguous`], [`ResolveError::Position`] or [`ResolveError::NotLoaded`].
    fn any(&self, object: Option<&str>, name: &str, sympos: u64) -> Result<Gva, ResolveError>;
}
