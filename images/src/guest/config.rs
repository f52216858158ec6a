//! What a guest is to be like.

use std::path::PathBuf;

use super::accel::Accel;
use crate::initramfs::ExtraFile;
use crate::kernel::Kernel;

/// Where QEMU keeps the guest's RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ram {
    /// Anonymous memory of the QEMU process alone, as without any option.
    #[default]
    Private,
    /// A memfd, mapped shared, that another process can map through QEMU's open files.
    SharedMemfd,
    /// The same of huge pages (2 MiB), of which the host must have enough.
    SharedHuge,
    /// Two NUMA nodes of equal size: a memfd as above, and anonymous memory.
    TwoKinds,
}

/// How the guest's name is spelled on QEMU's command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NameSpelling {
    /// `-name guest=NAME`, as libvirt writes it.
    #[default]
    GuestKey,
    /// `-name NAME`.
    Plain,
}

/// How a QMP socket is spelled on QEMU's command line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QmpSpelling {
    /// `-qmp unix:PATH,server=on,wait=off`.
    #[default]
    Qmp,
    /// `-qmp unix:PATH,server,nowait`, the form from before QEMU 6.0.
    QmpShort,
    /// `-chardev socket,… -mon chardev=…,mode=control`, as libvirt writes it.
    ChardevMon,
}

/// A guest to boot; [`Guest::boot`](super::Guest::boot) boots it. The fields are public so that a test can change one of
/// a set of choices; the methods are for a chain of them.
#[derive(Clone, Debug)]
pub struct GuestConfig {
    /// The kernel; `None` leaves the guest in its firmware, or to what [`GuestConfig::qemu_args`] make it boot.
    pub kernel: Option<Kernel>,
    /// The number of vCPUs.
    pub vcpus: u32,
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Where RAM is kept.
    pub ram: Ram,
    /// QEMU's CPU model; `None` is the one with most features. With emulation that has 5-level paging (`max,la57=off` has
    /// not) and an AMD vendor, for which a kernel turns PTI off unless told otherwise (`pti=on`).
    pub cpu: Option<String>,
    /// Words for the kernel's command line, after those that every guest has.
    pub append: Vec<String>,
    /// The name; `None` is one of the host's own choice, different for each guest.
    pub name: Option<String>,
    /// The name's spelling.
    pub name_spelling: NameSpelling,
    /// The QMP sockets, one for each.
    pub qmp: Vec<QmpSpelling>,
    /// Files of the host that the guest gets.
    pub files: Vec<ExtraFile>,
    /// Kernel modules that the guest loads, beside those that the channel needs.
    pub modules: Vec<String>,
    /// More arguments for QEMU.
    pub qemu_args: Vec<String>,
    /// QEMU itself.
    pub qemu: PathBuf,
    /// QEMU's machine type.
    pub machine: String,
    /// What executes guest code.
    pub accel: Accel,
}

impl GuestConfig {
    /// One vCPU and 256 MiB of private RAM, with one QMP socket.
    pub fn new(kernel: Kernel) -> Self {
        Self {
            kernel: Some(kernel),
            ..Self::without_kernel()
        }
    }

    /// The same machine with nothing to boot.
    pub fn without_kernel() -> Self {
        Self {
            kernel: None,
            vcpus: 1,
            memory_mib: 256,
            ram: Ram::default(),
            cpu: None,
            append: Vec::new(),
            name: None,
            name_spelling: NameSpelling::default(),
            qmp: vec![QmpSpelling::default()],
            files: Vec::new(),
            modules: Vec::new(),
            qemu_args: Vec::new(),
            qemu: PathBuf::from("qemu-system-x86_64"),
            machine: "q35".to_owned(),
            accel: Accel::probe(),
        }
    }

    /// With this many vCPUs.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// With this much RAM, in MiB.
    #[must_use]
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// With RAM kept there.
    #[must_use]
    pub fn ram(mut self, ram: Ram) -> Self {
        self.ram = ram;
        self
    }

    /// With this CPU model, in QEMU's spelling.
    #[must_use]
    pub fn cpu(mut self, model: &str) -> Self {
        self.cpu = Some(model.to_owned());
        self
    }

    /// With these words on the kernel's command line, such as `nokaslr no5lvl`.
    #[must_use]
    pub fn append(mut self, words: &str) -> Self {
        self.append.push(words.to_owned());
        self
    }

    /// With this name.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = Some(name.to_owned());
        self
    }

    /// With a program or file of the host at an absolute path in the guest.
    #[must_use]
    pub fn file(mut self, guest: &str, host: impl Into<PathBuf>) -> Self {
        self.files.push(ExtraFile {
            guest: guest.to_owned(),
            host: host.into(),
        });
        self
    }

    /// With a module of the kernel's own package loaded at boot.
    #[must_use]
    pub fn module(mut self, name: &str) -> Self {
        self.modules.push(name.to_owned());
        self
    }

    /// With another argument for QEMU.
    #[must_use]
    pub fn qemu_arg(mut self, arg: &str) -> Self {
        self.qemu_args.push(arg.to_owned());
        self
    }
}
