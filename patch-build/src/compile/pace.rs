//! How far work on many things is, and how long the rest will take.

use std::time::{Duration, Instant};

/// Sooner than that nothing is said of the time.
const SAID_FROM: Duration = Duration::from_secs(20);

/// The pace of some work.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    start: Instant,
    all: usize,
}

impl Pace {
    /// Of work on that many things that begins now.
    pub(super) fn of(all: usize) -> Self {
        Self {
            start: Instant::now(),
            all,
        }
    }

    /// For the thing of that number (from 0), for people: `3 of 1700, about 12 min left`.
    pub(super) fn at(&self, number: usize) -> String {
        said(self.start.elapsed(), number, self.all)
    }
}

fn said(elapsed: Duration, number: usize, all: usize) -> String {
    let place = format!("{} of {all}", number + 1);
    let (Ok(done), Ok(left)) = (u32::try_from(number), u32::try_from(all.saturating_sub(number))) else {
        return place;
    };
    if done == 0 || elapsed < SAID_FROM {
        return place;
    }
    let rest = (elapsed / done).saturating_mul(left).as_secs();
    if rest < 60 {
        format!("{place}, about {} s left", rest.max(1))
    } else {
        format!("{place}, about {} min left", rest.div_ceil(60))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_is_left_is_that_of_what_was_done() {
        assert_eq!(said(Duration::from_secs(5), 4, 10), "5 of 10");
        assert_eq!(
            said(Duration::from_secs(30), 100, 1700),
            "101 of 1700, about 8 min left"
        );
        assert_eq!(said(Duration::from_secs(30), 9, 10), "10 of 10, about 3 s left");
    }
}
