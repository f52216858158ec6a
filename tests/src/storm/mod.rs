//! Storms: patches are applied and reverted in a loop while the guest changes the very structures that vmpatch reads and writes.
//!
//! - [`Storm`] is what the guest, or QEMU, does meanwhile; [`ALL`] lists them;
//! - [`work`] is one such activity while it runs: a program in the guest, a shell loop in it, or a thread that talks to QEMU;
//! - [`cycles`] applies and reverts, and counts the outcomes;
//! - [`mod@run`] boots a guest, runs a storm on it, and checks the guest afterwards;
//! - [`table`] is the result in Markdown.
//!
//! Whatever the storm, two programs in the guest check the guest itself: `pair` counts every call of two patched functions, `load`
//! checks memory and a disk.

mod cpus;
pub mod cycles;
mod fexit;
mod livepatch;
mod memory;
mod mixed;
mod modules;
mod processes;
pub mod run;
mod snapshots;
mod static_keys;
pub mod table;
mod tracing;
pub mod work;

use images::guest::{Guest, GuestConfig};

use crate::kit::Modules;
use work::Work;

/// Why a storm can't go on: what was to be done, and what came instead.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// A result of that kind.
pub type Result<T> = std::result::Result<T, Error>;

/// Something that a guest does, or that is done to it, while patches are applied and reverted.
pub trait Storm: Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// What happens in it, in a few words.
    fn what(&self) -> &'static str;

    /// What the guest needs for it, beside what every guest of a storm has.
    fn fit(&self, config: GuestConfig, _modules: &Modules) -> GuestConfig {
        config
    }

    /// Starts it. All of it ends by [`Work::end`].
    ///
    /// # Errors
    ///
    /// If the guest can't do it.
    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>>;

    /// Whether vmpatch may refuse a patch, or its revert, with these words (exit 3) as long as this goes on.
    fn expects(&self, _refusal: &str) -> bool {
        false
    }

    /// What is done after each apply and each revert, while vmpatch is away. `applied` is the patch that is in force.
    ///
    /// # Errors
    ///
    /// If it can't be done, or something is not as it must be.
    fn between(&self, _scene: &Scene<'_>, _applied: Option<&str>) -> Result<()> {
        Ok(())
    }
}

/// Where a storm takes place.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// The guest.
    pub guest: &'a Guest,
    /// The modules for its kernel.
    pub modules: &'a Modules,
}

/// All storms; the last one is all that the guest does by itself, at once.
pub const ALL: [&dyn Storm; 13] = [
    &modules::Modules,
    &processes::Processes,
    &cpus::Online,
    &cpus::Hotplug,
    &static_keys::StaticKeys,
    &tracing::Kprobes,
    &tracing::Ftrace,
    &fexit::Attached,
    &fexit::Asleep,
    &memory::Exhausted,
    &memory::Hotplug,
    &livepatch::OwnLivepatch,
    &snapshots::Snapshots,
];

/// All that can go on in one guest at once.
pub const MIXED: &dyn Storm = &mixed::Mixed;

/// The storm of that name.
pub fn named(name: &str) -> Option<&'static dyn Storm> {
    ALL.into_iter().chain([MIXED]).find(|storm| storm.name() == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_storm_is_found_by_its_name() {
        for storm in ALL.into_iter().chain([MIXED]) {
            assert_eq!(named(storm.name()).map(Storm::what), Some(storm.what()));
        }
        assert!(named("calm").is_none());
    }
}
