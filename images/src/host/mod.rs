//! The machine that QEMU and vmpatch run on: this one, or a host in a box.

mod libraries;
mod process;
mod this;

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output};
use std::thread;
use std::time::{Duration, Instant};

pub use libraries::libraries;
pub use this::ThisMachine;

/// How often to look whether a program has ended.
const POLL: Duration = Duration::from_millis(10);

/// A machine that programs run on, as root. Paths are that machine's; only what is to be placed is read from this one.
pub trait Host: fmt::Debug + Send + Sync {
    /// Sees to it that a file of this machine is on that one, too, under the same absolute path.
    fn place(&self, file: &Path) -> io::Result<()>;

    /// The same for a program, with the libraries that it needs.
    fn place_program(&self, program: &Path) -> io::Result<()>;

    /// Runs the program `args[0]` in `folder`, without input, to its end. An exit status other than 0 is no error.
    fn output(&self, args: &[&str], folder: &Path) -> io::Result<Output>;

    /// Starts a program; what it writes goes to the file `log`.
    fn start(&self, program: &Path, args: &[String], log: &Path) -> io::Result<Box<dyn Process>>;

    /// Connects to a socket.
    fn connect(&self, socket: &Path) -> io::Result<UnixStream>;

    /// Makes a new folder of that name for the files of one guest.
    fn make_folder(&self, name: &str) -> io::Result<PathBuf>;

    /// Removes a folder with all that is in it.
    fn remove_folder(&self, folder: &Path) -> io::Result<()>;

    /// Reads a whole file.
    fn read(&self, file: &Path) -> io::Result<Vec<u8>>;

    /// Makes a file of these bytes.
    fn write(&self, file: &Path, bytes: &[u8]) -> io::Result<()>;

    /// How many times longer than on this machine things may take there.
    fn slowness(&self) -> u32;
}

/// A program that a [`Host`] started; dropped, it is killed.
pub trait Process: fmt::Debug + Send + Sync {
    /// Its process id on that machine.
    fn pid(&self) -> u32;

    /// From here on, this is the process `pid`, which has taken the program's place.
    fn follow(&mut self, pid: u32);

    /// How it ended, or `None` while it runs. How a process ended that was followed is not known.
    fn ended(&self) -> io::Result<Option<ExitStatus>>;

    /// Waits for its end, `None` if that does not come in time.
    fn wait(&self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + limit;
        loop {
            let ended = self.ended()?;
            if ended.is_some() || Instant::now() >= deadline {
                return Ok(ended);
            }
            thread::sleep(POLL);
        }
    }
}
