//! What a QEMU command line says about the guest's name and its QMP monitors.
//!
//! Options: QEMU's `qemu-options.hx`, `system/vl.c` and `monitor/monitor.c` (10.0).

use super::address::{QmpAddress, chardev_of_device};
use super::config;
use super::params::Params;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Options without an argument. Any other takes the next word, whatever it looks like, so that a guest kernel's
/// command line (`-append`) is never read as options. QEMU 10.0 first, then those of older releases (2.0 to 9.2).
pub(crate) const WITHOUT_ARGUMENT: &str = "\
    h help version mem-prealloc snapshot usb nographic full-screen win2k-hack no-fd-bootchk preconfig S s enable-kvm \
    xen-attach xen-domid-restrict no-reboot no-shutdown daemonize only-migratable nodefaults semihosting old-param \
    no-user-config enable-sync-profile perfmap jitdump \
    alt-grab async-teardown audio-help ctrl-grab curses enable-fips enable-hax localtime no-acpi no-frame no-hpet \
    no-kvm no-kvm-irqchip no-kvm-pit no-kvm-pit-reinjection no-quit nodefconfig portrait rtc-td-hack sdl show-cursor \
    singlestep std-vga tdf xen-create";

/// The chardev that libvirt gives its own monitor (libvirt's `src/qemu/qemu_command.c`, 0.8 to 11).
const LIBVIRT_CHARDEV: &[u8] = b"charmonitor";

/// What matters here of a command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CommandLine {
    /// The guest's name, of `-name`.
    pub(super) name: Option<String>,
    /// The guest's UUID, of `-uuid`, as spelled there.
    pub(super) uuid: Option<String>,
    /// The monitors in control mode, that is QMP, in the order given.
    pub(super) monitors: Vec<Monitor>,
    /// Whether QEMU made itself a daemon, and left its working folder for `/`.
    pub(super) daemonized: bool,
    /// Whether QEMU changed its root folder after it had made its sockets.
    pub(super) chrooted: bool,
    /// The files with more options, of `-readconfig`.
    pub(super) configs: Vec<PathBuf>,
}

/// A QMP monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Monitor {
    pub(super) address: QmpAddress,
    /// Whether it is the one through which libvirt runs the guest.
    pub(super) libvirt: bool,
    /// Whether it spreads each message over several lines.
    pub(super) pretty: bool,
}

/// What is collected on the way: a monitor may come before the chardev that it names.
struct Parser<'a> {
    line: CommandLine,
    chardevs: Vec<(Vec<u8>, Params)>,
    /// Of each monitor in control mode the chardev's id, and whether it is a pretty one.
    controls: Vec<(Vec<u8>, bool)>,
    /// How many monitors came in the short form, which numbers its chardevs.
    short_monitors: usize,
    read_config: &'a dyn Fn(&Path) -> Option<Vec<u8>>,
}

impl CommandLine {
    /// Reads the words of a command line, the program's name first. `read_config` gives what is in a file with more
    /// options, which count where the file is named.
    pub(super) fn parse<'a>(
        words: impl IntoIterator<Item = &'a [u8]>,
        read_config: &dyn Fn(&Path) -> Option<Vec<u8>>,
    ) -> Self {
        let mut parser = Parser {
            line: Self::default(),
            chardevs: Vec::new(),
            controls: Vec::new(),
            short_monitors: 0,
            read_config,
        };
        let mut words = words.into_iter().skip(1);
        while let Some(word) = words.next() {
            // A word that is not an option is a disk image.
            let Some(option) = word.strip_prefix(b"-") else {
                continue;
            };
            let option = option.strip_prefix(b"-").unwrap_or(option);
            let option = str::from_utf8(option).unwrap_or_default();
            if WITHOUT_ARGUMENT.split(' ').any(|known| known == option) {
                parser.line.daemonized |= option == "daemonize";
            } else if let Some(argument) = words.next() {
                parser.option(option, argument);
            }
        }
        parser.finish()
    }
}

impl Parser<'_> {
    fn option(&mut self, option: &str, argument: &[u8]) {
        match option {
            "name" => self.group("name", Params::parse(argument, Some("guest"))),
            "chardev" => self.group("chardev", Params::parse(argument, Some("backend"))),
            "mon" => self.group("mon", Params::parse(argument, Some("chardev"))),
            "run-with" => self.group("run-with", Params::parse(argument, None)),
            "uuid" => self.line.uuid = Some(String::from_utf8_lossy(argument).into_owned()),
            "chroot" => self.line.chrooted = true,
            "qmp" | "qmp-pretty" => {
                let id = self.short_monitor(argument);
                self.controls.push((id, option == "qmp-pretty"));
            }
            "readconfig" => self.config(PathBuf::from(OsStr::from_bytes(argument))),
            "monitor" if !argument.starts_with(b"none") => {
                self.short_monitor(argument);
            }
            _ => {}
        }
    }

    fn config(&mut self, path: PathBuf) {
        let text = (self.read_config)(&path).unwrap_or_default();
        for (group, params) in config::sections(&text) {
            self.group(&group, params);
        }
        self.line.configs.push(path);
    }

    /// One set of parameters of one of QEMU's option groups.
    fn group(&mut self, group: &str, params: Params) {
        match group {
            // All -name options are one set: a later one without a guest= takes nothing back.
            "name" => self.line.name = params.text("guest").or_else(|| self.line.name.take()),
            "chardev" => {
                let id = params.get("id").unwrap_or_default().to_vec();
                self.chardevs.push((id, params));
            }
            "mon" if params.get("mode") == Some(b"control") => {
                let pretty = params.is_on("pretty", false);
                self.controls
                    .extend(params.get("chardev").map(|id| (id.to_vec(), pretty)));
            }
            "run-with" => self.line.chrooted |= params.get("chroot").is_some(),
            _ => {}
        }
    }

    /// A monitor in the short form, `chardev:ID` or a device; gives the id of its chardev.
    fn short_monitor(&mut self, argument: &[u8]) -> Vec<u8> {
        let index = self.short_monitors;
        self.short_monitors += 1;
        if let Some(id) = argument.strip_prefix(b"chardev:") {
            return id.to_vec();
        }
        let id = format!("compat_monitor{index}").into_bytes();
        self.chardevs.push((id.clone(), chardev_of_device(argument)));
        id
    }

    fn finish(self) -> CommandLine {
        let Self {
            mut line,
            chardevs,
            controls,
            ..
        } = self;
        let monitor = |(id, pretty): (Vec<u8>, bool)| {
            let (_, params) = chardevs.iter().find(|(name, _)| *name == id)?;
            Some(Monitor {
                address: QmpAddress::of_chardev(params),
                libvirt: id == LIBVIRT_CHARDEV,
                pretty,
            })
        };
        line.monitors = controls.into_iter().filter_map(monitor).collect();
        line
    }
}
