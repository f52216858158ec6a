//! A guest in a host in a box whose program is not QEMU. Nothing can be run in it from outside: a script that it begins with calls the
//! functions of the module `pair` again and again, and says on its console what answered.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use images::build::hand_written::Applied;
use images::channel::Running;
use images::host_box::HostBox;
use images::initramfs::{self, ExtraFile};
use images::kernel::Kernel;
use serde_json::Value;

use crate::boxed::{Step, complaints};
use crate::killing::Command;
use crate::kit::{self, Modules};
use crate::probe::{Calls, Seen};
use crate::vmpatch::{self, Vmpatch};

/// How long it may take to boot, and from one line of the script to the next.
const BOOT_LIMIT: Duration = Duration::from_secs(240);
const BEAT_LIMIT: Duration = Duration::from_secs(60);
/// Pause between two looks at the console.
const LOOK_WAIT: Duration = Duration::from_millis(300);
/// How long one run of the program `in-box` may take.
const PROGRAM_LIMIT: Duration = Duration::from_secs(300);
/// Where vmpatch is killed in the pause of a change: the stop before it, for registers, has the first interrupt, read and release.
pub const STEPS: [Step; 5] = [
    ("interrupt", 2, true),
    ("read-process", 2, true),
    ("write-process", 1, false),
    ("write-process", 1, true),
    ("detach", 2, false),
];
/// Where its supervisor is.
pub const SUPERVISOR_STEP: Step = ("interrupt", 2, true);
/// The script, and its path in the guest.
const SCRIPT_AT: &str = "/opt/beats";
const SCRIPT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t devtmpfs devtmpfs /dev
beat=0
while :; do
    beat=$((beat + 1))
    one=$(/opt/pair 2>&1)
    many=$(/opt/pair load 1 1 2>&1 | tail -n 1)
    echo "beat $beat: ${one%%:*}: $many" >/dev/kmsg
done
"#;

/// What the guest needs beside the program that runs it, in the box.
pub struct Files {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// The module `pair` for it.
    pub module: String,
}

impl Files {
    /// Makes them for that kernel, and puts them into the box.
    ///
    /// # Panics
    ///
    /// If they can't be made.
    pub fn place(host: &HostBox, kernel: Kernel) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("vmpatch-other-vmm-{}-{number}", std::process::id()));
        fs::create_dir_all(&folder).expect("a folder can be made");
        let script = folder.join("beats");
        fs::write(&script, SCRIPT).expect("a file can be written");
        make_program(&script);
        let module = Modules::of(&kernel).applied(Applied::Pair);
        let programs = kit::guest(kernel.clone()).files;
        let mut files: Vec<ExtraFile> = programs.into_iter().filter(|file| file.guest == "/opt/pair").collect();
        files.push(ExtraFile {
            guest: SCRIPT_AT.to_owned(),
            host: script,
        });
        let initrd = folder.join("initrd");
        let archive = initramfs::build(&[], &files).expect("the initramfs can be made");
        fs::write(&initrd, archive).expect("a file can be written");
        let kernel = kernel.fetch().expect("the kernel can be had").vmlinuz;
        for file in [&kernel, &initrd, Path::new(&module)] {
            host.place(file).expect("the file is in the box");
        }
        // Where vmpatch has its locks.
        host.text(&["mkdir", "-p", "/run"])
            .expect("a folder can be made in the box");
        // It is in the box, and nobody else needs it.
        let _ = fs::remove_dir_all(&folder);
        Self { kernel, initrd, module }
    }

    /// A command line that begins with the script, for a program with a serial console.
    pub fn command_line() -> String {
        format!("console=ttyS0 rdinit={SCRIPT_AT} printk.devkmsg=on panic=-1 reboot=k")
    }
}

fn make_program(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("it is this user's");
}

/// A running guest. Every method panics if something is not as it must be.
pub struct OtherVmm<'a> {
    host: &'a HostBox,
    running: Running,
    in_box: PathBuf,
    console: String,
    /// The module `pair` for it.
    pub module: String,
    /// vmpatch, with `--pid`.
    pub vmpatch: Vmpatch,
}

impl<'a> OtherVmm<'a> {
    /// Starts the program with those words behind it, and waits until the guest has said something. `in_box` is the program of that
    /// name. Its standard input is a terminal, at which nobody types.
    ///
    /// # Panics
    ///
    /// If the guest says nothing.
    pub fn start(host: &'a HostBox, in_box: &Path, files: &Files, program: &Path, words: &[&str]) -> Self {
        for program in [program, in_box, vmpatch::program().expect("vmpatch builds")] {
            host.place_program(program).expect("the program is in the box");
        }
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        let console = format!("/tmp/{name}.console");
        host.text(&["touch", &console]).expect("a file can be made in the box");
        let script = r#"console="$1" && shift && exec "$@" 0<>/dev/ptmx >"$console" 2>&1"#;
        let program = program.to_string_lossy();
        let command = [&["sh", "-c", script, "sh", &console, &*program], words].concat();
        let running = host.spawn(&command).expect("the box starts a program");
        let vmpatch = Vmpatch::process(host, running.pid());
        let guest = Self {
            host,
            running,
            in_box: in_box.to_owned(),
            console,
            module: files.module.clone(),
            vmpatch,
        };
        guest.wait_for_beat(1, BOOT_LIMIT);
        guest
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.running.pid()
    }

