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

/// What the program `pair` counted: each call of the two functions of the module of that name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// Calls of which both functions were old.
    pub old: u64,
    /// Calls of which both were new.
    pub new: u64,
    /// Calls of which one was old and the other one new, which must never be.
    pub mixed: u64,
    /// Calls that began and gave no result.
    pub lost: u64,
}

impl Calls {
    /// Out of the program's last line, `old N new N mixed N lost N`.
    pub fn of(output: &str) -> Option<Self> {
        let words: Vec<&str> = output.lines().last()?.split(' ').collect();
        let ["old", old, "new", new, "mixed", mixed, "lost", lost] = words[..] else {
            return None;
        };
        Some(Self {
            old: old.parse().ok()?,
            new: new.parse().ok()?,
            mixed: mixed.parse().ok()?,
            lost: lost.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_pair_says_how_many_calls_were_of_each_kind() {
        let calls = Calls {
            old: 7,
            new: 8,
            mixed: 0,
            lost: 1,
        };
        assert_eq!(Calls::of("started\nold 7 new 8 mixed 0 lost 1\n"), Some(calls));
        assert_eq!(Calls::of("started\nold 7 new 8 mixed 0\n"), None);
    }
}
