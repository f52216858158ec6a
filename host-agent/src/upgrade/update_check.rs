//! Checks whether a guest should be moved into another QEMU: the program's file was replaced or removed, or a newer version is installed.

use super::binary::{self, Version, spell};
use super::owner::Owner;
use crate::domains::Binary;
use std::fmt;
use std::path::PathBuf;

/// That an upgrade is due, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpdateDue {
    running: Version,
    installed: Option<Version>,
    program: PathBuf,
}

/// Compares the running QEMU `pid` with the program that is installed in its place. `None` if they are the same, or this can't be found out.
pub fn update_due(running: Version, pid: i32, program: Option<&Binary>) -> Option<UpdateDue> {
    let program = program?;
    // The program may be the user's own, so it is run with that user's rights.
    let owner = Owner::of(pid).ok()?;
    let installed = binary::version_as(&owner, &program.path).ok();
    judge(running, program, installed)
}

fn judge(running: Version, program: &Binary, installed: Option<Version>) -> Option<UpdateDue> {
    let is_newer = installed.is_some_and(|installed| installed > running);
    (program.deleted || is_newer).then(|| UpdateDue {
        running,
        installed,
        program: program.path.clone(),
    })
}

impl fmt::Display for UpdateDue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (running, program) = (spell(self.running), self.program.display());
        match self.installed {
            Some(installed) if installed == self.running => {
                write!(f, "it runs in a QEMU {running} whose file {program} was replaced since")?;
            }
            Some(installed) => write!(
                f,
                "it runs in QEMU {running}, and {program} is {} by now",
                spell(installed)
            )?,
            None => return write!(f, "it runs in a QEMU {running} whose file {program} was removed since"),
        }
        write!(f, ": `upgrade --qemu {program}` is due")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(deleted: bool, installed: Option<Version>) -> Option<String> {
        let path = PathBuf::from("/usr/bin/qemu");
        judge((7, 2, 22), &Binary { path, deleted }, installed).map(|due| due.to_string())
    }

    #[test]
    fn a_program_that_was_replaced_or_is_older_than_the_installed_one_is_due() {
        assert_eq!(
            message(true, Some((10, 0, 2))).unwrap(),
            "it runs in QEMU 7.2.22, and /usr/bin/qemu is 10.0.2 by now: `upgrade --qemu /usr/bin/qemu` is due"
        );
        assert!(message(false, Some((10, 0, 2))).is_some());
        assert!(message(true, Some((7, 2, 22))).unwrap().contains("was replaced since"));
        assert!(message(true, None).unwrap().ends_with("was removed since"));
        for installed in [Some((7, 2, 22)), Some((6, 0, 0)), None] {
            assert_eq!(message(false, installed), None);
        }
    }
}
