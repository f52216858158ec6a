//! The new process's command line, made from the old one's.
//!
//! Options: QEMU's `qemu-options.hx`, `chardev/char.c`, `net/net.c` (7.2 and 10.0). An option that is not known here is carried over
//! unchanged, because it made this machine once. What two processes can't use at a time is changed, or refused by name.

mod character;
mod keyed;
mod network;
mod words;
mod written;

use crate::domains::names::Name;
use crate::domains::params::Params;
use keyed::Keyed;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use words::Word;

/// An option that keeps a guest where it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`-{option}` can't be carried over to another process: {reason}")]
pub struct Refused {
    /// The option, as on the command line.
    pub option: String,
    /// Why, and what to do.
    pub reason: String,
}

impl Refused {
    fn new(option: &str, value: &[u8], reason: &str) -> Self {
        let value = String::from_utf8_lossy(value);
        Self {
            option: format!("{option} {value}").trim_end().to_owned(),
            reason: reason.to_owned(),
        }
    }
}

/// A tap device that the old process holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tap {
    /// The network interface.
    pub(super) interface: String,
    /// The old process's descriptor.
    pub(super) descriptor: i32,
}

/// What the command line itself does not say.
#[derive(Debug, Clone)]
pub(super) struct Context {
    /// The machine type that runs, with its version.
    pub(super) machine: String,
    /// The old program.
    pub(super) old_program: PathBuf,
    /// The new one.
    pub(super) new_program: PathBuf,
    /// Folders with the new one's data (`-L`), in place of those on the command line.
    pub(super) data: Vec<PathBuf>,
    /// Tap devices.
    pub(super) taps: Vec<Tap>,
    /// The identity that a vmgenid device gives to the guest.
    pub(super) generation: Option<String>,
}

/// A command line for the new process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Rewritten {
    /// Its words, without the program's name and what says where the guest comes from.
    pub(super) words: Vec<OsString>,
    /// Its names in the file system.
    pub(super) names: Vec<Name>,
    /// Descriptors of the old process that the new one needs under the same numbers.
    pub(super) descriptors: Vec<i32>,
}

/// Options that vmpatch sets itself, or that say what happens before a guest runs.
const DROPPED: [&str; 5] = ["incoming", "S", "daemonize", "loadvm", "writeconfig"];
const CHROOT: &str = "its names mean something else in the old process than outside";
/// Options with a reason why they keep a guest where it is.
const REFUSED: [(&str, &str); 12] = [
    ("chroot", CHROOT),
    (
        "snapshot",
        "its disks' changes are in files of the old process that have no name",
    ),
    (
        "readconfig",
        "what such a file sets can't be changed yet; put its options on the command line",
    ),
    ("preconfig", "the machine was set up through QMP"),
    ("nographic", "the old process has the terminal"),
    ("curses", "the old process has the terminal"),
    ("sdl", "the old process has the window"),
    (
        "s",
        "the old process has the TCP port; use -gdb unix:PATH,server=on,wait=off",
    ),
    ("xen-attach", "Xen guests are not supported"),
    ("tpmdev", "the TPM's state is in a process that serves only the old one"),
    ("virtfs", "files that the guest has open are open in the old process"),
    (
        "net",
        "this old form can't be told apart; use -netdev, -nic or -net none",
    ),
];

/// The options of a command line that have an argument, each with it; an image without an option is one of `drive`.
pub(super) fn arguments(line: &[Vec<u8>]) -> Vec<(String, Vec<u8>)> {
    let argument = |word| match word {
        Word::Image(path) => Some(("drive".to_owned(), path)),
        Word::Option { name, value } => Some((name, value?)),
    };
    words::parse(line).into_iter().filter_map(argument).collect()
}

struct Rewriter<'a> {
    context: &'a Context,
    words: Vec<Word>,
    result: Rewritten,
    pinned: bool,
}

