//! Programs in the guest that see which function is in force.

use images::guest::Guest;

/// What such a program found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The kernel behaves as with the fix, or the new function answers.
    Fixed,
    /// The kernel shows the flaw, or the old function answers.
    Flawed,
}

/// Runs `/opt/PROGRAM` as an ordinary user and gives what it found, and its line of output.
///
/// # Panics
///
/// If it can't be run, or could not tell: then the guest is broken.
#[track_caller]
pub fn ask(guest: &Guest, program: &str) -> (Seen, String) {
    ask_as(guest, 1000, program)
}

#[track_caller]
fn ask_as(guest: &Guest, uid: u32, program: &str) -> (Seen, String) {
    let output = guest
        .run_as(uid, &[&format!("/opt/{program}")])
        .expect("the guest runs a program");
    let line = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    let seen = match output.status.code() {
        Some(0) => Seen::Fixed,
        Some(1) => Seen::Flawed,
        _ => panic!(
            "{program}: {}: {line} {}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        ),
    };
    (seen, line)
}

/// Runs `/opt/PROGRAM` as that user and gives what it found.
///
/// # Panics
///
/// As [`ask`] does.
#[track_caller]
pub fn see_as(guest: &Guest, uid: u32, program: &str) -> Seen {
    ask_as(guest, uid, program).0
}

/// What [`ask`] sees.
///
/// # Panics
///
/// As [`ask`] does.
#[track_caller]
pub fn see(guest: &Guest, program: &str) -> Seen {
    ask(guest, program).0
}
