//! Livepatches that the guest loads itself, as an administrator in it would.

use std::fs;
use std::time::{Duration, Instant};

use images::guest::Guest;

/// How long loading, and a transition, may take: seconds on a guest at rest, more where the host is busy.
const TRANSITION_LIMIT: Duration = Duration::from_secs(180);

/// Loads a module into the guest's kernel. Error: what the guest said.
///
/// # Panics
///
/// If the file can't be read, or not be brought into the guest.
pub fn insert(guest: &Guest, module: &str) -> Result<(), String> {
    let bytes = fs::read(module).expect("the module can be read");
    guest
        .push("/tmp/own.ko", &bytes, 0o644)
        .expect("the module can be brought into the guest");
    let loaded = guest.command(&["insmod", "/tmp/own.ko"]).limit(TRANSITION_LIMIT).text();
    loaded.map(drop).map_err(|error| error.to_string())
}

/// A livepatch of the guest's own that is in force.
pub struct OwnLivepatch<'a> {
    guest: &'a Guest,
    name: String,
}

impl<'a> OwnLivepatch<'a> {
    /// Loads the module of that name, and waits until every task has gone over to it.
    ///
    /// # Panics
    ///
    /// If the guest does not take it, or a task never goes over.
    #[track_caller]
    pub fn load(guest: &'a Guest, module: &str, name: &str) -> Self {
        Self::try_load(guest, module, name).unwrap()
    }

    /// As [`OwnLivepatch::load`]. Error: what the guest said, or that a task never went over.
    ///
    /// # Panics
    ///
    /// If the file can't be read, or not be brought into the guest.
    pub fn try_load(guest: &'a Guest, module: &str, name: &str) -> Result<Self, String> {
        insert(guest, module)?;
        let own = Self {
            guest,
            name: name.replace('-', "_"),
        };
        own.wait_for("[ \"$(cat $0/transition)\" = 0 ]")?;
        Ok(own)
    }

    /// Turns it off, waits until every task has gone back, and unloads it.
    ///
    /// # Panics
    ///
    /// If the guest does not take that, or a task never goes back.
    #[track_caller]
    pub fn unload(self) {
        let off = format!("echo 0 >{}/enabled", self.folder());
        self.guest.text(&["sh", "-c", &off]).unwrap();
        // The folder goes when the transition is over.
        self.wait_for("[ ! -e $0 ]").unwrap();
        self.guest.text(&["rmmod", &self.name]).unwrap();
    }

    fn folder(&self) -> String {
        format!("/sys/kernel/livepatch/{}", self.name)
    }

    fn wait_for(&self, condition: &str) -> Result<(), String> {
        let start = Instant::now();
        let folder = self.folder();
        let holds = || self.guest.run(&["sh", "-c", condition, &folder]).unwrap();
        while !holds().status.success() {
            if start.elapsed() >= TRANSITION_LIMIT {
                return Err(format!("never {condition} of {folder}"));
            }
        }
        Ok(())
    }
}
