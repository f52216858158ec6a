//! QEMU's command line for a guest.

use std::path::{Path, PathBuf};

use super::accel::Accel;
use super::config::{GuestConfig, NameSpelling, QmpSpelling, Ram};

/// The name of the channel's virtio port; the guest agent (`images/agent`) looks for it.
const PORT_NAME: &str = "org.vmpatch.guest";
/// What every guest's kernel is told: the console goes to the host's file, warnings and worse only, because each character
/// costs time; `dmesg` has the rest. `no_timer_check`, as any kernel does under KVM by itself: on a busy host the emulated timer
/// is late, and the check takes it for broken.
const KERNEL_ARGS: &str = "console=ttyS0 loglevel=5 panic=0 8250.nr_uarts=1 random.trust_cpu=on no_timer_check";

/// The files of one running guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Files {
    folder: PathBuf,
}

impl Files {
    pub(super) fn in_folder(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
        }
    }

    pub(super) fn initramfs(&self) -> PathBuf {
        self.folder.join("initramfs.cpio")
    }

    pub(super) fn console(&self) -> PathBuf {
        self.folder.join("console.log")
    }

    pub(super) fn channel(&self) -> PathBuf {
        self.folder.join("channel.sock")
    }

    /// What QEMU itself has to say.
    pub(super) fn qemu_log(&self) -> PathBuf {
        self.folder.join("qemu.log")
    }

    pub(super) fn qmp(&self, index: usize) -> PathBuf {
        self.folder.join(format!("qmp{index}.sock"))
    }
}

/// QEMU's arguments, without the program.
pub(super) fn arguments(config: &GuestConfig, name: &str, vmlinuz: Option<&Path>, files: &Files) -> Vec<String> {
    let mut args = Arguments::default();
    args.flag("-nodefaults").flag("-no-user-config");
    args.option("-display", "none");
    let name = match config.name_spelling {
        NameSpelling::GuestKey => format!("guest={}", value(name)),
        NameSpelling::Plain => value(name),
    };
    args.option("-name", name);
    args.option("-accel", config.accel.qemu_value());
    let default_cpu = match config.accel {
        Accel::Kvm => "host",
        Accel::Tcg | Accel::TcgSingle => "max",
    };
    args.option("-cpu", config.cpu.as_deref().unwrap_or(default_cpu));
    args.option("-smp", config.vcpus.to_string());
    args.option("-m", format!("{}M", config.memory_mib));
    ram(&mut args, config);
    if let Some(vmlinuz) = vmlinuz {
        args.option("-kernel", vmlinuz.display().to_string());
        args.option("-initrd", files.initramfs().display().to_string());
        args.option(
            "-append",
            [&[KERNEL_ARGS.to_owned()], config.append.as_slice()].concat().join(" "),
        );
    }
    args.option(
        "-chardev",
        format!("file,id=console,append=on,path={}", path(&files.console())),
    );
    args.option("-serial", "chardev:console");
    args.option(
        "-chardev",
        format!("socket,id=channel,server=on,wait=off,path={}", path(&files.channel())),
    );
    args.option("-device", "virtio-serial-pci");
    args.option("-device", format!("virtserialport,chardev=channel,name={PORT_NAME}"));
    for (index, spelling) in config.qmp.iter().enumerate() {
        let socket = path(&files.qmp(index));
        match spelling {
            QmpSpelling::Qmp => args.option("-qmp", format!("unix:{socket},server=on,wait=off")),
            QmpSpelling::QmpShort => args.option("-qmp", format!("unix:{socket},server,nowait")),
            QmpSpelling::ChardevMon => args
                .option(
                    "-chardev",
                    format!("socket,id=monitor{index},path={socket},server=on,wait=off"),
                )
                .option("-mon", format!("chardev=monitor{index},mode=control")),
        };
    }
    args.0.extend(config.qemu_args.iter().cloned());
    args.0
}

