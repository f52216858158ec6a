//! A task that sleeps inside a function that is going to be patched, or is.

use std::time::{Duration, Instant};

use images::channel::Running;
use images::guest::Guest;

use crate::probe::Seen;

/// How long a program in the guest may take to get somewhere; the host may be busy with other guests.
const PROGRAM_LIMIT: Duration = Duration::from_secs(30);
/// Number and space: the system call pause().
const PAUSE: &str = "34 ";

/// A task that sleeps in the system call pause().
pub struct Sleeper {
    running: Running,
}

impl Sleeper {
    /// Starts it, and waits until it sleeps.
    ///
    /// # Panics
    ///
    /// If it never does.
    #[track_caller]
    pub fn start(guest: &Guest) -> Self {
        Self::running(guest, &["/opt/pause", "sleep"])
    }

    /// The same below BPF programs that are attached to `function`, which it calls.
    ///
    /// # Panics
    ///
    /// If it never does.
    #[track_caller]
    pub fn below_bpf(guest: &Guest, function: &str) -> Self {
        Self::running(guest, &["/opt/fexit", "hold", function])
    }

    #[track_caller]
    fn running(guest: &Guest, command: &[&str]) -> Self {
        let running = guest.spawn(command).expect("the guest runs a program");
        running.wait_for_stdout("sleeping", PROGRAM_LIMIT).unwrap();
        let sleeper = Self { running };
        // It says so just before it does. A line of this file begins with the system call that a task sleeps in.
        let call = format!("/proc/{}/syscall", sleeper.pid());
        let asleep = || guest.text(&["cat", &call]).is_ok_and(|line| line.starts_with(PAUSE));
        let start = Instant::now();
        while !asleep() {
            assert!(start.elapsed() < PROGRAM_LIMIT, "it never sleeps");
        }
        sleeper
    }

    /// Its number in the guest.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// Wakes it and gives what it saw: which function it has slept in; below BPF programs, [`Seen::Fixed`] where nothing was wrong.
    ///
    /// # Panics
    ///
    /// If it can't tell.
    #[track_caller]
    pub fn wake(self, guest: &Guest) -> Seen {
        guest.text(&["kill", "-USR1", &self.pid().to_string()]).unwrap();
        match self.running.wait(PROGRAM_LIMIT).unwrap().status.code() {
            Some(0) => Seen::Fixed,
            Some(1) => Seen::Flawed,
            other => panic!("pause ended with {other:?}"),
        }
    }
}
