//! `revert`.

use super::apply::{say_what_began, say_who_has_not_moved_over};
use super::describe::describe_reverted;
use super::steps::{REVERT, Steps};
use super::target::open;
use crate::program::cli::{ModelName, Options};
use crate::program::failure::Failure;
use crate::program::report::{Guest, Patch, Patches, Pause};
use guest_core::guest;
use guest_core::plan::RevertError;
use guest_core::registry::Record;
use host_agent::session::{Access, Changed, PatchError, Session};

/// Takes out the patches `ids`, in the order given; without any, all of them, the last applied first. The first that fails ends it;
/// the report says what was done before.
pub fn revert(options: &Options, ids: &[String]) -> Result<(Patches, Option<Failure>), Failure> {
    let mut session = open(options, Access::Change)?;
    let removed = session.recover()?;
    let in_force = all(&session);
    let (done, left) = done_by_recovery(ids, &removed, &in_force);
    let ids = if ids.is_empty() { in_force } else { left };
    // An unknown name is found before anything is taken out.
    for (index, id) in ids.iter().enumerate() {
        let earlier = ids.get(..index).unwrap_or_default();
        match session.check_revert(id, &options.patching()) {
            Err(failure) if covered_by(&failure).is_some_and(|by| earlier.iter().any(|id| id == by)) => {}
            planned => drop(planned?),
        }
    }
    let mut steps = Steps::new(REVERT);
    steps.patches = done;
    for id in &ids {
        let undone = Patch {
            id: id.clone(),
            ..Patch::default()
        };
        steps.step(undone, || revert_one(&mut session, options, id));
    }
    say_who_has_not_moved_over(&mut steps.patches, &session);
    let report = Patches {
        guest: Guest::of(&session),
        patches: steps.patches,
        upgrade_due: None,
    };
    Ok((report, steps.failure))
}

/// The later patch that is to be reverted first, where that is why a revert fails.
fn covered_by(failure: &PatchError) -> Option<&str> {
    match failure {
        PatchError::Guest(guest::PatchError::Revert {
            source: RevertError::Covered { by, .. },
            ..
        }) => Some(by),
        _ => None,
    }
}

/// Of the patches that are asked for, those that the recovery has taken out, and the names of the others.
fn done_by_recovery(ids: &[String], removed: &[Record], in_force: &[String]) -> (Vec<Patch>, Vec<String>) {
    let is_asked = |record: &&Record| ids.is_empty() || ids.contains(&record.id);
    let done = removed.iter().filter(is_asked).map(describe_reverted);
    let is_left = |id: &&String| in_force.contains(id) || removed.iter().all(|record| record.id != **id);
    (done.collect(), ids.iter().filter(is_left).cloned().collect())
}

fn revert_one(session: &mut Session, options: &Options, id: &str) -> Result<Patch, Failure> {
    tracing::debug!(guest = session.shown(), "reverting {id}");
    let Changed { record, committed, .. } = session.revert(id, &options.patching())?;
    let mut patch = describe_reverted(&record);
    patch.pause = Some(Pause::from(&committed));
    say_what_began(&mut patch, session);
    if options.model == ModelName::None {
        patch
            .warnings
            .push("--model none is not for revert, whose code is wiped: it waits until no task is in it".to_owned());
    }
    Ok(patch)
}

fn all(session: &Session) -> Vec<String> {
    let mut records: Vec<_> = session
        .registry()
        .entries
        .iter()
        .filter(|entry| entry.state.is_in_force())
        .filter_map(|entry| entry.record.as_ref())
        .collect();
    records.sort_by_key(|record| std::cmp::Reverse(record.order));
    records.into_iter().map(|record| record.id.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_that_the_recovery_has_taken_out_is_reverted_and_not_unknown() {
        let json = r#"{"id":"fix","digest":"","order":1,"model":"clean-cut","applied_at":0,"functions":[],"changes":[],"escapes":[],
            "text":{"start":0,"len":0},"rodata":{"start":0,"len":0},"data":{"start":0,"len":0}}"#;
        let removed = [Record::from_bytes(json.as_bytes()).unwrap()];
        let ids = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        for (asked, left, is_said) in [
            (ids(&[]), ids(&[]), true),
            (ids(&["fix"]), ids(&[]), true),
            (ids(&["other", "fix"]), ids(&["other"]), true),
            (ids(&["other"]), ids(&["other"]), false),
        ] {
            let (done, rest) = done_by_recovery(&asked, &removed, &[]);
            assert_eq!(rest, left);
            let done: Vec<_> = done
                .iter()
                .map(|patch| (patch.id.as_str(), patch.state.as_str()))
                .collect();
            assert_eq!(!done.is_empty(), is_said, "{asked:?}");
            assert!(done.iter().all(|patch| *patch == ("fix", "reverted")));
        }
    }
}
