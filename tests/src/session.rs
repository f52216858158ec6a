//! vmpatch's own library on a guest, for tests whose many cycles would start the program as often.

use crate::vmpatch;
use guest_core::commit::Model;
use host_agent::find::{FindError, find};
use host_agent::outcome::Reason;
use host_agent::session::{OpenError, PatchOptions, Session};
use host_agent::target::Selector;
use images::guest::Guest;
use std::fmt;
use std::time::Duration;

/// Why a guest was not opened.
#[derive(Debug)]
pub enum Error {
    /// The program is not there.
    Program(String),
    /// It was not found.
    Find(FindError),
    /// It was not reached, or not understood.
    Open(OpenError),
}

impl Error {
    /// Why, as far as a command's exit code tells.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Program(_) => Reason::Failed,
            Self::Find(error) => error.reason(),
            Self::Open(error) => error.reason(),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Program(error) => f.write_str(error),
            Self::Find(error) => error.fmt(f),
            Self::Open(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Program(_) => None,
            Self::Find(error) => error.source(),
            Self::Open(error) => error.source(),
        }
    }
}

/// Opens a guest to change it. Its supervisor is the program under test.
///
/// # Errors
///
/// See [`Error`].
pub fn open(guest: &Guest) -> Result<Session, Error> {
    let program = vmpatch::program().map_err(Error::Program)?;
    let target = find(&Selector::Name(guest.name().to_owned())).map_err(Error::Find)?;
    let mut session = Session::open(&target).map_err(Error::Open)?;
    session.set_supervisor(program.to_owned());
    Ok(session)
}

/// A clean cut within that time.
pub fn options(timeout: Duration) -> PatchOptions {
    PatchOptions {
        model: Model::CleanCut,
        timeout,
        grace: Duration::ZERO,
    }
}
