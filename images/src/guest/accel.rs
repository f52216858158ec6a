//! What executes the guest's instructions: KVM where it really runs a stock kernel, else emulation.

use kvm_ioctls::Kvm;
use std::fs;

/// The only version of KVM's interface since Linux 2.6.22 (Documentation/virt/kvm/api.rst).
const KVM_API_VERSION: i32 = 12;

/// How QEMU executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// KVM on hardware virtualisation.
    Kvm,
    /// QEMU's emulation, each vCPU in a thread of its own.
    Tcg,
    /// QEMU's emulation, all vCPUs in one thread, in turn.
    TcgSingle,
}

impl Accel {
    /// What this machine can do. `VMPATCH_ACCEL=kvm`, `tcg` or `tcg-single` overrides it.
    ///
    /// That /dev/kvm can be opened proves little: there is KVM in software, which can't run a Debian kernel. So the CPU
    /// must have the instructions that hardware virtualisation needs, too.
    pub fn probe() -> Self {
        let wanted = std::env::var("VMPATCH_ACCEL").unwrap_or_default();
        let cpuinfo = || fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let usable = || Kvm::new().is_ok_and(|kvm| kvm.get_api_version() == KVM_API_VERSION);
        match wanted.as_str() {
            "kvm" => Self::Kvm,
            "tcg" => Self::Tcg,
            "tcg-single" => Self::TcgSingle,
            _ if has_hardware_virtualisation(&cpuinfo()) && usable() => Self::Kvm,
            _ => Self::Tcg,
        }
    }

    /// The value of QEMU's `-accel`.
    pub fn qemu_value(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg,thread=multi",
            Self::TcgSingle => "tcg,thread=single",
        }
    }
}

/// Whether /proc/cpuinfo lists Intel's VMX or AMD's SVM.
fn has_hardware_virtualisation(cpuinfo: &str) -> bool {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags"))
        .unwrap_or_default();
    flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_flag_counts_as_hardware_virtualisation() {
        assert!(has_hardware_virtualisation("processor\t: 0\nflags\t\t: fpu vmx sse\n"));
        assert!(has_hardware_virtualisation("flags\t\t: fpu svm\n"));
        assert!(!has_hardware_virtualisation(
            "flags\t\t: fpu vmx_nested vmmcall\nbugs\t\t: vmx\n"
        ));
    }
}