/// The machine and what holds its RAM.
fn ram(args: &mut Arguments, config: &GuestConfig) {
    let backend =
        |kind: &str, id: &str, mib: u32, more: &str| format!("memory-backend-{kind},id={id},size={mib}M{more}");
    let (all, half) = (config.memory_mib, config.memory_mib / 2);
    let memfd = match config.ram {
        Ram::SharedMemfd => backend("memfd", "ram0", all, ",share=on"),
        Ram::SharedHuge => backend("memfd", "ram0", all, ",share=on,hugetlb=on,hugetlbsize=2M"),
        Ram::TwoKinds => {
            args.option("-object", backend("memfd", "ram0", half, ",share=on"))
                .option("-object", backend("ram", "ram1", half, ""))
                .option("-numa", "node,memdev=ram0")
                .option("-numa", "node,memdev=ram1")
                .option("-machine", &config.machine);
            return;
        }
        Ram::Private => {
            args.option("-machine", &config.machine);
            return;
        }
    };
    args.option("-object", memfd)
        .option("-machine", format!("{},memory-backend=ram0", config.machine));
}

#[derive(Default)]
struct Arguments(Vec<String>);

impl Arguments {
    fn flag(&mut self, flag: &str) -> &mut Self {
        self.0.push(flag.to_owned());
        self
    }

    fn option(&mut self, option: &str, value: impl Into<String>) -> &mut Self {
        self.0.extend([option.to_owned(), value.into()]);
        self
    }
}

/// A value in QEMU's lists: a comma in it is doubled.
fn value(text: &str) -> String {
    text.replace(',', ",,")
}

fn path(path: &Path) -> String {
    value(&path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Kernel;

    fn line(config: &GuestConfig) -> String {
        arguments(
            config,
            "vm,42",
            Some(Path::new("/boot/vmlinuz")),
            &Files::in_folder(Path::new("/run/g")),
        )
        .join(" ")
    }

    #[test]
    fn vcpus_memory_and_kernel_arguments_are_the_configured_ones() {
        let config = GuestConfig::new(Kernel::CLOUD_6_1)
            .vcpus(4)
            .memory_mib(512)
            .append("nokaslr")
            .append("pti=on");
        let line = line(&config);
        assert!(line.contains(" -smp 4 -m 512M -machine q35 "), "{line}");
        assert!(line.contains(" nokaslr pti=on -chardev "), "{line}");
    }

    #[test]
    fn shared_memory_is_a_memfd_of_the_guests_size() {
        let line = line(&GuestConfig::new(Kernel::CLOUD_6_1).ram(Ram::SharedMemfd));
        assert!(
            line.contains("-object memory-backend-memfd,id=ram0,size=256M,share=on -machine q35,memory-backend=ram0")
        );
    }

    #[test]
    fn a_comma_in_the_name_is_doubled_in_both_spellings() {
        let mut config = GuestConfig::new(Kernel::CLOUD_6_1);
        assert!(line(&config).contains(" -name guest=vm,,42 "));
        config.name_spelling = NameSpelling::Plain;
        assert!(line(&config).contains(" -name vm,,42 "));
    }

    #[test]
    fn each_qmp_socket_is_spelled_as_configured() {
        let mut config = GuestConfig::new(Kernel::CLOUD_6_1);
        config.qmp = vec![QmpSpelling::Qmp, QmpSpelling::QmpShort, QmpSpelling::ChardevMon];
        let line = line(&config);
        assert!(
            line.contains("-qmp unix:/run/g/qmp0.sock,server=on,wait=off "),
            "{line}"
        );
        assert!(line.contains("-qmp unix:/run/g/qmp1.sock,server,nowait "), "{line}");
        let chardev =
            "-chardev socket,id=monitor2,path=/run/g/qmp2.sock,server=on,wait=off -mon chardev=monitor2,mode=control";
        assert!(line.contains(chardev), "{line}");
    }
}
