//! Guests that tests share. Each is booted at its first use, lent to one test at a time, and checked and
//! cleaned when the test is through: what a test did to its guest beyond that is a failure of the test.

use std::mem;
use std::ops::Deref;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use images::guest::{Guest, GuestConfig};
use serde_json::Value;

use crate::health;
use crate::vmpatch::Vmpatch;

/// Guests that run at one time. The machine that these tests are for has two processors.
const GUESTS_MAX: usize = 2;
/// Bytes of the console's end that a failed test shows.
const CONSOLE_SHOWN: usize = 4000;

struct Pool {
    guests: Mutex<Guests>,
    changed: Condvar,
}

#[derive(Default)]
struct Guests {
    idle: Vec<(String, Guest)>,
    lent: usize,
}

static POOL: Pool = Pool {
    guests: Mutex::new(Guests {
        idle: Vec::new(),
        lent: 0,
    }),
    changed: Condvar::new(),
};

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Guests> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a guest that is idle, or the right to boot one.
    fn take(&self, key: &str) -> Option<Guest> {
        let mut guests = self.lock();
        loop {
            if let Some(index) = guests.idle.iter().position(|(other, _)| other == key) {
                guests.lent += 1;
                return Some(guests.idle.remove(index).1);
            }
            if guests.lent < GUESTS_MAX {
                guests.lent += 1;
                let unwanted = (guests.lent + guests.idle.len() > GUESTS_MAX).then(|| guests.idle.remove(0));
                drop(guests);
                drop(unwanted);
                return None;
            }
            guests = self.changed.wait(guests).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn give_back(&self, guest: Option<(String, Guest)>) {
        let mut guests = self.lock();
        guests.lent -= 1;
        guests.idle.extend(guest);
        drop(guests);
        self.changed.notify_all();
    }
}

/// A guest lent to a test.
pub struct Lent {
    key: String,
    guest: Option<Guest>,
}

/// Lends a guest like that; waits while as many as the machine can bear are lent.
///
/// # Panics
///
/// If it does not boot.
pub fn lend(config: GuestConfig) -> Lent {
    let key = format!("{config:?}");
    // From here on the place is given back, also when booting fails.
    let mut lent = Lent {
        guest: POOL.take(&key),
        key,
    };
    if lent.guest.is_none() {
        lent.guest = Some(Guest::boot(config).unwrap_or_else(|error| panic!("{error}")));
    }
    lent
}

impl Lent {
    /// Ends the loan with the guest's end, for a test that has made its kernel complain: each complaint must have `words` in it.
    ///
    /// # Panics
    ///
    /// If there is another one, or none.
    #[track_caller]
    pub fn discard_after_complaints(mut self, words: &str) {
        let guest = self.guest.take().expect("the guest is here until the loan ends");
        let console = guest.console().expect("the console can be read");
        let complaints = health::complaints(&console);
        assert!(
            !complaints.is_empty() && complaints.iter().all(|line| line.contains(words)),
            "{console}"
        );
    }

    /// Ends the loan with the guest's end, for a test that leaves nothing to share.
    pub fn discard(mut self) {
        if let Some(guest) = self.guest.take() {
            assert_healthy(&guest);
        }
    }
}

impl Deref for Lent {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        self.guest.as_ref().expect("the guest is here until the loan ends")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        // Dropped behind the guest, whatever happens here.
        let place = Place;
        let Some(guest) = self.guest.take() else { return };
        if thread::panicking() {
            return show_console(&guest);
        }
        Vmpatch::on(&guest).run(&["revert", "--all"]).expect(0);
        assert_healthy(&guest);
        // Code that stays until the guest reboots is in the next test's reports.
        if Vmpatch::on(&guest).status()["patches"] != Value::Array(Vec::new()) {
            return;
        }
        mem::forget(place);
        POOL.give_back(Some((mem::take(&mut self.key), guest)));
    }
}

/// The right to run a guest.
struct Place;

impl Drop for Place {
    fn drop(&mut self) {
        POOL.give_back(None);
    }
}

/// Demands that the guest runs, and that its kernel has found nothing wrong.
///
/// # Panics
///
/// If not.
#[track_caller]
pub fn assert_healthy(guest: &Guest) {
    let console = guest.console().expect("the console can be read");
    assert_eq!(health::complaints(&console), [""; 0], "{console}");
    assert_eq!(
        guest.text(&["echo", "alive"]).expect("the guest runs a program"),
        "alive"
    );
}

fn show_console(guest: &Guest) {
    let console = guest.console().unwrap_or_default();
    let start = console.len().saturating_sub(CONSOLE_SHOWN);
    let end = console.get(console.ceil_char_boundary(start)..).unwrap_or_default();
    eprintln!("--- the end of the console of {}\n{end}---", guest.name());
}
