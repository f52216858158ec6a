//! `domains`: the running guests of this host.

use super::describe::CODE_KEPT;
use super::status::patches;
use crate::program::failure::Failure;
use crate::program::report::DomainLine;
use host_agent::domains::{self, Domain};
use host_agent::session::Session;
use host_agent::target::Target;

/// Every QEMU process that can be seen, with what is in it as far as it can be reached.
pub fn domains() -> Result<Vec<DomainLine>, Failure> {
    let survey = domains::all()?;
    let line = |domain: &Domain| match survey.successor_of(domain.pid) {
        None => line(domain),
        Some(successor) => DomainLine {
            error: Some(format!(
                "moves to process {}, or did: any command on it says more",
                successor.domain.pid
            )),
            ..empty(domain)
        },
    };
    Ok(survey.iter().map(line).collect())
}

fn line(domain: &Domain) -> DomainLine {
    let mut line = empty(domain);
    let session = Target::of_domain(domain).map_err(Failure::from).and_then(|target| {
        line.qmp = Some(target.route.to_string());
        Ok(Session::open_to_read(&target)?)
    });
    match session {
        Ok(session) => {
            line.accelerator = Some(session.vm().identity().accelerator.to_string());
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
        qmp: None,
        accelerator: None,
        kernel: None,
        patches: Vec::new(),
        error: None,
    }
}
