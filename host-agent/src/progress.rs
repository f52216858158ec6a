//! What a person sees while vmpatch works: one line on a terminal that is overwritten, nothing in a pipe.

use crate::output;
use std::cell::Cell;
use std::io::IsTerminal;

/// Tells of steps on standard error.
#[derive(Debug)]
pub struct Progress {
    terminal: bool,
    verbose: u8,
    shown: Cell<bool>,
}

impl Progress {
    /// With `verbose` 1 what was found is told as well, on lines that stay; with 2 each step, too.
    pub fn new(verbose: u8) -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            verbose,
            shown: Cell::new(false),
        }
    }

    /// A step has begun.
    pub fn step(&self, what: &str) {
        if self.verbose >= 2 {
            output::message(&format!("{what}\n"));
        } else if self.terminal {
            output::message(&format!("\r\x1b[K{what} …"));
            self.shown.set(true);
        }
    }

    /// Something that the operator should know, whatever was asked for.
    pub fn warning(&self, what: &str) {
        self.clear();
        output::message(&format!("warning: {what}\n"));
    }

    /// Something that -v shows.
    pub fn detail(&self, what: &str) {
        if self.verbose >= 1 {
            self.clear();
            output::message(&format!("{what}\n"));
        }
    }

    /// Takes the line away, before anything else is printed.
    pub fn clear(&self) {
        if self.shown.replace(false) {
            output::message("\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
