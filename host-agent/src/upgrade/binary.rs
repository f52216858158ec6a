//! A QEMU program: what version it is.

use super::owner::Owner;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a program may take to say its version: QEMU takes 30 ms.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(10);
/// Between two looks whether it has ended.
const POLL: Duration = Duration::from_millis(2);
/// What a QEMU's answer begins with (`system/vl.c`, QEMU 2.0 to 10.0).
const ANSWER: &str = "QEMU emulator version ";

/// Why a program can't take the guest.
#[derive(Debug, thiserror::Error)]
pub enum BinaryError {
    /// It can't be started.
    #[error("{path} can't be started")]
    Start {
        /// The program.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is another program.
    #[error("{path} is not a QEMU system emulator: `--version` answered {answer:?} ({status})")]
    NotQemu {
        /// The program.
        path: PathBuf,
        /// The first line that it wrote.
        answer: String,
        /// How it ended.
        status: String,
    },
    /// It did not answer.
    #[error("{path} did not answer `--version` within {} s", ANSWER_TIME_MAX.as_secs())]
    Unresponsive {
        /// The program.
        path: PathBuf,
    },
}

/// Major, minor, micro.
pub type Version = (u64, u64, u64);

/// Asks a program for its version.
pub fn version(path: &Path) -> Result<Version, BinaryError> {
    ask(Command::new(path), path)
}

/// Asks a program that a user chose for its version, with that user's rights. Only root can start programs as another one.
pub(super) fn version_as(owner: &Owner, path: &Path) -> Result<Version, BinaryError> {
    let mut command = Command::new(path);
    owner.own(&mut command);
    ask(command, path)
}

/// The machine types that a QEMU knows; none where it does not say.
pub(super) fn machines(path: &Path) -> Vec<String> {
    let mut command = Command::new(path);
    let answer = answer(command.args(["-machine", "help"]), path);
    answer.map_or_else(|_| Vec::new(), |(text, _)| parse_machines(&text))
}

/// The machine types of the same kind as `machine`: those that differ in the version at its end.
pub(super) fn of_the_kind<'a>(machine: &str, all: &'a [String]) -> Vec<&'a str> {
    let kind = |name: &str| name.rsplit_once('-').map(|(kind, _)| kind.to_owned());
    let wanted = kind(machine);
    all.iter()
        .map(String::as_str)
        .filter(|name| kind(name) == wanted)
        .collect()
}

fn ask(mut command: Command, path: &Path) -> Result<Version, BinaryError> {
    let (text, status) = answer(command.arg("--version"), path)?;
    let line = text.lines().next().unwrap_or_default();
    parse(line).ok_or_else(|| BinaryError::NotQemu {
        path: path.to_owned(),
        answer: line.chars().take(80).collect(),
        status,
    })
}

/// What a program writes, and how it ends.
fn answer(command: &mut Command, path: &Path) -> Result<(String, String), BinaryError> {
    let failed = |source| BinaryError::Start {
        path: path.to_owned(),
        source,
    };
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(failed)?;
    let end = Instant::now() + ANSWER_TIME_MAX;
    // Its answer fits into the pipe, so it ends without being read; a program that writes more is none that is wanted.
    while child.try_wait().map_err(failed)?.is_none() {
        if Instant::now() >= end {
            let _ = child.kill();
            let _ = child.wait();
            return Err(BinaryError::Unresponsive { path: path.to_owned() });
        }
        std::thread::sleep(POLL);
    }
    let output = child.wait_with_output().map_err(failed)?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok((text, output.status.to_string()))
}

/// A heading, then a line for each: `pc-q35-9.2           Standard PC (Q35 + ICH9, 2009)` (`system/vl.c`, `machine_help_func`).
fn parse_machines(text: &str) -> Vec<String> {
    let names = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    names.map(str::to_owned).collect()
}

/// `QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)`.
fn parse(answer: &str) -> Option<Version> {
    let version = answer.strip_prefix(ANSWER)?.split(' ').next()?;
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??, numbers.next()??))
}

/// As people write it.
pub fn spell((major, minor, micro): Version) -> String {
    format!("{major}.{minor}.{micro}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_read_with_or_without_a_distributions_own() {
        assert_eq!(
            parse("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)"),
            Some((7, 2, 22))
        );
        assert_eq!(parse("QEMU emulator version 11.1.0"), Some((11, 1, 0)));
        for other in [
            "",
            "qemu-img version 10.0.2",
            "QEMU emulator version x.y.z",
            "QEMU emulator version 10",
        ] {
            assert_eq!(parse(other), None, "{other}");
        }
    }

    #[test]
    fn machine_types_of_one_kind_are_listed() {
        // QEMU 10.0.2, shortened.
        let text = "Supported machines are:\nmicrovm              microvm (i386)\npc                   Standard PC (alias of pc-i440fx-10.0)\n\
                    pc-i440fx-10.0       Standard PC (default)\npc-q35-9.2           Standard PC\npc-q35-10.0          Standard PC\n";
        let all = parse_machines(text);
        assert_eq!(all.len(), 5);
        assert_eq!(of_the_kind("pc-q35-11.1", &all), ["pc-q35-9.2", "pc-q35-10.0"]);
        assert_eq!(of_the_kind("xenpv", &all), ["microvm", "pc"]);
    }

    #[test]
    fn a_program_that_is_missing_or_another_one_is_named() {
        let missing = version(Path::new("/no/such/program")).unwrap_err();
        assert_eq!(missing.to_string(), "/no/such/program can't be started");
        let other = version(Path::new("/bin/true")).unwrap_err();
        assert!(other.to_string().starts_with("/bin/true is not a QEMU"), "{other}");
    }
}
