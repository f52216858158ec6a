//! The guest loads and unloads modules: its list and tree of modules, its bug table, ftrace's groups of sites, jump labels, per-CPU
//! memory and its text change all the time.

use images::guest::GuestConfig;

use super::{Result, Scene, Storm, Work};
use crate::kit;

/// Where the guest has the modules.
const FILES: [&str; 2] = ["/opt/vmpatch_target.ko", "/opt/vmpatch_percpu.ko"];

/// See the module.
pub(super) struct Modules;

impl Storm for Modules {
    fn name(&self) -> &'static str {
        "modules"
    }

    fn what(&self) -> &'static str {
        "modules are loaded and unloaded"
    }

    fn fit(&self, config: GuestConfig, modules: &kit::Modules) -> GuestConfig {
        let [target, percpu] = FILES;
        config.file(target, modules.target()).file(percpu, modules.percpu())
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        let [target, _] = FILES;
        Ok(vec![Work::program(scene, &["/opt/insmods", target])?])
    }
}
