//! What is plugged into a guest, and out of it, after it was patched: each time `status` and `revert` work, and so does `apply`.

use std::sync::LazyLock;
use std::thread;
use std::time::{Duration, Instant};

use e2e::bed;
use e2e::cut::{Call, Side, let_go, run_to};
use e2e::kit::{self, Modules};
use e2e::monitor::Monitor;
use e2e::probe::{Seen, see};
use e2e::report::states;
use e2e::vmpatch::Vmpatch;
use images::build::Cve;
use images::guest::{Guest, GuestConfig};
use images::kernel::Kernel;
use serde_json::{Value, json};

/// How long a guest may take to use what is plugged in, and to let go of what is unplugged.
const UNPLUG_LIMIT: Duration = Duration::from_secs(30);

static MODULES: LazyLock<Modules> = LazyLock::new(|| Modules::of(&Kernel::CLOUD_6_1));

/// A patched guest in which things change.
struct Patched {
    guest: Guest,
    vmpatch: Vmpatch,
    monitor: Monitor,
    applied: Value,
}

impl Patched {
    fn new(words: &str) -> Self {
        Self::with_memory_online_as("online", &[], words)
    }

    /// With memory that is plugged in used like that, and with drivers.
    fn with_memory_online_as(state: &str, drivers: &[&str], words: &str) -> Self {
        let config = kit::guest(Kernel::CLOUD_6_1).append(&format!("memhp_default_state={state}"));
        let mut config = drivers.iter().fold(config, |config, driver| config.module(driver));
        // Its PCI bus takes devices while it runs.
        config.machine = "pc".to_owned();
        let guest = Guest::boot(words.split(' ').fold(config, GuestConfig::qemu_arg)).unwrap();
        let vmpatch = Vmpatch::on(&guest);
        let monitor = Monitor::second(&guest);
        let applied = vmpatch.apply(&MODULES.cve(Cve::Y2026N52928));
        Self {
            guest,
            vmpatch,
            monitor,
            applied,
        }
    }

    #[track_caller]
    fn call(&mut self, command: &str, arguments: Value) -> Value {
        self.monitor.call(command, arguments).unwrap()
    }

    /// Adds a backend of that kind and size.
    #[track_caller]
    fn backend(&mut self, kind: &str, id: &str, mib: u64) {
        let kind = format!("memory-backend-{kind}");
        self.call("object-add", json!({"qom-type": kind, "id": id, "size": mib << 20}));
    }

    /// Unplugs a device, and waits until the guest has let go of it.
    #[track_caller]
    fn unplug(&mut self, id: &str) {
        self.monitor.forget_events();
        self.call("device_del", json!({"id": id}));
        assert!(self.monitor.wait_for_event("DEVICE_DELETED", UNPLUG_LIMIT), "{id}");
    }

    /// After a change: the patch is seen, reverted, and applied again.
    #[track_caller]
    fn still_works(&mut self, after: &str) {
        let status = self.vmpatch.run(&["status", "--json"]);
        assert_eq!(status.code, Some(0), "after {after}: {status}");
        assert_eq!(states(&status.json()), states(&self.applied), "after {after}");
        let reverted = self.vmpatch.run(&["revert", "--all"]);
        assert_eq!(reverted.code, Some(0), "after {after}: {reverted}");
        assert_eq!(see(&self.guest, "siocatmark"), Seen::Flawed, "after {after}");
        let applied = self.vmpatch.run(&["apply", &MODULES.cve(Cve::Y2026N52928)]);
        assert_eq!(applied.code, Some(0), "after {after}: {applied}");
        assert_eq!(see(&self.guest, "siocatmark"), Seen::Fixed, "after {after}");
        bed::assert_healthy(&self.guest);
    }

