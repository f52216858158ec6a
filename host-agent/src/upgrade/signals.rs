//! Ctrl-C while a guest moves: not the end of the program, but a wish that it is told of.

use nix::sys::signal::{SigSet, Signal};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

/// Whether somebody has asked this program to end.
#[derive(Debug, Clone)]
pub(super) struct Wish(Arc<AtomicBool>);

impl Wish {
    /// From here on, such a request only sets this.
    pub(super) fn watch() -> io::Result<Self> {
        let requests = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
        requests.thread_block()?;
        let wish = Self(Arc::new(AtomicBool::new(false)));
        let told = wish.clone();
        thread::spawn(move || {
            while requests.wait().is_ok() {
                told.0.store(true, Ordering::Relaxed);
            }
        });
        Ok(wish)
    }

    /// Whether that has happened.
    pub(super) fn is_there(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
