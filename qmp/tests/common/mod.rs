//! A real QEMU for a test: firmware only, or halted before its first instruction; killed when the test ends.
#![allow(dead_code, reason = "every test file uses its own part of this")]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// How long QEMU may take to open its QMP socket, in seconds: it takes 0.2 on an idle machine, a loaded CI is slower.
const START_TIMEOUT_S: u64 = 60;

/// How long a test waits for anything else that QEMU does, in seconds.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// A directory of its own, removed when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "qmp-test-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A running QEMU.
pub struct Qemu {
    child: Child,
    dir: TempDir,
}

impl Qemu {
    /// Starts a machine with 64 MiB of RAM and nothing in it but `extra`.
    pub fn start(extra: &[&str]) -> Self {
        Self::try_start(extra).unwrap()
    }

    /// As [`Qemu::start`], with other options where QEMU does not know the first.
    pub fn start_else(extra: &[&str], otherwise: &[&str]) -> Self {
        Self::try_start(extra).or_else(|_| Self::try_start(otherwise)).unwrap()
    }

    fn try_start(extra: &[&str]) -> Result<Self, String> {
        let dir = TempDir::new();
        let socket = dir.path().join("q");
        // Another version of QEMU may be tried: QEMU=/path/to/it cargo test -p qmp
        let binary = std::env::var_os("QEMU").unwrap_or_else(|| "qemu-system-x86_64".into());
        let child = Command::new(binary)
            .args(["-nodefaults", "-display", "none", "-m", "64", "-accel", "tcg"])
            .args(extra)
            // Last: once it is there, so are the sockets of `extra`.
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .map_err(|cause| format!("cannot start QEMU: {cause}"))?;
        let mut qemu = Self { child, dir };
        let deadline = Instant::now() + Duration::from_secs(START_TIMEOUT_S);
        // The file is there a moment before QEMU listens on it.
        while UnixStream::connect(&socket).is_err() {
            if let Ok(Some(status)) = qemu.child.try_wait() {
                return Err(format!("QEMU ended: {status}"));
            }
            if Instant::now() > deadline {
                return Err(format!("QEMU did not open its QMP socket in {START_TIMEOUT_S} s"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(qemu)
    }

    pub fn qmp(&self) -> PathBuf {
        self.dir.path().join("q")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal by its short name; STOP makes QEMU deaf until CONT.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill")
            .args(["-s", name, &self.pid().to_string()])
            .status()
            .unwrap();
        assert!(sent.success());
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.kill();
    }
}
