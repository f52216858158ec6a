//! A vCPU: how it begins, and what is done where KVM hands it over.

use super::serial::{self, Serial};
use super::{Result, boot};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::process;

/// The old keyboard controller: a write of `RESET` to its port resets the machine.
const KEYBOARD: u16 = 0x64;
const RESET: u8 = 0xfe;
/// In CPUID leaf 1, ECX: a hypervisor runs this, which its own leaves tell of.
const HYPERVISOR: u32 = 1 << 31;
/// Protected mode.
const CR0_PE: u64 = 1;
/// The descriptors that the boot protocol asks for.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;

/// The first one begins with the kernel, the others wait for it.
pub(super) fn make(kvm: &Kvm, vm: &VmFd, id: u8) -> Result<VcpuFd> {
    let vcpu = vm.create_vcpu(id.into())?;
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id) << 24;
                entry.ecx |= HYPERVISOR;
            }
            0xb => entry.edx = id.into(),
            _ => {}
        }
    }
    vcpu.set_cpuid2(&cpuid)?;
    if id == 0 {
        let mut sregs = vcpu.get_sregs()?;
        let segment = |selector, type_| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            s: 1,
            db: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(CODE, 11);
        let data = segment(DATA, 3);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr0 |= CR0_PE;
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        (regs.rip, regs.rsi, regs.rflags) = (boot::KERNEL, boot::PARAMS, 2);
        vcpu.set_regs(&regs)?;
    }
    Ok(vcpu)
}

/// Runs it. A reset of the guest ends the process.
pub(super) fn run(mut vcpu: VcpuFd, serial: &Serial) -> Result<()> {
    let ports = serial::PORT..serial::PORT + serial::PORTS;
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, bytes)) if ports.contains(&port) => {
                for byte in bytes {
                    serial.write(port - serial::PORT, *byte)?;
                }
            }
            Ok(VcpuExit::IoIn(port, bytes)) if ports.contains(&port) => bytes.fill(serial.read(port - serial::PORT)),
            Ok(VcpuExit::IoOut(KEYBOARD, [RESET])) | Ok(VcpuExit::Shutdown) => process::exit(0),
            // Nothing is there: a bus without devices reads as ones, the clock and the keyboard's state as zeros.
            Ok(VcpuExit::IoIn(port, bytes)) => bytes.fill(if matches!(port, 0x60..=0x71) { 0 } else { 0xff }),
            Ok(VcpuExit::MmioRead(_, bytes)) => bytes.fill(0xff),
            Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..) | VcpuExit::Hlt) => {}
            Ok(other) => return Err(format!("KVM hands over {other:?}").into()),
            Err(error) if error.errno() == nix::libc::EINTR => {}
            // A vCPU that waits for its start.
            Err(error) if error.errno() == nix::libc::EAGAIN => {}
            Err(error) => return Err(error.into()),
        }
    }
}
