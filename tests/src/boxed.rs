//! A guest under KVM in a host in a box, and the program `in-box` beside its QEMU.

use std::path::{Path, PathBuf};
use std::time::Duration;

use images::build::hand_written::Applied;
use images::channel::Running;
use images::guest::{Guest, GuestConfig, Ram};
use images::host_box::HostBox;
use images::kernel::Kernel;
use serde_json::Value;

use crate::health;
use crate::killing::{Command, PROGRAM};
use crate::kit::{self, Modules};
use crate::monitor::Monitor;
use crate::probe::{Calls, Seen, see};
use crate::report::states;
use crate::vmpatch::{self, Vmpatch};

/// What `load` checks again and again, MiB.
const LOAD_MIB: &str = "4";
/// Tasks that do nothing but call the patched functions: one, which leaves a CPU of the box to vmpatch.
const CALLERS: &str = "1";
/// Where the guest's disk is in the box, and how large, in bytes: as `load` writes it.
const DISK: &str = "/disk.img";
const DISK_BYTES: &str = "4194304";
/// How long a program may take to start and to end on a guest that is all busy, in a box.
const PROGRAM_LIMIT: Duration = Duration::from_secs(300);
/// What kernels complain of at their start on the box's CPU: the microcode is not there.
const MICROCODE: [&str; 2] = [
    "Speculative Return Stack Overflow",
    "https://kernel.org/doc/html/latest/admin-guide/hw-vuln/srso",
];

/// Demands that a kernel has found nothing wrong beside the CPU that it runs on.
///
/// # Panics
///
/// If it has.
#[track_caller]
pub fn assert_clean(guest: &Guest) {
    let console = guest.console().expect("the console can be read");
    assert_eq!(complaints(&console), [""; 0], "{console}");
    assert_eq!(guest.text(&["echo", "alive"]).expect("it runs a program"), "alive");
}

/// What a kernel has found wrong beside the CPU that it runs on.
pub fn complaints(console: &str) -> Vec<&str> {
    let mut complaints = health::complaints(console);
    complaints.retain(|line| !MICROCODE.iter().any(|known| line.contains(known)));
    complaints
}

/// One step of a pause by ptrace at which is killed: the name of the system call for `in-box`, which of them, and the side of it.
pub type Step = (&'static str, usize, bool);

/// A guest in a box. Every method panics if something is not as it must be.
pub struct Boxed<'a> {
    /// The box.
    pub host: &'a HostBox,
    /// The guest.
    pub guest: Guest,
    /// vmpatch in the box.
    pub vmpatch: Vmpatch,
    /// The module whose two functions tell old, new, and mixed.
    pub module: String,
    in_box: PathBuf,
    program: &'static Path,
}

/// Programs of a guest that check themselves.
pub struct Work {
    load: Running,
    callers: Running,
}

impl<'a> Boxed<'a> {
    /// Boots it. `in_box` is the program of that name.
    ///
    /// # Panics
    ///
    /// If it does not boot.
    pub fn boot(host: &'a HostBox, in_box: &Path, config: GuestConfig) -> Self {
        let module = Modules::of(&Kernel::CLOUD_6_1).applied(Applied::Pair);
        let program = vmpatch::program().expect("vmpatch builds");
        for program in [program, in_box] {
            host.place_program(program).expect("the program is in the box");
        }
        host.place(Path::new(&module)).expect("the module is in the box");
        let guest = host.boot(config).unwrap_or_else(|error| panic!("{error}"));
        Self {
            host,
            vmpatch: Vmpatch::on(&guest),
            guest,
            module,
            in_box: in_box.to_owned(),
            program,
        }
    }

    /// A guest of 6.1 with a disk.
    ///
    /// # Panics
    ///
    /// If the box has no place for the disk.
    pub fn with_disk(host: &HostBox, vcpus: u32, ram: Ram) -> GuestConfig {
        host.text(&["truncate", "-s", DISK_BYTES, DISK])
            .expect("a file is made in the box");
        kit::guest(Kernel::CLOUD_6_1)
            .vcpus(vcpus)
            .ram(ram)
            .module("virtio_blk")
            .qemu_arg("-drive")
            .qemu_arg(&format!("file={DISK},if=none,id=disk0,format=raw"))
            .qemu_arg("-device")
            .qemu_arg("virtio-blk-pci,drive=disk0,id=block0")
    }