/// Makes the new command line. The old one's words begin with the program's name.
pub(super) fn rewrite(line: &[Vec<u8>], context: &Context) -> Result<Rewritten, Refused> {
    let mut rewriter = Rewriter {
        context,
        words: Vec::new(),
        result: Rewritten::default(),
        pinned: false,
    };
    for word in words::parse(line) {
        match word {
            Word::Image(_) => rewriter.words.push(word),
            Word::Option { name, value } => rewriter.option(&name, value)?,
        }
    }
    if !rewriter.pinned {
        let machine = format!("type={}", context.machine);
        rewriter.words.push(Word::with("machine", machine));
    }
    for folder in &context.data {
        rewriter.words.push(Word::with("L", folder.as_os_str().as_bytes()));
    }
    let Rewriter { words, mut result, .. } = rewriter;
    result.words = words::render(words);
    Ok(result)
}

impl Rewriter<'_> {
    fn option(&mut self, name: &str, value: Option<Vec<u8>>) -> Result<(), Refused> {
        if DROPPED.contains(&name) {
            return Ok(());
        }
        let text = value.clone().unwrap_or_default();
        let refuse = |reason: &str| Err(Refused::new(name, &text, reason));
        if let Some((_, reason)) = REFUSED.iter().find(|(option, _)| *option == name)
            && text != b"none"
        {
            return refuse(reason);
        }
        written::check(name, &text)?;
        let value = match name {
            "machine" | "M" => Some(self.machine(&text)),
            "pidfile" => Some(self.name(name, &text, &text)?),
            "L" => match self.data_folder(&text) {
                Some(folder) => Some(folder),
                None => return Ok(()),
            },
            "display" if !shows_nothing(&text) => return refuse("the old process has the window"),
            "vnc" => Some(self.vnc(&text)?),
            "spice" => Some(self.spice(&text)?),
            "qmp" | "qmp-pretty" | "monitor" | "serial" | "parallel" | "debugcon" | "gdb" => {
                Some(self.device_text(name, &text)?)
            }
            "chardev" => Some(self.chardev(name, &text)?),
            "netdev" | "nic" => Some(self.network(name, &text)?),
            "net" => Some(text.clone()),
            "device" => {
                check_device(name, &text)?;
                Some(self.device(&text))
            }
            "drive" if Params::parse(&text, None).is_on("snapshot", false) => {
                return refuse("its changes are in a file of the old process that has no name");
            }
            "add-fd" => {
                let number = Params::parse(&text, None).text("fd").unwrap_or_default();
                self.hand_on(name, &text, &number)?;
                value
            }
            // The new process begins as the user that the old one runs as, and opens files with no other rights.
            "runas" => return Ok(()),
            "run-with" => match run_with(&text)? {
                Some(rest) => Some(rest),
                None => return Ok(()),
            },
            _ => value,
        };
        self.words.push(Word::Option {
            name: name.to_owned(),
            value,
        });
        Ok(())
    }

    /// The machine type as it runs: an alias such as `q35` means another one in another QEMU.
    fn machine(&mut self, text: &[u8]) -> Vec<u8> {
        let mut params = Params::parse(text, Some("type"));
        if params.get("type").is_some() {
            params.replace("type", self.context.machine.as_bytes());
            self.pinned = true;
        }
        params.render()
    }

    /// A device with the identity that it gives to the guest, which `auto` chooses anew each time: a guest that sees another one takes itself
    /// for a copy.
    fn device(&self, text: &[u8]) -> Vec<u8> {
        let mut device = Keyed::parse(text, "driver");
        match &self.context.generation {
            Some(generation) if device.text("driver").as_deref() == Some("vmgenid") => {
                device.set("guid", generation);
                device.render()
            }
            _ => text.to_vec(),
        }
    }

    /// A temporary name for a path, noted down.
    fn name(&mut self, option: &str, text: &[u8], path: &[u8]) -> Result<Vec<u8>, Refused> {
        let name = Name::of(Path::new(OsStr::from_bytes(path)));
        if !name.fits() {
            return Err(Refused::new(
                option,
                text,
                "its path has no room for the suffix ~vmpatch of its temporary name",
            ));
        }
        let temporary = name.temporary.as_os_str().as_bytes().to_vec();
        self.result.names.push(name);
        Ok(temporary)
    }

    /// A descriptor that the new process inherits as the old one did.
    fn hand_on(&mut self, option: &str, text: &[u8], number: &str) -> Result<(), Refused> {
        match number.parse() {
            Ok(number) if number > 2 => self.result.descriptors.push(number),
            _ => {
                return Err(Refused::new(
                    option,
                    text,
                    "it names no descriptor that can be handed on",
                ));
            }
        }
        Ok(())
    }

    /// A folder of the old program's installation is replaced by the same of the new one's, or left out: its firmware
    /// belongs to that version. Any other stays. None where the caller says which folders to use.
    fn data_folder(&self, text: &[u8]) -> Option<Vec<u8>> {
        let Context {
            old_program,
            new_program,
            data,
            ..
        } = self.context;
        let folder = Path::new(OsStr::from_bytes(text));
        let (old, new) = (installation(old_program), installation(new_program));
        if !data.is_empty() {
            return None;
        }
        match old
            .filter(|old| Some(*old) != new)
            .and_then(|old| folder.strip_prefix(old).ok())
        {
            None => Some(text.to_vec()),
            Some(rest) => {
                let same = new?.join(rest);
                same.is_dir().then(|| same.into_os_string().as_bytes().to_vec())
            }
        }
    }

    fn vnc(&mut self, text: &[u8]) -> Result<Vec<u8>, Refused> {
        let Some(path) = text.strip_prefix(b"unix:") else {
            let is_off = text == b"none" || text.starts_with(b"none,");
            let reason = "the old process has the TCP port; use -vnc unix:PATH";
            return is_off.then(|| text.to_vec()).ok_or(Refused::new("vnc", text, reason));
        };
        let end = path.iter().position(|byte| *byte == b',').unwrap_or(path.len());
        let (path, options) = path.split_at(end);
        let temporary = self.name("vnc", text, path)?;
        Ok([b"unix:", temporary.as_slice(), options].concat())
    }

    fn spice(&mut self, text: &[u8]) -> Result<Vec<u8>, Refused> {
        let mut params = Params::parse(text, None);
        let path = params.get("addr").map(<[u8]>::to_vec);
        let ports = ["port", "tls-port"].iter().any(|key| params.get(key).is_some());
        match path {
            Some(path) if params.is_on("unix", false) && !ports => {
                let temporary = self.name("spice", text, &path)?;
                params.replace("addr", &temporary);
                Ok(params.render())
            }
            _ => Err(Refused::new(
                "spice",
                text,
                "the old process has the TCP port; use unix=on,addr=PATH",
            )),
        }
    }
}

