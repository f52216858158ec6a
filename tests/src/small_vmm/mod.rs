//! A small VMM for tests: a program that runs a Linux guest under KVM and is not QEMU. It has a serial console that only speaks, no monitor,
//! and no disk.
//!
//! It maps the guest's RAM region by region, lowest first, so that the host's kernel puts each below the one before and shows all of them as
//! one mapping, in which the guest's addresses stand in the wrong order.

mod boot;
mod memory;
mod mp_table;
mod serial;
mod vcpu;

pub use memory::Backing;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::Kvm;
use serial::Serial;
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

/// What goes wrong, in words.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Where KVM puts what it needs of the guest's addresses on Intel: below the firmware's place.
const TSS: usize = 0xfffb_d000;

/// What to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
    /// Its command line.
    pub command_line: String,
    /// Its RAM, MiB.
    pub memory_mib: u64,
    /// How its RAM is kept.
    pub backing: Backing,
    /// Its CPUs.
    pub vcpus: u8,
}

/// Runs the guest until it resets. Its console goes to standard output.
///
/// # Errors
///
/// It can't be run.
pub fn run(config: &Config) -> Result<()> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.set_tss_address(TSS)?;
    vm.create_irq_chip()?;
    vm.create_pit2(kvm_pit_config {
        flags: KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })?;
    let ram = memory::map(config.memory_mib << 20, config.backing)?;
    memory::give(&vm, &ram)?;
    mp_table::write(&ram, config.vcpus)?;
    boot::load(&ram, config)?;
    let serial = Arc::new(Serial::default());
    let mut threads = Vec::new();
    for id in 0..config.vcpus {
        let vcpu = vcpu::make(&kvm, &vm, id)?;
        let serial = Arc::clone(&serial);
        let thread = thread::Builder::new().name(format!("small-vcpu-{id}"));
        threads.push(thread.spawn(move || vcpu::run(vcpu, &serial))?);
    }
    // The first vCPU that ends, by the guest's reset or by an error, ends the process.
    for thread in threads {
        thread.join().map_err(|_| "a vCPU's thread has panicked")??;
    }
    Ok(())
}
