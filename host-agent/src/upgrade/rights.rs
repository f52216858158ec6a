//! What a process may do, beside its user: capabilities, system calls, and what a security module lets it do (`proc_pid_status(5)`,
//! `proc_pid_attr(5)`). The new process must not be allowed more than the old one, nor less.

use super::error::UpgradeError;
use crate::domains::process::proc_path;
use std::fs;

/// Lines of a process's status that tell its rights.
const LINES: [&str; 10] = [
    "Uid",
    "Gid",
    "Groups",
    "CapInh",
    "CapPrm",
    "CapEff",
    "CapBnd",
    "CapAmb",
    "NoNewPrivs",
    "Seccomp",
];

/// Demands that both processes have the same rights.
pub(super) fn check_same(old: i32, new: i32) -> Result<(), UpgradeError> {
    let read = |pid: i32| {
        let path = proc_path(pid, "status");
        let failed = UpgradeError::host(format!("reading {}", path.display()));
        let status = fs::read_to_string(&path).map_err(failed)?;
        // Where no security module has labels, it can't be read.
        let label = fs::read_to_string(proc_path(pid, "attr/current")).unwrap_or_default();
        Ok::<_, UpgradeError>(rights(&status, &label))
    };
    match first_difference(&read(old)?, &read(new)?) {
        None => Ok(()),
        Some((old, new)) => Err(UpgradeError::Differs {
            what: "right",
            old,
            new,
            reason: "run vmpatch as what started the old one, with the same capabilities, seccomp filter and security label",
        }),
    }
}

fn rights(status: &str, label: &str) -> Vec<String> {
    let value = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
    };
    let line = |name: &&str| format!("{name} {}", value(name).unwrap_or_default().trim().replace('\t', " "));
    let mut found: Vec<String> = LINES.iter().map(line).collect();
    found.push(format!("label {}", label.trim_end_matches(['\0', '\n'])));
    found
}

fn first_difference(old: &[String], new: &[String]) -> Option<(String, String)> {
    let mut pairs = old.iter().zip(new);
    let (old, new) = pairs.find(|(old, new)| old != new)?;
    Some((old.clone(), new.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_right_that_differs_is_named() {
        let status = "Uid:\t0\t0\t0\t0\nCapEff:\t00000000a80425fb\nNoNewPrivs:\t1\nSeccomp:\t2\n";
        let old = rights(status, "vm42 (enforce)\n");
        assert_eq!(first_difference(&old, &rights(status, "vm42 (enforce)\0")), None);
        let other = rights(&status.replace("NoNewPrivs:\t1", "NoNewPrivs:\t0"), "unconfined");
        let expected = ("NoNewPrivs 1".to_owned(), "NoNewPrivs 0".to_owned());
        assert_eq!(first_difference(&old, &other), Some(expected));
        let expected = ("label vm42 (enforce)".to_owned(), "label unconfined".to_owned());
        assert_eq!(first_difference(&old, &rights(status, "unconfined\n")), Some(expected));
    }
}