    /// What the guest has said.
    pub fn console(&self) -> String {
        self.host.text(&["cat", &self.console]).expect("there is a console")
    }

    /// What the process has mapped.
    pub fn maps(&self) -> String {
        let path = format!("/proc/{}/maps", self.pid());
        self.host.text(&["cat", &path]).expect("it runs")
    }

    fn wait_for_beat(&self, wanted: u64, limit: Duration) -> (u64, Seen, Calls) {
        let began = Instant::now();
        loop {
            let console = self.console();
            if let Some(beat) = console.lines().rev().find_map(beat)
                && beat.0 >= wanted
            {
                return beat;
            }
            let ended = self.running.status().expect("the box answers");
            assert!(
                ended.is_none() && began.elapsed() < limit,
                "no beat {wanted} within {limit:?}, {ended:?}: {console}"
            );
            std::thread::sleep(LOOK_WAIT);
        }
    }

    /// What answers in the guest now: by a call that begins behind this, as the line after the next one tells. No call so far has
    /// found a mix, and no thread is held.
    #[track_caller]
    pub fn see(&self) -> Seen {
        let last = self.wait_for_beat(1, BEAT_LIMIT).0;
        let (_, seen, _) = self.wait_for_beat(last + 2, BEAT_LIMIT);
        let console = self.console();
        for (beat, _, calls) in console.lines().filter_map(beat) {
            assert_eq!((calls.mixed, calls.lost), (0, 0), "beat {beat}");
        }
        assert_eq!(complaints(&console), [""; 0], "{console}");
        self.assert_free();
        seen
    }

    /// No thread of the process is stopped or traced.
    #[track_caller]
    pub fn assert_free(&self) {
        let script = r#"cat /proc/"$1"/task/*/status | grep -e TracerPid -e State | sort -u"#;
        let pid = self.pid().to_string();
        let found = self.host.text(&["sh", "-c", script, "sh", &pid]).expect("it runs");
        assert!(
            // Any other state will do: one that waits for its terminal is in "disk sleep".
            found
                .lines()
                .all(|line| line.ends_with("\t0") || line.starts_with("State:") && !line.contains("stop")),
            "{found}"
        );
    }

    /// Applies and reverts, and looks after each. Gives how long each paused the guest, in microseconds.
    #[track_caller]
    pub fn cycle(&self) -> [u64; 2] {
        let applied = self.vmpatch.apply(&self.module);
        assert_eq!(self.see(), Seen::Fixed);
        let reverted = self.vmpatch.revert_all();
        assert_eq!(self.see(), Seen::Flawed);
        [applied, reverted].map(|report| crate::report::pause_us(&report, "total_us"))
    }

    /// Kills the command, or its supervisor, at that step, looks, and has the same command work.
    #[track_caller]
    pub fn cut_and_repeat(&self, command: Command, (call, nth, behind): Step, supervisor: bool) {
        let (pid, nth) = (self.pid().to_string(), nth.to_string());
        let (in_box, program) = (
            self.in_box.to_string_lossy(),
            vmpatch::program().expect("vmpatch builds"),
        );
        let program = program.to_string_lossy();
        let mut args = vec![&*in_box, "cut", &pid, call, &nth];
        args.extend(behind.then_some("--behind"));
        args.extend(supervisor.then_some("--supervisor"));
        args.extend(["--", &*program, "--pid", &pid, "--timeout", "60"]);
        let words: &[&str] = match command {
            Command::Apply => &["apply", &self.module],
            Command::Revert => &["revert", "--all"],
        };
        args.extend(words);
        let output = self
            .host
            .command(&args)
            .limit(PROGRAM_LIMIT)
            .run()
            .expect("the box answers");
        let context = format!("{command:?} {call} {nth} {behind} {supervisor}: {output:?}");
        let told: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{context}"));
        assert_eq!(
            (&told["held"], &told["reached"]),
            (&Value::Array(Vec::new()), &true.into()),
            "{context}"
        );
        let seen = self.see();
        println!("{command:?} killed at {call} {nth}, behind: {behind}, supervisor: {supervisor}: {seen:?}");
        if seen != command.aim() {
            self.vmpatch.run(words).expect(0);
            assert_eq!(self.see(), command.aim(), "{context}: once more");
        }
    }
}

impl Drop for OtherVmm<'_> {
    fn drop(&mut self) {
        // Where the box is gone, so is it.
        drop(self.running.kill());
    }
}

/// The script's line: its number, what one call found, and what many did.
fn beat(line: &str) -> Option<(u64, Seen, Calls)> {
    let (_, text) = line.trim_end().split_once("beat ")?;
    let mut parts = text.splitn(3, ": ");
    let number = parts.next()?.parse().ok()?;
    let seen = match parts.next()? {
        "fixed" => Seen::Fixed,
        "flawed" => Seen::Flawed,
        _ => return None,
    };
    Some((number, seen, Calls::of(parts.next()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_script_is_found_on_a_console() {
        let calls = Calls {
            old: 12,
            new: 3,
            ..Calls::default()
        };
        assert_eq!(
            beat("[   12.3] beat 7: fixed: old 12 new 3 mixed 0 lost 0\r"),
            Some((7, Seen::Fixed, calls))
        );
        assert_eq!(beat("[   12.3] beat 7: fixed: old 12 new"), None);
        assert_eq!(beat("[    0.1] smp: Brought up"), None);
    }
}
