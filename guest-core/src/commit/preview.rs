//! Looks for what blocks a commit while the guest runs. Where something does, no pause is tried.

use super::marks::Marking;
use super::{CommitError, NotSafe};
use crate::kernel::Live;
use crate::kernel::locks::Locks;
use crate::task::Snapshot;
use std::time::{Duration, Instant};

/// How long the locks are watched for a moment in which no lock is held.
const WATCHED_FOR: Duration = Duration::from_millis(10);
/// Time between two checks of the locks.
const WATCHED_EVERY: Duration = Duration::from_micros(50);

/// Finds a task that sleeps inside a function, where that makes a pause useless, or a lock that its owner does not release. The locks are
/// checked last, right before the pause.
pub(super) fn preview(
    live: &Live<'_>,
    locks: &Locks,
    stacks: &mut Option<Snapshot<'_>>,
    marks: Option<&mut Marking>,
) -> Result<Option<NotSafe>, CommitError> {
    if let Some(snapshot) = stacks {
        snapshot.rescan(live)?;
        let verdict = snapshot.preview(live);
        let is_of_use = match marks {
            Some(marks) => marks.look(live, snapshot, &verdict)?,
            None => verdict.inside.is_empty(),
        };
        if !is_of_use {
            return Ok(Some(NotSafe::Stacks(verdict)));
        }
    }
    let held = held_throughout(|| locks.first_held(live))?;
    Ok(held.map(|(held, _)| NotSafe::Held(held)))
}

/// Watches the locks, and gives the lock, with its owner, that every check finds held. `None` as soon as no lock is held, and also where
/// locks or owners change: such a guest releases its locks again and again, and a pause is as likely to find them free as a check.
fn held_throughout<T: PartialEq, E>(mut check: impl FnMut() -> Result<Option<T>, E>) -> Result<Option<T>, E> {
    let start = Instant::now();
    let Some(first) = check()? else { return Ok(None) };
    let mut is_same = true;
    while start.elapsed() < WATCHED_FOR {
        match check()? {
            None => return Ok(None),
            Some(now) => is_same &= now == first,
        }
        std::thread::sleep(WATCHED_EVERY);
    }
    Ok(is_same.then_some(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The result and the number of checks. Each check finds the next of `owners`; checks beyond find the last one.
    fn watched(owners: &[Option<u8>]) -> (Option<u8>, usize) {
        let mut checks = 0;
        let found = held_throughout(|| {
            let owner = owners.get(checks).or(owners.last()).copied().flatten();
            checks += 1;
            Ok::<_, CommitError>(owner)
        });
        (found.unwrap(), checks)
    }

    #[test]
    fn free_locks_are_checked_once() {
        assert_eq!(watched(&[None]), (None, 1));
    }

    #[test]
    fn a_lock_that_becomes_free_does_not_block() {
        assert_eq!(watched(&[Some(1), Some(1), None, Some(1)]), (None, 3));
    }

    #[test]
    fn a_lock_of_one_owner_blocks_and_one_that_changes_owners_does_not() {
        assert_eq!(watched(&[Some(1)]).0, Some(1));
        assert_eq!(watched(&[Some(1), Some(2), Some(1)]).0, None);
    }
}
