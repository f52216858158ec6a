//! What a move owes the host: the new process runs as the old one did, and what can't be moved is refused by its name.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use e2e::kit;
use e2e::load::Outfit;
use e2e::moving::{INSTALLED, Keeper};
use e2e::vmpatch::Vmpatch;
use images::guest::{Guest, GuestConfig, Ram};
use images::kernel::Kernel;
use images::qemu;
use serde_json::json;

/// A folder on the host, and one of its control groups; both removed when it is dropped.
struct Place {
    folder: PathBuf,
    group: PathBuf,
}

impl Place {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "vmpatch-host-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let hierarchies = ["/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified", "/sys/fs/cgroup"].map(Path::new);
        let hierarchy = hierarchies.into_iter().find(|path| path.join("cgroup.procs").exists());
        let place = Self {
            folder: std::env::temp_dir().join(&name),
            group: hierarchy.expect("the host has control groups").join(&name),
        };
        fs::create_dir(&place.folder).unwrap();
        fs::create_dir(&place.group).unwrap();
        place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.folder));
        drop(fs::remove_dir(&self.group));
    }
}

/// All that a process has from whoever started it, but its command line.
fn circumstances(pid: u32) -> Vec<String> {
    let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let status = read("status");
    let kept = ["Umask", "Uid", "Gid", "Groups", "Cpus_allowed_list"];
    let is_kept = |line: &&str| kept.iter().any(|name| line.starts_with(&format!("{name}:")));
    let environment = read("environ");
    let variables = environment
        .split('\0')
        .filter(|variable| !variable.starts_with("VMPATCH_UPGRADE_"));
    let mut variables: Vec<&str> = variables.collect();
    variables.sort_unstable();
    let mut found: Vec<String> = status.lines().filter(is_kept).map(str::to_owned).collect();
    found.extend(["limits", "cgroup", "oom_score_adj"].map(read));
    found.push(variables.join(" "));
    found.push(fs::read_link(format!("/proc/{pid}/cwd")).unwrap().display().to_string());
    found
}

#[test]
fn the_new_process_runs_as_the_old_one_did() {
    let place = Place::new();
    let (script, group) = (place.folder.join("qemu-system-x86_64"), place.group.display());
    let text = format!(
        "#!/bin/sh\n\
         echo $$ >{group}/cgroup.procs && echo 321 >/proc/self/oom_score_adj && cd /var && umask 037 && ulimit -n 777 && \
         ulimit -Sl 64 && export KEPT='a b=c' && \
         exec taskset -c 1 setpriv --regid 4711 --groups 4712,4713 --pdeathsig KILL {INSTALLED} \"$@\"\n"
    );
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    // Its tap device is handed over under a limit of open files that is lower than the usual one.
    let outfit = Outfit::new();
    let mut config = outfit.fit(kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private));
    config.qemu = script;
    let mut guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let (old, before) = (guest.pid(), circumstances(guest.pid()));
    assert!(before.iter().any(|line| line.contains("KEPT=a b=c")), "{before:?}");

    let upgrade = ["upgrade", "--qemu", INSTALLED, "--json"];
    let report = Vmpatch::on(&guest).run(&upgrade).expect(0).json();
    let new = u32::try_from(report["new"]["pid"].as_u64().unwrap()).unwrap();
    assert_ne!(new, old);
    assert_eq!(circumstances(new), before);
    guest.follow(new).unwrap();
    drop(guest);
    drop(outfit);
}

#[test]
fn a_guest_whose_connections_live_in_its_process_is_refused_by_the_option() {
    let config = kit::guest(Kernel::CLOUD_6_1)
        .qemu_arg("-netdev")
        .qemu_arg("user,id=net0");
    let guest = Guest::boot(config.qemu_arg("-device").qemu_arg("virtio-net-pci,netdev=net0")).unwrap();
    for options in [&["--check"][..], &[]] {
        let line = [&["upgrade", "--qemu", INSTALLED], options].concat();
        let answer = Vmpatch::on(&guest).run(&line).expect(3);
        let words = "`-netdev user,id=net0` can't be carried over to another process";
        assert!(answer.complaint().starts_with(words), "{answer}");
    }
    assert!(guest.is_running());
}

#[test]
fn what_the_new_program_lacks_is_named_before_the_guest_is_touched() {
    let place = Place::new();
    let guest = Guest::boot(kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private)).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let vmpatch = Vmpatch::on(&guest);
    // Half as long as the firmware that the guest has.
    fs::write(place.folder.join("bios-256k.bin"), vec![0; 128 << 10]).unwrap();
    let folder = place.folder.display().to_string();
    let answer = vmpatch
        .run(&["upgrade", "--qemu", INSTALLED, "--data-dir", &folder, "--check"])
        .expect(3);
    let words = "another size of a block of memory than the old one (131072, not pc.bios 262144)";
    assert!(answer.complaint().contains(words), "{answer}");

    let older = qemu::bookworm()
        .unwrap_or_else(|error| panic!("{error}"))
        .display()
        .to_string();
    let answer = vmpatch.run(&["upgrade", "--qemu", &older]).expect(3);
    let words = "the machine type `pc-q35-10.0`: ";
    assert!(answer.complaint().starts_with(words), "{answer}");
    assert!(
        answer.complaint().contains("of that kind it has ") && answer.complaint().contains("pc-q35-7.2"),
        "{answer}"
    );
    assert!(guest.is_running());
}

