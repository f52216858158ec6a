//! Where new code lives in the guest: the text cave, its own mapping, and the registry at its start.

pub mod cave;
pub mod record;
pub mod registry;

pub use cave::{Cave, FILLER};
pub use record::{Orc, PatchedFunction, Record, Redirect, Span};
pub use registry::{Entry, KeptCode, Pages, Registry, RegistryError, State};