    /// Waits until the guest has that file.
    #[track_caller]
    fn wait_for_file(&self, path: &str) {
        let start = Instant::now();
        while !self.guest.run(&["test", "-e", path]).unwrap().status.success() {
            assert!(start.elapsed() < UNPLUG_LIMIT, "no {path}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// The guest's RAM in MiB.
    fn total_mib(&self) -> u64 {
        let text = self.guest.text(&["grep", "MemTotal", "/proc/meminfo"]).unwrap();
        let kib: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib >> 10
    }

    #[track_caller]
    fn wait_for_mib(&self, what: &str, is_there: impl Fn(u64) -> bool) {
        let start = Instant::now();
        while !is_there(self.total_mib()) {
            assert!(start.elapsed() < UNPLUG_LIMIT, "{what}: {} MiB", self.total_mib());
            thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The drivers of memory that is plugged in.
const MEMORY_DRIVERS: [&str; 5] = ["virtio_mem", "virtio_balloon", "virtio_pmem", "nfit", "nd_pmem"];

#[test]
fn memory() {
    let words = "-m slots=4,maxmem=4G -device virtio-balloon-pci,id=balloon";
    let mut patched = Patched::with_memory_online_as("online", &MEMORY_DRIVERS, words);
    let before = patched.total_mib();

    patched.backend("ram", "unused", 32);
    patched.still_works("object-add of a backend that no device uses");

    patched.backend("ram", "dimm0", 256);
    patched.call(
        "device_add",
        json!({"driver": "pc-dimm", "memdev": "dimm0", "id": "d0"}),
    );
    patched.wait_for_mib("a DIMM", |mib| mib >= before + 200);
    // Tasks whose stacks the kernel may put into the DIMM. Where they lie was not looked at.
    let tasks = patched.guest.spawn(&["/opt/tasks", "300"]).unwrap();
    tasks.wait_for_stdout("sleeping", UNPLUG_LIMIT).unwrap();
    patched.still_works("device_add of a private DIMM");
    drop(tasks);

    patched.backend("memfd", "grown", 512);
    let device = json!({"driver": "virtio-mem-pci", "memdev": "grown", "id": "vm0", "requested-size": 256 << 20});
    patched.call("device_add", device);
    patched.wait_for_mib("virtio-mem", |mib| mib >= before + 400);
    patched.still_works("device_add of virtio-mem");

    patched.backend("ram", "pm", 64);
    patched.call(
        "device_add",
        json!({"driver": "virtio-pmem-pci", "memdev": "pm", "id": "pm0"}),
    );
    patched.wait_for_file("/dev/pmem0");
    patched.still_works("device_add of virtio-pmem");

    let all = patched.total_mib();
    patched.call("balloon", json!({"value": 312 << 20}));
    patched.wait_for_mib("a balloon", |mib| mib <= all - 150);
    patched.still_works("a balloon");
    patched.call("balloon", json!({"value": 512 << 20}));
    patched.wait_for_mib("no balloon", |mib| mib == all);
    patched.still_works("no balloon");

    patched.call("object-del", json!({"id": "unused"}));
    patched.still_works("object-del");
}

#[test]
fn memory_that_goes_again() {
    let words = "-m slots=4,maxmem=4G -machine nvdimm=on";
    let mut patched = Patched::with_memory_online_as("online_movable", &MEMORY_DRIVERS, words);
    let before = patched.total_mib();
    for kind in ["ram", "memfd"] {
        patched.backend(kind, "plugged", 256);
        patched.call(
            "device_add",
            json!({"driver": "pc-dimm", "memdev": "plugged", "id": "d0"}),
        );
        patched.wait_for_mib("a DIMM", |mib| mib >= before + 200);
        patched.still_works(&format!("device_add of a DIMM, {kind}"));
        patched.unplug("d0");
        patched.still_works(&format!("device_del of a DIMM, {kind}"));
        patched.call("object-del", json!({"id": "plugged"}));
        patched.still_works("object-del of what it had");
    }

    let request =
        |mib: u64| json!({"path": "/machine/peripheral/vm0", "property": "requested-size", "value": mib << 20});
    patched.backend("memfd", "elastic", 512);
    let device = json!({"driver": "virtio-mem-pci", "memdev": "elastic", "id": "vm0", "requested-size": 256 << 20});
    patched.call("device_add", device);
    patched.wait_for_mib("virtio-mem", |mib| mib >= before + 200);
    patched.call("qom-set", request(128));
    patched.wait_for_mib("a smaller virtio-mem", |mib| mib <= before + 128);
    patched.still_works("a smaller virtio-mem");
    patched.call("qom-set", request(0));
    patched.wait_for_mib("an empty virtio-mem", |mib| mib <= before);
    patched.still_works("an empty virtio-mem");
    patched.unplug("vm0");
    patched.still_works("device_del of virtio-mem");
    patched.call("object-del", json!({"id": "elastic"}));
    patched.still_works("object-del of what virtio-mem had");

    // QEMU takes this one out of no guest.
    patched.backend("memfd", "nv", 256);
    patched.call("device_add", json!({"driver": "nvdimm", "memdev": "nv", "id": "nv0"}));
    patched.wait_for_file("/dev/pmem0");
    patched.still_works("device_add of an NVDIMM");
    let refusal = patched.monitor.call("device_del", json!({"id": "nv0"})).unwrap_err();
    assert!(refusal.contains("unplug is not supported"), "{refusal}");
    patched.still_works("device_del of an NVDIMM, refused");
}

#[test]
fn cpus() {
    let mut patched = Patched::new("-smp maxcpus=4");
    let online = |patched: &Patched, cpu: u32, on: &str| {
        let file = format!("/sys/devices/system/cpu/cpu{cpu}/online");
        let script = r#"echo "$1" >"$2""#;
        patched.guest.text(&["sh", "-c", script, "online", on, &file]).unwrap();
    };
    online(&patched, 1, "0");
    patched.still_works("a CPU taken offline");
    online(&patched, 1, "1");
    patched.still_works("a CPU brought online");

    let all = patched.call("query-hotpluggable-cpus", json!({}));
    let free = all
        .as_array()
        .unwrap()
        .iter()
        .find(|cpu| cpu.get("qom-path").is_none())
        .unwrap();
    let mut device = free["props"].clone();
    device["driver"] = free["type"].clone();
    device["id"] = json!("cpu-new");
    patched.call("device_add", device);
    patched.still_works("device_add of a CPU, not yet online");
    online(&patched, 2, "1");
    patched.still_works("device_add of a CPU");
    online(&patched, 2, "0");
    patched.unplug("cpu-new");
    patched.still_works("device_del of a CPU");
}

/// As long as the guest has it, a vCPU that was plugged in is known to QMP and to the GDB stub, but one of the two was asked before.
#[test]
fn a_cpu_that_comes_between_the_questions_for_the_vcpus_and_the_pause() {
    let mut patched = Patched::new("-smp maxcpus=8");
    let all = patched.call("query-hotpluggable-cpus", json!({}));
    let free = all
        .as_array()
        .unwrap()
        .iter()
        .filter(|cpu| cpu.get("qom-path").is_none());
    let places: Vec<Value> = free.cloned().collect();
    let module = MODULES.cve(Cve::Y2026N52928);
    let commands = [vec!["revert", "--all"], vec!["apply", &module]];
    for (number, (place, command)) in places.iter().zip(commands.iter().cycle()).take(4).enumerate() {
        let child = patched.vmpatch.start(command);
        run_to(&child, Call::Pause, 1, Side::Before);
        let mut device = place["props"].clone();
        device["driver"] = place["type"].clone();
        device["id"] = json!(format!("cpu-{number}"));
        patched.call("device_add", device);
        let_go(&child);
        patched.vmpatch.finish(command, child).expect(0);
    }
    patched.still_works("CPUs that came meanwhile");
}

#[test]
fn devices() {
    let mut patched = Patched::new("-device VGA");
    patched.call("device_add", json!({"driver": "virtio-net-pci", "id": "net0"}));
    patched.still_works("device_add of a network card with a ROM");
    patched.unplug("net0");
    patched.still_works("device_del of it");
    patched.backend("memfd", "window", 4);
    patched.call(
        "device_add",
        json!({"driver": "ivshmem-plain", "memdev": "window", "id": "shm0"}),
    );
    patched.still_works("device_add of shared memory");
    let backend = json!({"type": "null", "data": {}});
    patched.call("chardev-add", json!({"id": "another", "backend": backend}));
    patched.still_works("chardev-add");
}

#[test]
fn a_gdb_stub_of_the_operators_refuses_changes_until_it_is_closed() {
    let mut patched = Patched::new("-device VGA");
    let socket = patched.guest.folder().join("gdb.sock").display().to_string();
    let line = format!("gdbserver unix:{socket},server=on,wait=off");
    patched.call("human-monitor-command", json!({"command-line": line}));
    assert_eq!(states(&patched.vmpatch.status()), states(&patched.applied));
    let answer = patched.vmpatch.run(&["revert", "--all"]).expect(3);
    assert!(answer.complaint().contains("close it in QEMU's monitor"), "{answer}");
    assert_eq!(see(&patched.guest, "siocatmark"), Seen::Fixed);
    patched.call("human-monitor-command", json!({"command-line": "gdbserver none"}));
    patched.still_works("a GDB stub of the operator's");
}
