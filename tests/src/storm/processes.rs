//! The guest makes tasks that end at once: its list of tasks and its kernel stacks change all the time.

use super::{Result, Scene, Storm, Work};

/// See the module.
pub(super) struct Processes;

impl Storm for Processes {
    fn name(&self) -> &'static str {
        "processes"
    }

    fn what(&self) -> &'static str {
        "tasks are forked and exit"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        let forks = || Work::program(scene, &["/opt/forks"]);
        Ok(vec![forks()?, forks()?])
    }
}
