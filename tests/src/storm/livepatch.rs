//! The guest loads and unloads a livepatch of its own, for another function than vmpatch does.

use images::guest::GuestConfig;

use super::{Result, Scene, Storm, Work};
use crate::kit::Modules;

/// What the guest loads.
const FILE: &str = "/opt/own.ko";
/// Loads it, waits for its transition, disables it, waits, and unloads it.
const ROUND: &str = "insmod /opt/own.ko
own=/sys/kernel/livepatch/vmpatch_own
while [ $(cat $own/transition) = 1 ]; do sleep 0.01; done
echo 0 >$own/enabled
while [ -e $own ]; do sleep 0.01; done
until rmmod vmpatch_own 2>/dev/null; do sleep 0.01; done";

/// See the module.
pub(super) struct OwnLivepatch;

impl Storm for OwnLivepatch {
    fn name(&self) -> &'static str {
        "own-livepatch"
    }

    fn what(&self) -> &'static str {
        "the guest loads and unloads its own livepatch"
    }

    fn fit(&self, config: GuestConfig, modules: &Modules) -> GuestConfig {
        config.file(FILE, modules.own_livepatch())
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(vec![Work::shell(scene, "its own livepatch", ROUND, "true")?])
    }
}
