//! The waits between the attempts of a commit.

use std::time::Duration;

/// First wait before a further attempt. It doubles.
const WAIT_FIRST: Duration = Duration::from_millis(1);
/// Longest wait for a task that sleeps inside a function, which is seen without a pause.
const WAIT_MAX: Duration = Duration::from_millis(50);
/// Longest wait between two pauses, in lengths of the last pause. Running tasks may leave a function at any moment, so that an early
/// attempt is as good as a later one. But the guest must be paused for a tenth of the time at most.
const WAIT_PAUSES_MAX: u32 = 10;

/// Where an attempt found that it is not safe.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen {
    /// In the preview, while the guest ran: a task sleeps inside a function.
    Asleep,
    /// In the preview, while the guest ran: one owner held a lock for as long as the lock was watched.
    Held,
    /// In the pause.
    InPause {
        /// Length of the pause.
        pause: Duration,
        /// True where the pause was too long for a write.
        is_too_long: bool,
    },
}

/// Decides how long to wait after each attempt.
#[derive(Debug)]
pub(super) struct Pacing {
    /// The next wait.
    wait: Duration,
}

impl Default for Pacing {
    fn default() -> Self {
        Self { wait: WAIT_FIRST }
    }
}

impl Pacing {
    /// How long to wait before the next attempt.
    pub fn next(&mut self, seen: Seen) -> Duration {
        let wait = match seen {
            Seen::Held => return WAIT_FIRST,
            Seen::Asleep => self.wait.min(WAIT_MAX),
            Seen::InPause { pause, is_too_long } => {
                let most = pause.saturating_mul(WAIT_PAUSES_MAX).max(WAIT_FIRST);
                // The host is busy: another pause right now would be as long.
                if is_too_long { most } else { self.wait.min(most) }
            }
        };
        self.wait = wait.saturating_mul(2);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn in_pause(pause: Duration) -> Seen {
        Seen::InPause {
            pause,
            is_too_long: false,
        }
    }

    #[test]
    fn the_wait_doubles_up_to_its_maximum() {
        let mut pacing = Pacing::default();
        let waits: Vec<_> = (0..8).map(|_| pacing.next(Seen::Asleep).as_millis()).collect();
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 50, 50]);
    }

    #[test]
    fn a_guest_is_paused_for_a_tenth_of_the_time_at_most() {
        let mut pacing = Pacing::default();
        let waits: Vec<_> = (0..5).map(|_| pacing.next(in_pause(MS / 2)).as_millis()).collect();
        assert_eq!(waits, [1, 2, 4, 5, 5]);
        // The wait has a minimum, however short the pause was.
        assert_eq!(Pacing::default().next(in_pause(Duration::ZERO)), MS);
    }

    #[test]
    fn a_held_lock_is_watched_again_after_the_shortest_wait() {
        let mut pacing = Pacing::default();
        let waits: Vec<_> = (0..5).map(|_| pacing.next(Seen::Held)).collect();
        assert_eq!(waits, [MS; 5]);
        assert_eq!(pacing.next(Seen::Asleep), MS);
    }

    #[test]
    fn after_a_pause_that_was_too_long_the_wait_is_the_longest() {
        let seen = Seen::InPause {
            pause: 30 * MS,
            is_too_long: true,
        };
        assert_eq!(Pacing::default().next(seen), 300 * MS);
    }
}
