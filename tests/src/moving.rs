//! What the tests of `vmpatch upgrade` share: processes that wait for a guest, what a move leaves, and that no QEMU outlives its test.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use images::guest::{Guest, GuestConfig, Ram};
use serde_json::{Value, json};

use crate::monitor::Monitor;

/// The QEMU that this machine has.
pub const INSTALLED: &str = "/usr/bin/qemu-system-x86_64";
/// How long something may take to show on the host.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two looks.
const POLL: Duration = Duration::from_millis(5);
/// Ends every QEMU that was started to get the guest NAME, when its standard input does. A test that was killed says nothing before that, and a
/// vmpatch of its may be at work still.
const KEEPER: &str = r#"
    if read -r _; then rounds=1; else rounds=5; fi
    while [ "$rounds" -gt 0 ]; do
        for process in /proc/[0-9]*; do
            words=$(tr '\0' '\n' <"$process/cmdline" | grep -xe "guest=$NAME" -e -incoming)
            case $words in guest=*-incoming*) kill -KILL "${process#/proc/}" ;; esac
        done
        rounds=$((rounds - 1))
        [ "$rounds" = 0 ] || sleep 1
    done 2>/dev/null
"#;

/// Ends the QEMUs that vmpatch has started for one guest when it is dropped, or its test killed: they are nobody's children.
pub struct Keeper(Child);

impl Keeper {
    /// For the guest, which has the default spelling of its name.
    ///
    /// # Panics
    ///
    /// If it does not start.
    pub fn of(guest: &Guest) -> Self {
        use std::os::unix::process::CommandExt;
        let mut shell = Command::new("sh");
        // The name is in no command line but QEMU's, and Ctrl-C ends the test alone.
        shell.args(["-c", KEEPER]).env("NAME", guest.name()).process_group(0);
        Self(shell.stdin(Stdio::piped()).spawn().expect("there is a shell"))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            drop(stdin.write_all(b"now\n"));
        }
        drop(self.0.wait());
    }
}

/// A file for a guest's RAM, which both processes map; removed when it is dropped.
pub struct RamFile(PathBuf);

impl RamFile {
    /// For the next guest of this program.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        Self(format!("/dev/shm/vmpatch-ram-{}-{number}", std::process::id()).into())
    }

    /// A guest with its RAM there.
    pub fn fit(&self, mut config: GuestConfig) -> GuestConfig {
        let (size, path) = (config.memory_mib, self.0.display());
        let backend = format!("memory-backend-file,id=file0,size={size}M,share=on,mem-path={path}");
        config.ram = Ram::Private;
        config.machine = format!("{},memory-backend=file0", config.machine);
        config.qemu_arg("-object").qemu_arg(&backend)
    }
}

impl Default for RamFile {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for RamFile {
    fn drop(&mut self) {
        drop(fs::remove_file(&self.0));
    }
}

/// All QEMU processes with that guest, whether they have it or wait for it.
pub fn processes_of(name: &str) -> Vec<u32> {
    with_words(&[&format!("guest={name}")])
}

/// Processes that wait for that guest.
pub fn successors(name: &str) -> Vec<u32> {
    with_words(&[&format!("guest={name}"), "-incoming"])
}

fn with_words(wanted: &[&str]) -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let has = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|byte| *byte == 0);
        wanted.iter().all(|wanted| words.any(|word| word == wanted.as_bytes()))
    };
    pids.filter(has).collect()
}

/// Names beside the guest's own that a move should have taken away.
pub fn temporary_names(guest: &Guest) -> Vec<String> {
    let names = fs::read_dir(guest.folder()).into_iter().flatten().flatten();
    let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.ends_with("~vmpatch")).collect()
}

/// Waits until there is something to see.
///
/// # Panics
///
/// If there never is.
#[track_caller]
pub fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < end, "it did not happen");
        sleep(POLL);
    }
}

/// Waits until some of the guest's memory is in the new process, and more is not.
///
/// # Panics
///
/// If that never comes, or is over.
#[track_caller]
pub fn wait_for_way(guest: &Guest) {
    let mut monitor = Monitor::second(guest);
    wait_for(|| {
        let sent = monitor
            .call("query-migrate", json!({}))
            .expect("QEMU tells how far it is");
        let bytes = sent.pointer("/ram/transferred").and_then(Value::as_u64);
        let under_way = sent["status"] == "active" && bytes.is_some_and(|bytes| bytes > 1 << 20);
        under_way.then_some(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_is_to_get_a_guest_ends_with_its_keeper_and_the_guests_own_does_not() {
        let guest = Guest::start(GuestConfig::without_kernel().qemu_arg("-S")).unwrap();
        let name = guest.name().to_owned();
        let keeper = Keeper::of(&guest);
        let mut other = Command::new(INSTALLED);
        let line = format!("guest={name}");
        other.args([
            "-nodefaults",
            "-display",
            "none",
            "-S",
            "-name",
            &line,
            "-incoming",
            "defer",
        ]);
        let mut other = other.spawn().unwrap();
        wait_for(|| (successors(&name) == [other.id()]).then_some(()));
        assert_eq!(processes_of(&name).len(), 2);
        drop(keeper);
        assert!(!other.wait().unwrap().success());
        assert_eq!(processes_of(&name), [guest.pid()]);
    }
}
