//! A host in a box: an emulated machine whose own KVM runs guests, for tests on a machine that has no hardware virtualisation.
//!
//! QEMU's emulation has AMD's SVM with nested paging, so a stock Debian kernel loads its real `kvm_amd` there, and the QEMU of this
//! machine runs there with `-accel kvm`. The box is a guest of this machine, and a [`Host`] for guests of its own: what a
//! test does with a guest here it does with a guest there. All is slow; of times, only ratios within the box mean anything.

mod machine;

use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::guest::{self, Accel, Guest, GuestConfig};
use crate::host::{self, Host};
use crate::kernel::Kernel;
use crate::{cache, channel, command};
use machine::Machine;

/// The CPU model that has SVM with nested paging under emulation.
const CPU: &str = "EPYC-Rome,+svm,+npt";
/// The clock of the box: the emulated TSC, which is as steady as QEMU's own clock. By itself a kernel does not trust it and takes the HPET,
/// whose every access waits for QEMU's lock (seen: QEMU's main thread took half of all processor time). Then the box's KVM gives its guests no
/// clock to read either.
const CLOCK: &str = "tsc=reliable clocksource=tsc";
/// RAM of the box: twice the programs (as archive and unpacked), and guests of some hundred MiB.
const MEMORY_MIB: u32 = 2048;
/// Where QEMU's packages put the program.
const QEMU: &str = "/usr/bin/qemu-system-x86_64";
/// The firmware of a guest that is given its kernel directly, where QEMU's packages put it: SeaBIOS, KVM's patch of the local APIC's
/// registers, and the loader of the kernel.
const FIRMWARE: [&str; 3] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];

/// Why a box, or a guest in it, could not be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The box, or the guest, did not boot.
    #[error(transparent)]
    Guest(#[from] guest::Error),
    /// The box has no usable KVM.
    #[error("the box has no /dev/kvm; its kernel said: {log}")]
    NoKvm {
        /// What the box's kernel said of KVM.
        log: String,
    },
    /// The libraries of QEMU could not be found.
    #[error(transparent)]
    Libraries(#[from] command::Error),
    /// A file could not be put into the box.
    #[error(transparent)]
    Files(#[from] cache::Error),
    /// The box does not answer.
    #[error(transparent)]
    Channel(#[from] channel::Error),
}

/// A running box, with the methods of the guest of this machine that it is. It ends when it is dropped, and its guests are, too.
#[derive(Clone, Debug)]
pub struct HostBox {
    machine: Arc<Machine>,
}

impl HostBox {
    /// Boots a box and returns when it has KVM.
    pub fn start() -> Result<Self, Error> {
        Self::start_with(config()?)
    }

    /// The same for one with that many huge pages of 1 GiB, which a host can only set aside for certain as it boots.
    pub fn start_with_gigabyte_pages(count: u32) -> Result<Self, Error> {
        // Not all memory is free in whole pages of that size.
        let memory_mib = MEMORY_MIB + (count + 1) * 1024;
        let words = format!("hugepagesz=1G hugepages={count}");
        Self::start_with(config()?.memory_mib(memory_mib).append(&words))
    }

    fn start_with(config: GuestConfig) -> Result<Self, Error> {
        let guest = Guest::boot(config)?;
        if !guest.run(&["test", "-c", "/dev/kvm"])?.status.success() {
            let log = guest.text(&["sh", "-c", "dmesg | grep -i -e kvm -e svm"])?;
            return Err(Error::NoKvm { log });
        }
        Ok(Self {
            machine: Arc::new(Machine::new(guest)),
        })
    }

    /// Boots a guest in the box, under KVM, and returns when it can run commands.
    pub fn boot(&self, mut config: GuestConfig) -> Result<Guest, Error> {
        config.accel = Accel::Kvm;
        Ok(Guest::boot_on(self.host(), config)?)
    }

    /// Puts a file of this machine into the box, under the same absolute path.
    pub fn place(&self, file: &Path) -> Result<(), Error> {
        Ok(self
            .machine
            .place(file)
            .map_err(cache::Error::io("put into the box", file))?)
    }

    /// The same for a program, with the libraries that it needs.
    pub fn place_program(&self, program: &Path) -> Result<(), Error> {
        let placed = self.machine.place_program(program);
        Ok(placed.map_err(cache::Error::io("put into the box", program))?)
    }

    /// The box as the machine that guests run on.
    pub fn host(&self) -> Arc<dyn Host> {
        Arc::clone(&self.machine) as Arc<dyn Host>
    }
}

impl Deref for HostBox {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        self.machine.guest()
    }
}

/// What the box is like, as a guest of this machine.
fn config() -> Result<GuestConfig, Error> {
    let mut config = GuestConfig::new(Kernel::GENERIC_6_1)
        .vcpus(2)
        .memory_mib(MEMORY_MIB)
        .cpu(CPU)
        .append(CLOCK)
        .module("kvm-amd");
    config.accel = Accel::Tcg;
    let libraries = host::libraries(Path::new(QEMU))?;
    let files = [QEMU].into_iter().chain(FIRMWARE).map(PathBuf::from).chain(libraries);
    Ok(files.fold(config, |config, file| config.file(&file.to_string_lossy(), &file)))
}
