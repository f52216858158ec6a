//! BPF programs on the entry and the exit of functions: they come and go, or a task sleeps below one.

use super::{Result, Scene, Storm, Work};

/// A function that any system call on a file reaches, and that no patch replaces.
const CALLED: &str = "vfs_read";
/// The function in which a task sleeps.
const SLEPT_IN: &str = "hrtimer_nanosleep";

/// Programs that come and go.
pub(super) struct Attached;

impl Storm for Attached {
    fn name(&self) -> &'static str {
        "bpf"
    }

    fn what(&self) -> &'static str {
        "BPF programs are attached and detached"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(vec![Work::program(scene, &["/opt/fexit", "churn", CALLED])?])
    }
}

/// A task that sleeps below one.
pub(super) struct Asleep;

impl Storm for Asleep {
    fn name(&self) -> &'static str {
        "fexit-sleep"
    }

    fn what(&self) -> &'static str {
        "a task sleeps below a BPF trampoline"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(vec![Work::program(scene, &["/opt/fexit", "sleep", SLEPT_IN])?])
    }
}
