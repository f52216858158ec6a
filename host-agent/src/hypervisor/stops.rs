//! A terminal's requests to stop a process, held back while a guest is paused: it would stay paused until somebody lets the process go on.

use guest_core::machine::{MachineError, PauseTimes, Paused, WriteCode};
use guest_core::{Gpa, Registers};
use nix::sys::signal::{SigSet, SigmaskHow, Signal};
use std::time::Duration;

/// While it lives, such a request waits; it takes effect when this is dropped. This holds for the thread that makes it, and for those that
/// the thread starts meanwhile; a program with other threads must hold the signals back in those itself. SIGSTOP can't be held back.
#[derive(Debug)]
pub(crate) struct StopsHeldBack {
    /// What this thread held back before; none where the host does not let it.
    before: Option<SigSet>,
}

impl StopsHeldBack {
    /// Holds back Ctrl-Z, and the stop of a process in the background that reads or writes its terminal.
    pub(crate) fn begin() -> Self {
        let stops = SigSet::from_iter([Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU]);
        Self {
            before: stops.thread_swap_mask(SigmaskHow::SIG_BLOCK).ok(),
        }
    }
}

impl Drop for StopsHeldBack {
    fn drop(&mut self) {
        let _ = self.before.map(|before| before.thread_set_mask());
    }
}

/// A paused guest, with those requests held back until it runs.
pub(crate) struct HeldBack<'a> {
    guest: Box<dyn Paused + 'a>,
    /// Declared behind the guest, and so dropped when that runs.
    stops: StopsHeldBack,
}

impl<'a> HeldBack<'a> {
    /// Of a guest that was paused after `stops` had begun.
    pub(crate) fn new(guest: Box<dyn Paused + 'a>, stops: StopsHeldBack) -> Self {
        Self { guest, stops }
    }
}

impl WriteCode for HeldBack<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        self.guest.write(writes)
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        self.guest.drain()
    }
}

impl Paused for HeldBack<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        self.guest.registers()
    }

    fn elapsed(&self) -> Duration {
        self.guest.elapsed()
    }

    fn resume(self: Box<Self>) -> Result<PauseTimes, MachineError> {
        let Self { guest, stops } = *self;
        let times = guest.resume();
        drop(stops);
        times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stops_are_held_back_for_as_long_as_it_lives() {
        let is_blocked = || SigSet::thread_get_mask().unwrap().contains(Signal::SIGTSTP);
        let outer = StopsHeldBack::begin();
        drop(StopsHeldBack::begin());
        assert!(is_blocked(), "the outer one still does");
        drop(outer);
        assert!(!is_blocked());
    }
}