/// Devices that no stream can carry, or whose backend serves one process alone. All others QEMU itself knows.
fn check_device(option: &str, text: &[u8]) -> Result<(), Refused> {
    let device = Keyed::parse(text, "driver");
    let driver = device.text("driver").unwrap_or_default();
    let reason = match driver.as_str() {
        _ if driver.starts_with("vfio-") => "a device of the host that was given to the guest stays with its process",
        "usb-host" => "a device of the host that was given to the guest stays with its process",
        _ if driver.starts_with("vhost-user-") => "its backend serves one process alone",
        _ if driver.starts_with("vhost-vdpa") => "its backend serves one process alone",
        _ if driver.starts_with("vhost-vsock-") => "the old process has its context id",
        _ if device.keys().iter().any(|key| key == "vhostfd") => "its descriptor belongs to the old process",
        _ => return Ok(()),
    };
    Err(Refused::new(option, text, reason))
}

/// `-run-with` without the user: see `runas`. None where nothing else is in it.
fn run_with(text: &[u8]) -> Result<Option<Vec<u8>>, Refused> {
    let mut params = Params::parse(text, None);
    if params.get("chroot").is_some() {
        return Err(Refused::new("run-with", text, CHROOT));
    }
    params.remove("user");
    let is_empty = params.keys().next().is_none();
    Ok((!is_empty).then(|| params.render()))
}

fn shows_nothing(display: &[u8]) -> bool {
    let params = Params::parse(display, Some("type"));
    let kind = params.text("type").unwrap_or_default();
    matches!(kind.as_str(), "none" | "egl-headless" | "vnc")
}

/// The folder that a program was installed under: `/usr` for `/usr/bin/qemu-system-x86_64`.
fn installation(program: &Path) -> Option<&Path> {
    program.parent()?.parent().filter(|folder| folder.parent().is_some())
}

#[cfg(test)]
mod tests;
