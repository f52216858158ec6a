//! `revert`.

use super::apply::describe_reverted;
use super::steps::{REVERT, Steps};
use crate::cli::{ModelName, Options};
use crate::error::Failure;
use crate::progress::Progress;
use crate::report::{Patch, Patches, Pause};
use crate::session::{Session, Target};
use guest_core::place::State;

/// Takes out the patches `ids`, in the order given; without any, all of them, the last applied first. The first that fails ends it;
/// the report says what was done before.
pub fn revert(options: &Options, ids: &[String], progress: &Progress) -> Result<(Patches, Option<Failure>), Failure> {
    let mut session = Session::open(&Target::from_options(options)?, progress)?;
    session.tidy()?;
    let ids = if ids.is_empty() { all(&session) } else { ids.to_vec() };
    // An unknown name is found before anything is taken out.
    for id in &ids {
        session.check_revert(id, options)?;
    }
    let mut steps = Steps::new(REVERT);
    for id in &ids {
        let undone = Patch {
            id: id.clone(),
            ..Patch::default()
        };
        steps.step(undone, || revert_one(&mut session, options, id, progress));
    }
    let report = Patches {
        guest: session.guest(),
        patches: steps.patches,
        upgrade_due: None,
    };
    Ok((report, steps.failure))
}

fn revert_one(session: &mut Session, options: &Options, id: &str, progress: &Progress) -> Result<Patch, Failure> {
    progress.step(&format!("{}: reverting {id}", session.shown()));
    let (record, committed) = session.revert(id, options)?;
    let mut patch = describe_reverted(&record);
    patch.pause = Some(Pause::from(&committed));
    if options.model == ModelName::None {
        patch
            .warnings
            .push("--model none is not for revert: it waits until no task is in the new functions".to_owned());
    }
    Ok(patch)
}

fn all(session: &Session) -> Vec<String> {
    let mut records: Vec<_> = session
        .registry
        .entries
        .iter()
        .filter(|entry| entry.state == State::Applied)
        .filter_map(|entry| entry.record.as_ref())
        .collect();
    records.sort_by_key(|record| std::cmp::Reverse(record.order));
    records.into_iter().map(|record| record.id.clone()).collect()
}
