//! Trying again where the guest has changed what was planned from: its list of modules changes whenever it loads one.

use crate::error::Failure;
use guest_core::change::ChangeError;
use guest_core::commit::{CommitError, NotSafe};
use guest_core::kernel::KernelError;
use guest_core::plan::{Refusal, RevertError};
use std::time::{Duration, Instant};

/// How often is tried at least, however short the time is.
const TRIES_MIN: u32 = 8;
/// First wait before a further try; it doubles.
const WAIT_FIRST: Duration = Duration::from_millis(1);
/// Longest wait: a guest that loads a module is through with it in some milliseconds.
const WAIT_MAX: Duration = Duration::from_millis(32);

/// How often and how long it was tried.
pub(crate) struct Retry {
    /// As in [`Failure::Commit`].
    doing: &'static str,
    id: String,
    timeout: Duration,
    start: Instant,
    tries: u32,
    wait: Duration,
}

impl Retry {
    /// Nothing tried yet. `doing` and `id` are for [`Failure::Commit`].
    pub fn new(doing: &'static str, id: &str, timeout: Duration) -> Self {
        Self {
            doing,
            id: id.to_owned(),
            timeout,
            start: Instant::now(),
            tries: 0,
            wait: WAIT_FIRST,
        }
    }

    /// The time that is left.
    pub fn left(&self) -> Duration {
        self.timeout.saturating_sub(self.start.elapsed())
    }

    /// Waits for a further try, where a try has failed because the guest changes. Error: that it does so for too long, or the
    /// failure where it has another cause.
    pub fn after(&mut self, failure: Failure) -> Result<(), Failure> {
        let Some(change) = changing(&failure) else {
            return Err(failure);
        };
        self.tries += 1;
        if self.tries >= TRIES_MIN && self.wait > self.left() {
            let source = CommitError::NotSafe {
                why: NotSafe::Changing,
                said: format!("the guest keeps {change}"),
                tries: self.tries,
                waited: self.start.elapsed(),
            };
            return Err(Failure::Commit {
                doing: self.doing,
                id: self.id.clone(),
                source: Box::new(source),
            });
        }
        std::thread::sleep(self.wait.min(self.left()));
        self.wait = (self.wait * 2).min(WAIT_MAX);
        Ok(())
    }

    /// Tries `work` until it does not fail because the guest changes.
    pub fn run<T>(mut self, mut work: impl FnMut() -> Result<T, Failure>) -> Result<T, Failure> {
        loop {
            match work() {
                Ok(done) => return Ok(done),
                Err(failure) => self.after(failure)?,
            }
        }
    }
}

/// What the guest is doing, where that is why it failed; nothing was changed then.
fn changing(failure: &Failure) -> Option<String> {
    let kernel = match failure {
        Failure::Commit { source, .. } => match source.as_ref() {
            CommitError::Changed(change) => return Some(doing(change)),
            CommitError::Kernel(error) => error,
            _ => return None,
        },
        Failure::Refused { source, .. } => match source.as_ref() {
            Refusal::Kernel(error) => error,
            Refusal::Unsettled { module } => return Some(format!("loading or unloading the module {module}")),
            _ => return None,
        },
        Failure::Kernel(error) | Failure::Revert(RevertError::Kernel(error)) => error,
        _ => return None,
    };
    match kernel {
        KernelError::Changed(change) => Some(doing(change)),
        KernelError::Held(held) => Some(held.doing.to_owned()),
        _ => None,
    }
}

fn doing(change: &ChangeError) -> String {
    match change {
        ChangeError::Changing { doing, .. } => (*doing).to_owned(),
        ChangeError::Unexpected { what, .. } | ChangeError::Memory { what, .. } => format!("changing {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::APPLYING;
    use guest_core::Gpa;

    const DOING: &str = "loading or unloading modules";

    fn changed() -> Failure {
        let gpa = Gpa(0x1000);
        Failure::Kernel(KernelError::Changed(ChangeError::Changing { doing: DOING, gpa }))
    }

    #[test]
    fn a_guest_that_keeps_changing_is_given_up_after_the_time_and_the_message_says_what_it_does() {
        let (mut tries, start) = (0, Instant::now());
        let timeout = Duration::from_millis(200);
        let tried = Retry::new(APPLYING, "fix", timeout).run(|| {
            tries += 1;
            Err::<(), _>(changed())
        });
        let failure = tried.unwrap_err();
        assert_eq!(failure.exit_code(), 4);
        let said = failure.chain().join(": ");
        assert!(said.starts_with("applying fix: not safe within"), "{said}");
        assert!(said.ends_with("the guest keeps loading or unloading modules"), "{said}");
        assert!(tries > TRIES_MIN && start.elapsed() > timeout / 2, "{tries}");
    }

    #[test]
    fn without_time_it_is_tried_a_few_times_all_the_same() {
        let mut tries = 0;
        let done = Retry::new(APPLYING, "fix", Duration::ZERO).run(|| {
            tries += 1;
            if tries < TRIES_MIN { Err(changed()) } else { Ok(()) }
        });
        done.unwrap();
    }

    #[test]
    fn another_failure_is_not_tried_again() {
        let mut tries = 0;
        let tried = Retry::new(APPLYING, "fix", Duration::MAX).run(|| {
            tries += 1;
            Err::<(), _>(Failure::NoTarget)
        });
        assert!(matches!(tried, Err(Failure::NoTarget)) && tries == 1);
    }
}
