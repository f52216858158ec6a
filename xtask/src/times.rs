//! How long each module of the end-to-end tests takes, from the lines that the test harness prints.
//!
//! The harness (crate `test` of Rust 1.95, `run_tests`) starts tests in the order in which it lists them, as many as it has threads, and
//! the next one whenever one has ended. So the ends of all tests tell their starts.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What was seen of a run so far.
pub struct Times {
    waiting: VecDeque<String>,
    started: BTreeMap<String, Duration>,
    /// For each module the tests that ended, and their time.
    modules: BTreeMap<String, (usize, Duration)>,
}

impl Times {
    /// Of a run of the tests in `list`, which the harness printed, by that many threads.
    pub fn new(list: &str, threads: usize) -> Self {
        let mut waiting: VecDeque<String> = list
            .lines()
            .filter_map(|line| line.strip_suffix(": test").map(str::to_owned))
            .collect();
        let first = waiting.drain(..threads.min(waiting.len()));
        Self {
            started: first.map(|name| (name, Duration::ZERO)).collect(),
            waiting,
            modules: BTreeMap::new(),
        }
    }

    /// Takes a line that the harness printed so long after it began; other lines than a test's end say nothing.
    pub fn line(&mut self, line: &str, at: Duration) {
        let Some((name, "ok" | "FAILED")) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) else {
            return;
        };
        let Some(start) = self.started.remove(name) else {
            return;
        };
        let module = name.split("::").next().unwrap_or_default();
        let (count, time) = self.modules.entry(module.to_owned()).or_default();
        *count += 1;
        *time += at.saturating_sub(start);
        self.started.extend(self.waiting.pop_front().map(|next| (next, at)));
    }

    /// A line for each module, the slowest first. Tests run beside others, and wait for guests that these have.
    pub fn table(&self) -> String {
        let mut modules: Vec<_> = self.modules.iter().collect();
        modules.sort_by_key(|(_, (_, time))| std::cmp::Reverse(*time));
        let line = |(module, (count, time)): (&String, &(usize, Duration))| {
            format!("{:>6} s {count:>4} tests  {module}\n", time.as_secs())
        };
        modules.into_iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_starts_when_another_one_has_ended() {
        let mut times = Times::new(
            "a::one: test\na::two: test\nb::one: test\nc::one: test\n\n4 tests, 0 benchmarks\n",
            2,
        );
        for (line, at) in [
            ("running 4 tests", 0),
            ("test a::two ... ok", 5),
            ("test a::one has been running for over 60 seconds", 60),
            ("test a::one ... FAILED", 70),
            ("test b::one ... ok", 100),
            ("test c::one ... ok", 101),
            ("test no::such ... ok", 102),
        ] {
            times.line(line, Duration::from_secs(at));
        }
        // b from 5 to 100, a from 0 to 5 and to 70, c from 70 to 101.
        assert_eq!(
            times.table(),
            "    95 s    1 tests  b\n    75 s    2 tests  a\n    31 s    1 tests  c\n"
        );
    }

    #[test]
    fn fewer_tests_than_threads_and_none_at_all_are_timed() {
        let mut times = Times::new("a::one: test\n", 4);
        times.line("test a::one ... ok", Duration::from_secs(2));
        assert_eq!(times.table(), "     2 s    1 tests  a\n");
        assert_eq!(Times::new("", 4).table(), "");
    }
}
