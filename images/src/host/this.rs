//! The machine that this program runs on.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use super::process::Child;
use super::{Host, Process};

/// What the names of guests' folders begin with; the number of the process that made it comes next.
const PREFIX: &str = "vmpatch-guest-";

/// This machine.
#[derive(Clone, Copy, Debug)]
pub struct ThisMachine;

impl Host for ThisMachine {
    fn place(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn place_program(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn output(&self, args: &[&str], folder: &Path) -> io::Result<Output> {
        let (program, args) = args
            .split_first()
            .ok_or_else(|| io::Error::other("a command without program"))?;
        let mut command = Command::new(program);
        command.args(args).current_dir(folder).stdin(Stdio::null()).output()
    }

    fn start(&self, program: &Path, args: &[String], log: &Path) -> io::Result<Box<dyn Process>> {
        Ok(Box::new(Child::start(program, args, log)?))
    }

    fn connect(&self, socket: &Path) -> io::Result<UnixStream> {
        UnixStream::connect(socket)
    }

    /// In the folder for temporary files. What programs left there that were killed is removed first.
    fn make_folder(&self, name: &str) -> io::Result<PathBuf> {
        let parent = std::env::temp_dir();
        remove_leftovers(&parent);
        let folder = parent.join(format!("{PREFIX}{name}"));
        fs::create_dir(&folder)?;
        Ok(folder)
    }

    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        fs::remove_dir_all(folder)
    }

    fn read(&self, file: &Path) -> io::Result<Vec<u8>> {
        fs::read(file)
    }

    fn write(&self, file: &Path, bytes: &[u8]) -> io::Result<()> {
        fs::write(file, bytes)
    }

    fn slowness(&self) -> u32 {
        1
    }
}

/// Removes the folders of processes that no longer exist. One that can't be removed harms nobody.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let owner = entry.file_name().to_str().and_then(owner);
        if owner.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

/// The process that made the folder of this name.
fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guests_folder_names_an_owner() {
        assert_eq!(owner("vmpatch-guest-17-0"), Some(17));
        assert_eq!(owner("vmpatch-guest-x-0"), None);
        assert_eq!(owner("other-17-0"), None);
    }
}
