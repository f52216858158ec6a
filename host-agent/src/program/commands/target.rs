//! The guest that a command is for.

use crate::program::cli::Options;
use crate::program::failure::Failure;
use host_agent::find::find;
use host_agent::session::{Access, Session};
use host_agent::target::{Selector, Target};
use std::time::Duration;

/// The guest that the options name, in the process where it is.
pub(super) fn target(options: &Options) -> Result<Target, Failure> {
    let target = find(&selector(options)?)?.paused_by(options.pause.method());
    Ok(match options.reply_timeout {
        Some(seconds) => target.answered_within(Duration::from_secs_f64(seconds)),
        None => target,
    })
}

/// Opens it. From here on this process can open nothing more: see [`Session::open_divided`].
pub(super) fn open(options: &Options, access: Access) -> Result<Session, Failure> {
    Ok(Session::open_divided(&target(options)?, access, options.sandbox.sandbox(), |_| ())?.0)
}

/// What the options say of it.
pub(super) fn selector(options: &Options) -> Result<Selector, Failure> {
    options.selector().ok_or(Failure::NoTarget)
}
