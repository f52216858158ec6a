//! `finish`: goes on with a patch that is in transition.

use super::describe::{describe, describe_reverted};
use super::status;
use super::steps::APPLY;
use super::target::open;
use crate::program::cli::Options;
use crate::program::failure::Failure;
use crate::program::report::{Guest, Patch, Patches, Pause};
use host_agent::session::{Access, Changed};

/// Waits until all tasks have moved over from the code that the transition leads away from. Where none is under way, there is nothing to do.
pub fn finish(options: &Options) -> Result<(Patches, Option<Failure>), Failure> {
    let mut session = open(options, Access::Change)?;
    session.recover()?;
    let finished = session.finish(options.patching().timeout);
    let (patches, failure) = match finished {
        Ok(None) => (Vec::new(), None),
        Ok(Some(finished)) => (vec![ended(&finished)], None),
        Err(failure) => (status::patches_in_transition(&session), Some(failure.into())),
    };
    let report = Patches {
        guest: Guest::of(&session),
        patches,
        upgrade_due: None,
    };
    Ok((report, failure))
}

/// A patch whose transition has ended.
pub(super) fn ended(finished: &Changed) -> Patch {
    let patch = match finished.reverted {
        true => describe_reverted(&finished.record),
        false => describe(&finished.record, None, APPLY.done, "patched"),
    };
    Patch {
        pause: Some(Pause::from(&finished.committed)),
        ..patch
    }
}