/// Handing memory over works forwards only.
#[test]
fn a_guest_moves_back_into_an_older_qemu_by_a_copy() {
    let older = qemu::bookworm().unwrap_or_else(|error| panic!("{error}"));
    let older = older.display().to_string();
    let mut config = kit::guest(Kernel::CLOUD_6_1).cpu("qemu64").ram(Ram::Private);
    config.machine = "pc-q35-7.2".to_owned();
    let mut guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let vmpatch = Vmpatch::on(&guest);
    let upgrade = ["upgrade", "--qemu", &older];
    let answer = vmpatch
        .run(&[&upgrade[..], &["--method", "cpr-transfer"]].concat())
        .expect(3);
    assert!(
        answer.complaint().contains("it does not work backwards, from QEMU "),
        "{answer}"
    );
    let report = vmpatch.run(&[&upgrade[..], &["--json"]].concat()).expect(0).json();
    assert_eq!(report["method"], "precopy");
    guest
        .follow(u32::try_from(report["new"]["pid"].as_u64().unwrap()).unwrap())
        .unwrap();
    assert_eq!(guest.text(&["echo", "here"]).unwrap().trim(), "here");
}

#[test]
fn a_qemu_that_was_started_through_the_loader_is_refused() {
    let place = Place::new();
    let script = place.folder.join("qemu-system-x86_64");
    let text = format!("#!/bin/bash\nexec -a qemu-system-x86_64 /lib64/ld-linux-x86-64.so.2 {INSTALLED} \"$@\"\n");
    fs::write(&script, text).unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    let mut config = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private);
    config.qemu = script;
    let guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
    let _keeper = Keeper::of(&guest);
    let answer = Vmpatch::socket(&guest.qmp_path())
        .run(&["upgrade", "--qemu", INSTALLED])
        .expect(3);
    assert!(
        answer.complaint().contains("was started through the loader"),
        "{answer}"
    );
}

#[test]
fn memory_in_a_folder_and_a_virtio_mem_device_move() {
    let folder = kit::guest(Kernel::CLOUD_6_1).ram(Ram::Private);
    let object = format!(
        "memory-backend-file,id=folder0,size={}M,share=on,mem-path=/dev/shm",
        folder.memory_mib
    );
    let mut folder = folder.qemu_arg("-object").qemu_arg(&object);
    folder.machine = format!("{},memory-backend=folder0", folder.machine);
    // Only by handing its RAM over: other methods are refused.
    let mut elastic = kit::guest(Kernel::CLOUD_6_1).module("virtio_mem");
    elastic.machine = "q35,aux-ram-share=on".to_owned();
    let words = [
        "-m",
        "size=256M,maxmem=1G",
        "-object",
        "memory-backend-memfd,id=elastic0,size=128M,share=on",
        "-device",
        "virtio-mem-pci,id=vm0,memdev=elastic0,requested-size=64M",
    ];
    let elastic = words.iter().fold(elastic, |config, word| config.qemu_arg(word));
    for (config, way, other) in [
        (folder, "precopy", "x-ignore-shared"),
        (elastic, "cpr-transfer", "precopy"),
    ] {
        let mut guest = Guest::boot(config).unwrap_or_else(|error| panic!("{error}"));
        let _keeper = Keeper::of(&guest);
        let vmpatch = Vmpatch::on(&guest);
        vmpatch
            .run(&["upgrade", "--qemu", INSTALLED, "--method", other])
            .expect(3);
        let report = vmpatch
            .run(&["upgrade", "--qemu", INSTALLED, "--json"])
            .expect(0)
            .json();
        assert_eq!(report["method"], way);
        guest
            .follow(u32::try_from(report["new"]["pid"].as_u64().unwrap()).unwrap())
            .unwrap();
        assert_eq!(guest.text(&["echo", "here"]).unwrap().trim(), "here");
    }
}

#[test]
fn a_guest_of_libvirts_is_refused_with_what_to_do_instead() {
    let place = Place::new();
    let path = |name: &str| place.folder.join(name).display().to_string();
    fs::write(path("master-key.aes"), [7; 32]).unwrap();
    // As libvirt 9 starts a guest (`src/qemu/qemu_command.c`), but for the monitor's socket, which it passes as a descriptor.
    let key = json!({"qom-type": "secret", "id": "masterKey0", "format": "raw", "file": path("master-key.aes")});
    let monitor = format!("socket,id=charmonitor,path={},server=on,wait=off", path("monitor.sock"));
    let libvirts = |config: GuestConfig| {
        let words = ["-S", "-object", &key.to_string(), "-chardev", &monitor, "-mon"].map(str::to_owned);
        let config = words.iter().fold(config, |config, word| config.qemu_arg(word));
        config.qemu_arg("chardev=charmonitor,id=monitor,mode=control")
    };
    let refused = |vmpatch: Vmpatch| {
        let answer = vmpatch.run(&["upgrade", "--qemu", INSTALLED]).expect(3);
        assert!(answer.complaint().contains("is managed by libvirt"), "{answer}");
        assert!(
            answer.stderr.contains("hint: `virsh managedsave` and `virsh start`"),
            "{answer}"
        );
    };
    let mut alone = GuestConfig::without_kernel();
    alone.qmp.clear();
    let guest = Guest::start(libvirts(alone)).unwrap();
    refused(Vmpatch::on(&guest));
    refused(Vmpatch::socket(Path::new(&path("monitor.sock"))));
    drop(guest);
    let guest = Guest::start(libvirts(GuestConfig::without_kernel())).unwrap();
    refused(Vmpatch::on(&guest));
    refused(Vmpatch::socket(&guest.qmp_path()));
}
