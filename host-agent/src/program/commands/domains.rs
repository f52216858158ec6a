//! `domains`: the running guests of this host.

use super::describe::CODE_KEPT;
use super::status::patches;
use crate::program::cli::Options;
use crate::program::failure::Failure;
use crate::program::report::DomainLine;
use host_agent::chain::chain;
use host_agent::domains::{self, Domain, KvmGuest, KvmGuests};
use host_agent::hypervisor::Accelerator;
use host_agent::sandbox::{Sandbox, in_own_process};
use host_agent::session::{Access, Session};
use host_agent::target::Target;

/// Every QEMU process that can be seen, with what is in it as far as it can be reached; then every other process that runs a guest under KVM.
pub fn domains(options: &Options) -> Result<Vec<DomainLine>, Failure> {
    let sandbox = options.sandbox.sandbox();
    let domains = domains::all()?;
    let line = |domain: &Domain| match domains.successor_of(domain.pid) {
        None => apart(domain, sandbox),
        Some(successor) => DomainLine {
            error: Some(format!(
                "moves to process {}, or did: any command on it says more",
                successor.domain.pid
            )),
            ..empty(domain)
        },
    };
    let others = KvmGuests::beside(&domains)?;
    if others.unreadable > 0 {
        tracing::warn!(
            "{} processes of other users were not looked at, and may run guests under KVM: run vmpatch as root",
            others.unreadable
        );
    }
    let mut lines: Vec<DomainLine> = domains.iter().map(line).collect();
    lines.extend(others.found.iter().map(other));
    Ok(lines)
}

/// A guest that no known QEMU runs: it is not asked, nor are its vCPUs stopped.
fn other(guest: &KvmGuest) -> DomainLine {
    let why = match &guest.vcpus {
        Ok(vcpus) => format!("{vcpus} vCPUs, to be reached by --pid {}", guest.pid),
        Err(error) => chain(error).join(": "),
    };
    DomainLine {
        name: None,
        pid: guest.pid,
        program: Some(guest.program.clone()),
        qmp: None,
        accelerator: Some(Accelerator::Kvm.to_string()),
        kernel: None,
        patches: Vec::new(),
        error: Some(format!("{} runs it, which is not QEMU: {why}", guest.program)),
    }
}

/// Each guest is read by a process of its own, so that none has a say in what is told of another.
fn apart(domain: &Domain, sandbox: Sandbox) -> DomainLine {
    if sandbox == Sandbox::Off {
        return line(domain, sandbox);
    }
    let error = |error| Some(format!("the process that reads this guest gave no answer: {error}"));
    let told = in_own_process(|| line(domain, sandbox));
    let told = told.unwrap_or_else(|failure| DomainLine {
        error: error(failure),
        ..empty(domain)
    });
    // Who it is, is not for its reader to say.
    let DomainLine { name, pid, .. } = empty(domain);
    DomainLine { name, pid, ..told }
}

fn line(domain: &Domain, sandbox: Sandbox) -> DomainLine {
    let mut line = empty(domain);
    let session = Target::of_domain(domain).map_err(Failure::from).and_then(|target| {
        line.qmp = Some(target.route.to_string());
        Ok(Session::open_divided(&target, Access::Read, sandbox, |_| ())?.0)
    });
    match session {
        Ok(session) => {
            line.accelerator = Some(session.identity().accelerator.to_string());
            line.kernel = Some(session.kernel().release.clone());
            let there = patches(&session).into_iter().filter(|patch| patch.state != CODE_KEPT);
            line.patches = there.map(|patch| patch.id).collect();
        }
        Err(error) => line.error = Some(error.chain().join(": ")),
    }
    line
}

fn empty(domain: &Domain) -> DomainLine {
    DomainLine {
        name: domain.name.clone(),
        pid: domain.pid,
        program: None,
        qmp: None,
        accelerator: None,
        kernel: None,
        patches: Vec::new(),
        error: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::text;
    use kvm::FindError;

    /// A guest that did not show would be taken for one that is patched.
    #[test]
    fn a_guest_of_any_program_is_listed_with_what_is_known_of_it() {
        let guest = |pid, vcpus| KvmGuest {
            pid,
            start_time: 1,
            program: "alioth".to_owned(),
            vcpus,
        };
        let guests = [
            guest(41, Ok(2)),
            guest(42, Err(FindError::SeveralVms { pid: 42, count: 2 })),
        ];
        let lines: Vec<DomainLine> = guests.iter().map(other).collect();
        assert_eq!(
            text::domains(&lines),
            "\
NAME  PID  ACCEL  KERNEL  PATCHES
-     41   kvm    -       (alioth runs it, which is not QEMU: 2 vCPUs, to be reached by --pid 41)
-     42   kvm    -       (alioth runs it, which is not QEMU: process 42 has 2 descriptors of VMs; one is understood)
"
        );
        let json = serde_json::to_value(&lines).unwrap();
        assert_eq!(
            (&json[0]["program"], &json[0]["name"]),
            (&"alioth".into(), &serde_json::Value::Null)
        );
    }
}
