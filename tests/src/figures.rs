//! What is said of many times.

use std::fmt;
use std::time::Duration;

/// What is said of many times, in microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// The median.
    pub p50: u64,
    /// What 99 of 100 are not above.
    pub p99: u64,
    /// The longest.
    pub max: u64,
}

impl Figures {
    /// Of these times.
    pub fn of(mut times: Vec<u64>) -> Self {
        times.sort_unstable();
        let last = times.len().saturating_sub(1);
        let at = |share: usize| times.get((times.len() * share / 100).min(last)).copied().unwrap_or(0);
        Self {
            p50: at(50),
            p99: at(99),
            max: at(100),
        }
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>7} / {:>7} / {:>7}", self.p50, self.p99, self.max)
    }
}

/// How many times `b` is in `a`.
pub fn ratio(a: u64, b: u64) -> f64 {
    a as f64 / b.max(1) as f64
}

/// Whole microseconds.
pub fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