    /// Starts work that checks itself: memory, the disk, and calls of the patched functions.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn start_work(&self) -> Work {
        let start = |args: &[&str]| {
            let running = self.guest.spawn(args).expect("the guest starts a program");
            running
                .wait_for_stdout("started", PROGRAM_LIMIT)
                .expect("the program starts");
            running
        };
        Work {
            callers: start(&["/opt/pair", "load", "0", CALLERS]),
            load: start(&["/opt/load", LOAD_MIB, "/dev/vda", "0"]),
        }
    }

    /// Ends it, and gives what it says.
    ///
    /// # Panics
    ///
    /// If anything was wrong.
    pub fn end_work(&self, work: &Work) -> (Calls, String) {
        let end = |running: &Running| {
            let pid = running.pid().to_string();
            self.guest.text(&["kill", "-TERM", &pid]).expect("it still runs");
            let output = running.wait(PROGRAM_LIMIT).expect("it ends");
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(output.status.success(), "{output:?}");
            text
        };
        let text = end(&work.callers);
        let calls = Calls::of(&text).unwrap_or_else(|| panic!("{text}"));
        assert_eq!((calls.mixed, calls.lost), (0, 0), "{calls:?}");
        let text = end(&work.load);
        (calls, text.lines().last().unwrap_or_default().to_owned())
    }

    /// Runs `in-box` to its end, and gives what it prints.
    ///
    /// # Panics
    ///
    /// If it fails.
    #[track_caller]
    pub fn in_box(&self, args: &[&str], limit: Duration) -> String {
        let program = self.in_box.to_string_lossy();
        let request = self.host.command(&[&[&*program], args].concat()).limit(limit);
        let output = request.run().expect("the box answers");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{args:?}: {text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        text
    }

    /// Compares pauses: see [`crate::in_box::bench`].
    #[track_caller]
    pub fn bench(&self, warm_up: usize, rounds: usize, limit: Duration) -> String {
        let sockets = self.guest.qmp_paths();
        let [vmpatch, socket] = [self.program, &sockets[1]].map(|path| path.to_string_lossy());
        let [warm_up, rounds] = [warm_up, rounds].map(|count| count.to_string());
        let args = [
            "bench",
            self.guest.name(),
            &vmpatch,
            &self.module,
            &socket,
            &warm_up,
            &rounds,
        ];
        self.in_box(&args, limit)
    }

    /// Applies and reverts so many times: see [`crate::in_box::cycles`].
    #[track_caller]
    pub fn cycles(&self, count: usize, limit: Duration) -> String {
        let (vmpatch, count) = (self.program.to_string_lossy(), count.to_string());
        self.in_box(&["cycles", self.guest.name(), &vmpatch, &self.module, &count], limit)
    }

    /// The words of the command line.
    fn args(&self, command: Command) -> [&str; 2] {
        match command {
            Command::Apply => ["apply", &self.module],
            Command::Revert => ["revert", "--all"],
        }
    }

    /// Kills the command, or its supervisor, at that step, and gives what `in-box` tells of it. No thread is held then.
    ///
    /// # Panics
    ///
    /// If one is.
    #[track_caller]
    pub fn cut(&self, command: Command, (call, nth, behind): Step, supervisor: bool) -> Value {
        let (pid, nth) = (self.guest.pid().to_string(), nth.to_string());
        let program = self.program.to_string_lossy();
        let mut args = vec!["cut", &pid, call, &nth];
        args.extend(behind.then_some("--behind"));
        args.extend(supervisor.then_some("--supervisor"));
        args.extend(["--", &*program, "--domain", self.guest.name()]);
        args.extend(self.args(command));
        args.extend(["--pause", "ptrace", "--timeout", "60"]);
        let told: Value = serde_json::from_str(&self.in_box(&args, PROGRAM_LIMIT)).expect("it prints JSON");
        assert_eq!(told["held"], Value::Array(Vec::new()), "{told}");
        told
    }

    /// What the guest is like: it runs, and no function of the module is redirected, or each is; `status` says so, too.
    #[track_caller]
    pub fn look(&self, context: &str) -> Seen {
        let seen = see(&self.guest, PROGRAM);
        let status = self.vmpatch.status();
        for (_, state, functions) in states(&status) {
            let expected = match seen {
                Seen::Fixed => "patched",
                Seen::Flawed => "original",
            };
            assert_eq!(
                functions,
                ["patched", "patched"].map(|_| expected),
                "{context}: {status}"
            );
            assert_eq!(state == "applied", seen == Seen::Fixed, "{context}: {status}");
        }
        assert_eq!(Monitor::second(&self.guest).run_state(), "running", "{context}");
        seen
    }

    /// Kills the command at that step, looks, and has the same command work. False where the step was not reached.
    #[track_caller]
    pub fn cut_and_repeat(&self, command: Command, step: Step, supervisor: bool) -> bool {
        let told = self.cut(command, step, supervisor);
        let victim = if supervisor { "supervisor" } else { "vmpatch" };
        let context = format!("{command:?} {step:?} {victim}: {told}");
        let seen = self.look(&context);
        println!(
            "{command:?}, {victim} killed {} {} {}: {seen:?}, all ended after {} µs, {}",
            if step.2 { "behind" } else { "before" },
            step.0,
            step.1,
            told["ended_us"],
            told["stderr"].as_str().unwrap_or_default().trim()
        );
        if seen != command.aim() {
            self.vmpatch.run(&self.args(command)).expect(0);
            assert_eq!(self.look(&context), command.aim(), "{context}: once more");
        }
        told["reached"] == true
    }
}
