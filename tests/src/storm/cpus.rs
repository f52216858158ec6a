//! CPUs come and go: the guest takes them offline and online, or they are plugged in and pulled out.

use std::time::Duration;

use images::guest::GuestConfig;
use serde_json::{Value, json};

use super::{Result, Scene, Storm, Work};
use crate::kit;
use crate::monitor::Monitor;

/// Every CPU but the first, which can't go on some kernels.
const ROUND: &str = "for cpu in /sys/devices/system/cpu/cpu[1-9]; do echo 0 >$cpu/online; done
for cpu in /sys/devices/system/cpu/cpu[1-9]; do echo 1 >$cpu/online; done";
/// How long a guest may take to let a CPU go.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);
/// How long a CPU stays: so that the guest has it online for a while.
const STAY: Duration = Duration::from_millis(300);
/// How often a vCPU is plugged in at the most, and has room reserved for it.
const PLUGS_MAX: u32 = 100;
/// What a CPU that is plugged in is called.
const PLUGGED: &str = "storm-cpu";

/// Taken offline and online.
pub(super) struct Online;

impl Storm for Online {
    fn name(&self) -> &'static str {
        "cpu-online"
    }

    fn what(&self) -> &'static str {
        "CPUs are taken offline and online"
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        let reset = "for cpu in /sys/devices/system/cpu/cpu[1-9]; do echo 1 >$cpu/online; done";
        Ok(vec![Work::shell(scene, "CPUs", ROUND, reset)?])
    }
}

/// Plugged in and pulled out.
pub(super) struct Hotplug;

impl Storm for Hotplug {
    fn name(&self) -> &'static str {
        "cpu-hotplug"
    }

    fn what(&self) -> &'static str {
        "a vCPU is plugged in and pulled out"
    }

    fn fit(&self, config: GuestConfig, _modules: &kit::Modules) -> GuestConfig {
        // The later -smp adds to the earlier one. The guest sees one place more than it has vCPUs.
        let possible = format!("possible_cpus={}", config.vcpus + 1);
        let more = format!("maxcpus={}", config.vcpus + PLUGS_MAX);
        config.append(&possible).qemu_arg("-smp").qemu_arg(&more)
    }

    fn start(&self, scene: &Scene<'_>) -> Result<Vec<Work>> {
        let mut monitor = Monitor::second(scene.guest);
        let all = monitor.call("query-hotpluggable-cpus", json!({}))?;
        let free = all
            .as_array()
            .and_then(|all| all.iter().find(|cpu| cpu.get("qom-path").is_none()))
            .ok_or("there is no place for another vCPU")?
            .clone();
        let online = Work::shell(
            scene,
            "the plugged CPU",
            "for cpu in /sys/devices/system/cpu/cpu[1-9]; do [ \"$(cat $cpu/online)\" = 1 ] || echo 1 >$cpu/online || true; done\nsleep 0.1",
            "true",
        )?;
        let mut plugs = 0;
        let plug = move || {
            if plugs == PLUGS_MAX {
                std::thread::sleep(STAY);
                return Ok(());
            }
            plugs += 1;
            plug_and_pull(&mut monitor, &free)
        };
        Ok(vec![online, Work::on_host("a vCPU", plug)])
    }
}

fn plug_and_pull(monitor: &mut Monitor, place: &Value) -> Result<()> {
    let mut arguments = json!({ "driver": place["type"], "id": PLUGGED });
    let properties = place["props"].as_object().ok_or("a vCPU's place has no properties")?;
    for (name, value) in properties {
        arguments[name] = value.clone();
    }
    monitor.call("device_add", arguments)?;
    std::thread::sleep(STAY);
    monitor.call("device_del", json!({ "id": PLUGGED }))?;
    if monitor.wait_for_event("DEVICE_DELETED", UNPLUG_LIMIT) {
        Ok(())
    } else {
        Err("the guest does not let the vCPU go".into())
    }
}
