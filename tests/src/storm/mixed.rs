//! All that a guest does by itself, at once.

use images::guest::GuestConfig;

use super::{Result, Scene, Storm, Work, cpus, fexit, livepatch, modules, processes, static_keys, tracing};
use crate::kit;

/// What goes on together. Memory that runs out is not among it: a program that gets none ends its round with an error, and so
/// could not be told from one that the kernel wronged.
const PARTS: [&dyn Storm; 8] = [
    &modules::Modules,
    &processes::Processes,
    &cpus::Online,
    &static_keys::StaticKeys,
    &tracing::Kprobes,
    &tracing::Ftrace,
    &fexit::Attached,
    &livepatch::OwnLivepatch,
];

/// See the module.
pub(super) struct Mixed;

impl Storm for Mixed {
    fn name(&self) -> &'static str {
        "mixed"
    }

    fn what(&self) -> &'static str {
        "modules, tasks, CPUs, static keys, kprobes, tracers, BPF programs and a livepatch at once"
    }

    fn fit(&self, config: GuestConfig, modules: &kit::Modules) -> GuestConfig {
        PARTS.iter().fold(config, |config, part| part.fit(config, modules))
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        let mut all = Vec::new();
        for part in PARTS {
            all.extend(part.start(scene)?);
        }
        Ok(all)
    }

    fn expects(&self, refusal: &str) -> bool {
        PARTS.iter().any(|part| part.expects(refusal))
    }
}
