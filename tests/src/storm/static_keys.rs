//! The guest flips static keys: its text changes all the time, also in the patches that branch on them.

use super::{Result, Scene, Storm, Work};

/// A key of the scheduler, on which a patch branches as well, and one of BPF.
const ROUND: &str = "for key in sched_schedstats bpf_stats_enabled; do
    [ -e /proc/sys/kernel/$key ] || continue
    echo 1 >/proc/sys/kernel/$key
    echo 0 >/proc/sys/kernel/$key
done";

/// See the module.
pub(super) struct StaticKeys;

impl Storm for StaticKeys {
    fn name(&self) -> &'static str {
        "static-keys"
    }

    fn what(&self) -> &'static str {
        "static keys are flipped"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(vec![Work::shell(scene, "static keys", ROUND, "true")?])
    }
}
