//! The guest runs out of memory, or memory is plugged in and pulled out.

use std::time::Duration;

use images::guest::{GuestConfig, Ram};
use serde_json::json;

use super::{Result, Scene, Storm, Work};
use crate::kit;
use crate::monitor::Monitor;

/// Bytes of a DIMM that is plugged in: x86 plugs no less than a section.
const PIECE_BYTES: u64 = 128 << 20;
/// How long a guest may take to let memory go.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);
/// How long a DIMM stays: so that the guest uses it for a while.
const STAY: Duration = Duration::from_millis(500);

/// The guest runs out of it.
pub(super) struct Exhausted;

impl Storm for Exhausted {
    fn name(&self) -> &'static str {
        "oom"
    }

    fn what(&self) -> &'static str {
        "the guest runs out of memory"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        Ok(vec![Work::program(scene, &["/opt/oom"])?])
    }
}

/// Plugged in and pulled out.
pub(super) struct Hotplug;

impl Storm for Hotplug {
    fn name(&self) -> &'static str {
        "memory-hotplug"
    }

    fn what(&self) -> &'static str {
        "memory is plugged in and pulled out"
    }

    fn fit(&self, config: GuestConfig, _modules: &kit::Modules) -> GuestConfig {
        let more = format!("{}M,slots=2,maxmem=2G", config.memory_mib);
        // Movable, so that it can be pulled out again.
        config
            .append("memhp_default_state=online_movable")
            .qemu_arg("-m")
            .qemu_arg(&more)
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        let mut monitor = Monitor::second(scene.guest);
        let is_shared = scene.guest.config().ram == Ram::SharedMemfd;
        Ok(vec![Work::on_host("memory", move || {
            plug_and_pull(&mut monitor, is_shared)
        })])
    }
}

fn plug_and_pull(monitor: &mut Monitor, is_shared: bool) -> Result<()> {
    let backend = if is_shared {
        json!({ "qom-type": "memory-backend-memfd", "id": "storm-memory", "size": PIECE_BYTES, "share": true })
    } else {
        json!({ "qom-type": "memory-backend-ram", "id": "storm-memory", "size": PIECE_BYTES })
    };
    monitor.call("object-add", backend)?;
    let device = json!({ "driver": "pc-dimm", "id": "storm-dimm", "memdev": "storm-memory" });
    monitor.call("device_add", device)?;
    std::thread::sleep(STAY);
    monitor.call("device_del", json!({ "id": "storm-dimm" }))?;
    if !monitor.wait_for_event("DEVICE_DELETED", UNPLUG_LIMIT) {
        return Err("the guest does not let the memory go".into());
    }
    monitor.call("object-del", json!({ "id": "storm-memory" }))?;
    Ok(())
}
