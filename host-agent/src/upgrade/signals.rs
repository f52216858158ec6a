//! Ctrl-C while a guest moves: not the end of the program, but a wish that it is told of. Ctrl-Z waits until the move is done: stopped at
//! the wrong moment, the program would leave the guest paused.

use crate::hypervisor::stops::StopsHeldBack;
use nix::sys::signal::{SigSet, Signal};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Whether somebody has asked this program to end.
#[derive(Debug)]
pub(super) struct Wish {
    is_there: Arc<AtomicBool>,
    _stops: StopsHeldBack,
}

impl Wish {
    /// From here on, such a request only sets this.
    pub(super) fn watch() -> io::Result<Self> {
        let requests = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        requests.thread_block()?;
        let stops = StopsHeldBack::begin();
        let is_there = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&is_there);
        thread::spawn(move || {
            while requests.wait().is_ok() {
                told.store(true, Ordering::Relaxed);
            }
        });
        Ok(Self {
            is_there,
            _stops: stops,
        })
    }

    /// Whether that has happened.
    pub(super) fn is_there(&self) -> bool {
        self.is_there.load(Ordering::Relaxed)
    }
}
