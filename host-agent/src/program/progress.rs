//! What a person sees while vmpatch works: one line on a terminal that is overwritten, nothing in a pipe. It is made of the events that
//! the library tells: a step has begun (`debug`), something was found (`info`, shown with -v), or should be known (`warn`, always shown).

use super::output;
use std::fmt::{self, Write};
use std::io::IsTerminal;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Whose events are shown: the library's, and the program's own.
const TARGETS: [&str; 2] = ["host_agent", "vmpatch"];
/// Length of the bar that shows how far a step is.
const BAR_LEN: usize = 20;

/// Tells of steps on standard error.
#[derive(Debug, Clone)]
pub struct Progress {
    terminal: bool,
    verbose: u8,
    shown: Arc<AtomicBool>,
}

impl Progress {
    /// From now on shows the events of this process; with `verbose` 1 what was found, too, on lines that stay; with 2 each step.
    pub fn install(verbose: u8) -> Self {
        let progress = Self {
            terminal: std::io::stderr().is_terminal(),
            verbose,
            shown: Arc::default(),
        };
        // Nobody else in this program sets one.
        let _ = tracing::subscriber::set_global_default(progress.clone());
        progress
    }

    /// Takes the line away, before anything else is printed.
    pub fn clear(&self) {
        if self.shown.swap(false, Ordering::Relaxed) {
            output::message("\r\x1b[K");
        }
    }

    /// The least important events that are shown.
    fn level(&self) -> LevelFilter {
        match (self.verbose, self.terminal) {
            (2.., _) | (_, true) => LevelFilter::DEBUG,
            (1, false) => LevelFilter::INFO,
            (0, false) => LevelFilter::WARN,
        }
    }

    fn show(&self, level: Level, what: &str) {
        match (level, self.verbose) {
            (Level::ERROR | Level::WARN, _) => self.line(&format!("warning: {what}")),
            (Level::INFO, 0) => {}
            (Level::INFO, _) | (_, 2..) => self.line(what),
            _ => {
                output::message(&format!("\r\x1b[K{what} …"));
                self.shown.store(true, Ordering::Relaxed);
            }
        }
    }

    fn line(&self, what: &str) {
        self.clear();
        output::message(&format!("{what}\n"));
    }
}

impl Subscriber for Progress {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let from = metadata.target().split("::").next().unwrap_or_default();
        metadata.is_event() && *metadata.level() <= self.level() && TARGETS.contains(&from)
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level())
    }

    fn event(&self, event: &Event<'_>) {
        let mut told = Told::default();
        event.record(&mut told);
        self.show(*event.metadata().level(), &told.to_string());
    }

    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        // None is enabled, so that none is made.
        Id::from_u64(1)
    }

    fn record(&self, _span: &Id, _values: &Record<'_>) {}

    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}

    fn enter(&self, _span: &Id) {}

    fn exit(&self, _span: &Id) {}
}

/// What an event tells.
#[derive(Debug, Default)]
struct Told {
    guest: String,
    percent: Option<u64>,
    message: String,
}

impl Visit for Told {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "guest" {
            value.clone_into(&mut self.guest);
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        if field.name() == "percent" {
            self.percent = Some(value);
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        }
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.guest.is_empty() {
            write!(f, "{}: ", self.guest)?;
        }
        if let Some(percent) = self.percent {
            let filled = usize::try_from(percent / 5).unwrap_or(0).min(BAR_LEN);
            let bar = "█".repeat(filled) + &"░".repeat(BAR_LEN - filled);
            write!(f, "{bar} {percent} %, ")?;
        }
        f.write_str(&self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_tells_of_which_guest_it_is_and_how_far() {
        let told = |guest: &str, percent| Told {
            guest: guest.to_owned(),
            percent,
            message: "100 MiB left".to_owned(),
        };
        assert_eq!(told("", None).to_string(), "100 MiB left");
        assert_eq!(
            told("vm42", Some(75)).to_string(),
            "vm42: ███████████████░░░░░ 75 %, 100 MiB left"
        );
        assert!(told("a", Some(100)).to_string().contains(&"█".repeat(BAR_LEN)));
    }

    #[test]
    fn in_a_pipe_only_warnings_are_shown_unless_more_is_asked_for() {
        let level = |terminal, verbose| {
            let shown = Arc::default();
            Progress {
                terminal,
                verbose,
                shown,
            }
            .level()
        };
        assert_eq!(level(false, 0), LevelFilter::WARN);
        assert_eq!(level(false, 1), LevelFilter::INFO);
        assert_eq!(level(false, 2), LevelFilter::DEBUG);
        assert_eq!(level(true, 0), LevelFilter::DEBUG);
    }
}
