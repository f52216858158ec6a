//! The guest is saved and loaded: it goes back to a patch that was reverted since, and to one that was not yet applied.

use serde_json::json;

use super::{Result, Scene, Storm, Work};
use crate::monitor::Monitor;
use crate::vmpatch::Vmpatch;

/// See the module.
pub(super) struct Snapshots;

impl Storm for Snapshots {
    fn name(&self) -> &'static str {
        "snapshots"
    }

    fn what(&self) -> &'static str {
        "the guest is saved and loaded"
    }

    fn start(&self, _scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(Vec::new())
    }

    /// With a patch in force the guest is saved. Without one it goes back there, where the patch must be in force and can be
    /// reverted.
    fn between(&self, scene: &Scene<'_>, applied: Option<&str>) -> Result<()> {
        let mut monitor = Monitor::second(scene.guest);
        if applied.is_some() {
            return human(&mut monitor, "savevm storm");
        }
        let vmpatch = Vmpatch::on(scene.guest);
        human(&mut monitor, "loadvm storm")?;
        let status = vmpatch.run(&["status"]);
        if !status.stdout.contains("patched") {
            return Err(format!("the saved patch is not there after loading: {status}").into());
        }
        let reverted = vmpatch.run(&["revert", "--all", "--timeout", "60"]);
        if reverted.code == Some(0) {
            Ok(())
        } else {
            Err(format!("the loaded patch can't be reverted: {reverted}").into())
        }
    }
}

/// A command of QEMU's monitor for people, which says nothing where it is done.
fn human(monitor: &mut Monitor, line: &str) -> Result<()> {
    let said = monitor.call("human-monitor-command", json!({ "command-line": line }))?;
    match said.as_str() {
        Some("") => Ok(()),
        _ => Err(format!("{line}: {said}").into()),
    }
}
