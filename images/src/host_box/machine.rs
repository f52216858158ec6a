//! A box as a machine: what is done there is done by commands over its channel.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::channel::{Client, Request, Running};
use crate::guest::Guest;
use crate::host::{self, Host, Process};

/// Where guests of the box have their files.
const RUN: &str = "/run";
/// How long a program of the box may take. vmpatch itself gives up earlier.
const PROGRAM_LIMIT: Duration = Duration::from_secs(300);
/// How many times longer than here things may take: booting a guest takes about four times as long, and this is for a busy host.
const SLOWNESS: u32 = 6;

/// A guest of this machine in which programs run as on a machine.
#[derive(Debug)]
pub(super) struct Machine {
    guest: Guest,
    /// What has been placed.
    placed: Mutex<BTreeSet<PathBuf>>,
}

impl Machine {
    /// What the guest was given for its boot is there already.
    pub(super) fn new(guest: Guest) -> Self {
        let given = guest
            .config()
            .files
            .iter()
            .filter(|file| Path::new(&file.guest) == file.host);
        let placed = given.map(|file| file.host.clone()).collect();
        Self {
            guest,
            placed: Mutex::new(placed),
        }
    }

    pub(super) fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Runs a command that must succeed.
    fn command(&self, args: &[&str], input: Vec<u8>) -> io::Result<Vec<u8>> {
        let request = self.guest.command(args).stdin(input).limit(PROGRAM_LIMIT);
        let output = request.run().map_err(io::Error::other)?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let words = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        let kind = if words.contains("No such file") {
            io::ErrorKind::NotFound
        } else {
            io::ErrorKind::Other
        };
        Err(io::Error::new(kind, words))
    }
}

impl Host for Machine {
    fn place(&self, file: &Path) -> io::Result<()> {
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        if placed.contains(file) {
            return Ok(());
        }
        let mode = fs::metadata(file)?.permissions().mode() & 0o777;
        // Renamed into its place: a program that runs may have mapped an older file of that name.
        let script = r#"mkdir -p "${1%/*}" && cat >"$1.new" && chmod "$2" "$1.new" && mv "$1.new" "$1""#;
        let (path, mode) = (file.to_string_lossy(), format!("{mode:o}"));
        self.command(&["sh", "-c", script, "place", &path, &mode], fs::read(file)?)?;
        placed.insert(file.to_owned());
        Ok(())
    }

    fn place_program(&self, program: &Path) -> io::Result<()> {
        let libraries = host::libraries(program).map_err(io::Error::other)?;
        libraries.iter().try_for_each(|library| self.place(library))?;
        self.place(program)
    }

    fn output(&self, args: &[&str], folder: &Path) -> io::Result<Output> {
        let script = r#"cd "$1" && shift && exec "$@""#;
        let folder = folder.to_string_lossy();
        let args = [&["sh", "-c", script, "sh", &folder], args].concat();
        let request = self.guest.command(&args).limit(PROGRAM_LIMIT);
        request.run().map_err(io::Error::other)
    }

    fn start(&self, program: &Path, args: &[String], log: &Path) -> io::Result<Box<dyn Process>> {
        let script = r#"log="$1" && shift && exec "$@" >"$log" 2>&1"#;
        let (program, log) = (program.to_string_lossy(), log.to_string_lossy());
        let mut command = vec!["sh", "-c", script, "sh", &log, &program];
        command.extend(args.iter().map(String::as_str));
        let running = self.guest.spawn(&command).map_err(io::Error::other)?;
        Ok(Box::new(BoxProcess {
            client: self.guest.client().clone(),
            running,
            follower: None,
        }))
    }

    fn connect(&self, socket: &Path) -> io::Result<UnixStream> {
        let socket = socket.to_string_lossy();
        self.guest.client().connect(&socket).map_err(io::Error::other)
    }

    fn make_folder(&self, name: &str) -> io::Result<PathBuf> {
        let folder = Path::new(RUN).join(format!("guest-{name}"));
        self.command(&["mkdir", "-p", &folder.to_string_lossy()], Vec::new())?;
        Ok(folder)
    }

    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        self.command(&["rm", "-rf", &folder.to_string_lossy()], Vec::new())?;
        Ok(())
    }

    fn read(&self, file: &Path) -> io::Result<Vec<u8>> {
        self.command(&["cat", &file.to_string_lossy()], Vec::new())
    }

    fn write(&self, file: &Path, bytes: &[u8]) -> io::Result<()> {
        let script = r#"cat >"$1""#;
        let args = ["sh", "-c", script, "write", &file.to_string_lossy()];
        self.command(&args, bytes.to_vec()).map(drop)
    }

    fn slowness(&self) -> u32 {
        SLOWNESS
    }
}

/// A program in the box; dropped, it is killed.
#[derive(Debug)]
struct BoxProcess {
    client: Client,
    running: Running,
    /// A process that has taken the program's place.
    follower: Option<u32>,
}

impl BoxProcess {
    /// Whether a command in the box succeeds.
    fn succeeds(&self, args: &[&str]) -> io::Result<bool> {
        let output = Request::new(&self.client, args).run().map_err(io::Error::other)?;
        Ok(output.status.success())
    }
}

impl Process for BoxProcess {
    fn pid(&self) -> u32 {
        self.follower.unwrap_or_else(|| self.running.pid())
    }

    fn follow(&mut self, pid: u32) {
        self.follower = Some(pid);
    }

    fn ended(&self) -> io::Result<Option<ExitStatus>> {
        match self.follower {
            None => self.running.status().map_err(io::Error::other),
            // A process that has ended, and is not waited for, has no arguments any more.
            Some(pid) => {
                let runs = self.succeeds(&["grep", "-q", ".", &format!("/proc/{pid}/cmdline")])?;
                Ok((!runs).then(ExitStatus::default))
            }
        }
    }
}

impl Drop for BoxProcess {
    fn drop(&mut self) {
        // Where the box is gone, so are its processes.
        if let Some(pid) = self.follower {
            drop(self.succeeds(&["kill", "-KILL", &pid.to_string()]));
        }
        if matches!(self.running.status(), Ok(None)) {
            drop(self.running.kill());
        }
    }
}
