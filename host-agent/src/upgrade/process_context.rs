//! What a process inherits, beside its command line: users, limits, control groups, environment (`proc_pid_status(5)`, `proc_pid_limits(5)`,
//! `proc_pid_cgroup(5)`).

use super::argv::Tap;
use crate::domains::process::proc_path;
use nix::sys::resource::Resource;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Namespaces in which both processes must be, because names and numbers mean something else in others.
const NAMESPACES: [&str; 6] = ["mnt", "net", "pid", "user", "ipc", "uts"];

/// What a new process takes over from another one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ProcessContext {
    /// Real, effective and saved user.
    pub(super) users: [u32; 3],
    /// Real, effective and saved group.
    pub(super) groups: [u32; 3],
    /// Further groups.
    pub(super) other_groups: Vec<u32>,
    /// The umask of its files.
    pub(super) umask: u32,
    /// Soft and hard limits by their names in /proc.
    pub(super) limits: Vec<Limit>,
    /// Its place in each hierarchy of control groups: the controllers, and the path.
    pub(super) cgroups: Vec<(String, String)>,
    /// Its score for the OOM killer.
    pub(super) oom_score_adj: String,
    /// Processors that it may run on.
    pub(super) processors: Vec<usize>,
    /// Its environment.
    pub(super) environment: Vec<Vec<u8>>,
}

/// A limit: its name in /proc, the soft and the hard value; None: there is none.
pub(super) type Limit = (String, Option<u64>, Option<u64>);

/// Why a new process can't be given what the old one has.
#[derive(Debug, thiserror::Error)]
pub enum ProcessContextError {
    /// /proc does not say.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// /proc says something unexpected.
    #[error("{path} is not understood: {found:?}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// It runs in a container.
    #[error("process {pid} is in another {namespace} namespace than vmpatch: run vmpatch in there")]
    Namespace {
        /// The process.
        pid: i32,
        /// Which one.
        namespace: &'static str,
    },
    /// systemd would end the new process together with the old one.
    #[error(
        "process {pid} is the main process of the systemd service {unit}, which ends with it: run QEMU in a scope \
         (systemd-run --scope), or as a forking service with a pid file"
    )]
    MainProcess {
        /// The process.
        pid: i32,
        /// The service.
        unit: String,
    },
}

impl ProcessContext {
    /// Of the process `pid`.
    pub(super) fn of(pid: i32) -> Result<Self, ProcessContextError> {
        same_namespaces(pid)?;
        let process_context = Self::read(pid)?;
        match process_context
            .services()
            .into_iter()
            .find(|unit| main_process(unit) == Some(pid))
        {
            Some(unit) => Err(ProcessContextError::MainProcess { pid, unit }),
            None => Ok(process_context),
        }
    }

    /// Of the process `pid`, but only users, groups and what else its status tells.
    pub(super) fn rights_of(pid: i32) -> Result<Self, ProcessContextError> {
        let path = proc_path(pid, "status");
        match fs::read_to_string(&path) {
            Ok(text) => parse_status(&text).ok_or_else(|| ProcessContextError::Format {
                path,
                found: text.chars().take(200).collect(),
            }),
            Err(source) => Err(ProcessContextError::Read { path, source }),
        }
    }

    fn read(pid: i32) -> Result<Self, ProcessContextError> {
        let read = |name: &str| {
            let path = proc_path(pid, name);
            fs::read(&path).map_err(|source| ProcessContextError::Read { path, source })
        };
        let text = |name: &str| read(name).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let understood = |name: &str, found: &str| ProcessContextError::Format {
            path: proc_path(pid, name),
            found: found.chars().take(200).collect(),
        };
        let (limits, cgroups) = (text("limits")?, text("cgroup")?);
        let cgroups = parse_cgroups(&cgroups).ok_or_else(|| understood("cgroup", &cgroups))?;
        Ok(Self {
            limits: parse_limits(&limits).ok_or_else(|| understood("limits", &limits))?,
            cgroups,
            oom_score_adj: text("oom_score_adj")?.trim().to_owned(),
            environment: read("environ")?
                .split(|byte| *byte == 0)
                .filter(|variable| !variable.is_empty())
                .map(<[u8]>::to_vec)
                .collect(),
            ..Self::rights_of(pid)?
        })
    }
}

impl ProcessContext {
    /// The systemd services that it is part of.
    fn services(&self) -> Vec<String> {
        let last = |path: &String| path.rsplit('/').next().map(str::to_owned);
        let units = self.cgroups.iter().filter_map(|(_, path)| last(path));
        units.filter(|unit| unit.ends_with(".service")).collect()
    }
}

/// The main process of a service, where systemd rules this host and says so.
fn main_process(unit: &str) -> Option<i32> {
    let output = Command::new("systemctl")
        .args(["show", "--property=MainPID", "--value", "--", unit])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

fn same_namespaces(pid: i32) -> Result<(), ProcessContextError> {
    let link = |pid: &str, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}"));
    for namespace in NAMESPACES {
        let path = proc_path(pid, &format!("ns/{namespace}"));
        let theirs = link(&pid.to_string(), namespace).map_err(|source| ProcessContextError::Read { path, source })?;
        if link("self", namespace).is_ok_and(|own| own != theirs) {
            return Err(ProcessContextError::Namespace { pid, namespace });
        }
    }
    Ok(())
}

/// The tap devices of a process: a descriptor's information names the interface (`drivers/net/tun.c`, Linux 3.16).
pub(super) fn taps(pid: i32) -> Vec<Tap> {
    let entries = fs::read_dir(proc_path(pid, "fdinfo")).into_iter().flatten().flatten();
    let tap = |path: &Path| {
        let text = fs::read_to_string(path).ok()?;
        let interface = text
            .lines()
            .find_map(|line| line.strip_prefix("iff:"))?
            .trim()
            .to_owned();
        let descriptor = path.file_name()?.to_str()?.parse().ok()?;
        Some(Tap { interface, descriptor })
    };
    let mut taps: Vec<Tap> = entries.filter_map(|entry| tap(&entry.path())).collect();
    taps.sort_by_key(|tap| tap.descriptor);
    taps
}

fn parse_status(text: &str) -> Option<ProcessContext> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.map(str::trim)
    };
    let numbers =
        |name: &str| -> Option<Vec<u32>> { field(name)?.split_whitespace().map(|n| n.parse().ok()).collect() };
    let three = |name: &str| <[u32; 3]>::try_from(numbers(name)?.get(..3)?).ok();
    Some(ProcessContext {
        users: three("Uid")?,
        groups: three("Gid")?,
        other_groups: numbers("Groups")?,
        umask: u32::from_str_radix(field("Umask")?, 8).ok()?,
        processors: parse_list(field("Cpus_allowed_list")?)?,
        limits: Vec::new(),
        cgroups: Vec::new(),
        oom_score_adj: String::new(),
        environment: Vec::new(),
    })
}

/// `0-3,8`.
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut numbers = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last.checked_sub(first)? > 1 << 16 {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

/// A table with columns for the name, the soft and the hard limit. The name may hold blanks, so the columns are found by
/// their headings.
fn parse_limits(text: &str) -> Option<Vec<Limit>> {
    let mut lines = text.lines();
    let heading = lines.next()?;
    let (soft, hard, unit) = (
        heading.find("Soft Limit")?,
        heading.find("Hard Limit")?,
        heading.find("Units")?,
    );
    let value = |text: &str| match text.trim() {
        "unlimited" => Some(None),
        number => number.parse().ok().map(Some),
    };
    lines
        .map(|line| {
            let name = line.get(..soft)?.trim().to_owned();
            Some((
                name,
                value(line.get(soft..hard)?)?,
                value(line.get(hard..)?.get(..unit - hard)?)?,
            ))
        })
        .collect()
}

/// `4:memory:/path`, or `0::/path` in the one hierarchy of version 2.
fn parse_cgroups(text: &str) -> Option<Vec<(String, String)>> {
    let line = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        Some((controllers.to_owned(), path.to_owned()))
    };
    text.lines().map(line).collect()
}

/// A limit by its name in /proc (`fs/proc/base.c`, `lnames`).
pub(super) fn resource(name: &str) -> Option<Resource> {
    Some(match name {
        "Max cpu time" => Resource::RLIMIT_CPU,
        "Max file size" => Resource::RLIMIT_FSIZE,
        "Max data size" => Resource::RLIMIT_DATA,
        "Max stack size" => Resource::RLIMIT_STACK,
        "Max core file size" => Resource::RLIMIT_CORE,
        "Max resident set" => Resource::RLIMIT_RSS,
        "Max processes" => Resource::RLIMIT_NPROC,
        "Max open files" => Resource::RLIMIT_NOFILE,
        "Max locked memory" => Resource::RLIMIT_MEMLOCK,
        "Max address space" => Resource::RLIMIT_AS,
        "Max file locks" => Resource::RLIMIT_LOCKS,
        "Max pending signals" => Resource::RLIMIT_SIGPENDING,
        "Max msgqueue size" => Resource::RLIMIT_MSGQUEUE,
        "Max nice priority" => Resource::RLIMIT_NICE,
        "Max realtime priority" => Resource::RLIMIT_RTPRIO,
        "Max realtime timeout" => Resource::RLIMIT_RTTIME,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read_by_their_columns() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max cpu time              unlimited            unlimited            seconds   \n\
                    Max open files            1024                 524288               files     \n\
                    Max nice priority         0                    0                    \n";
        let limits = parse_limits(text).unwrap();
        assert_eq!(limits.first(), Some(&("Max cpu time".to_owned(), None, None)));
        assert_eq!(
            limits.get(1),
            Some(&("Max open files".to_owned(), Some(1024), Some(524_288)))
        );
        assert!(limits.iter().all(|(name, _, _)| resource(name).is_some()));
        assert_eq!(parse_limits("nothing"), None);
    }

    #[test]
    fn users_groups_and_processors_are_read() {
        let text = "Name:\tqemu\nUmask:\t0027\nUid:\t64055\t64055\t64055\t64055\nGid:\t103\t103\t103\t103\n\
                    Groups:\t103 105 \nCpus_allowed_list:\t0-1,5\n";
        let process_context = parse_status(text).unwrap();
        assert_eq!(
            (process_context.users, process_context.groups, process_context.umask),
            ([64055; 3], [103; 3], 0o27)
        );
        assert_eq!(
            (process_context.other_groups, process_context.processors),
            (vec![103, 105], vec![0, 1, 5])
        );
    }

    #[test]
    fn places_in_control_groups_of_both_versions_are_read() {
        let found = parse_cgroups("9:name=systemd:/a\n4:memory:/x:y\n0::/\n").unwrap();
        let expected = [("name=systemd", "/a"), ("memory", "/x:y"), ("", "/")];
        assert_eq!(found, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
    }

    #[test]
    fn the_circumstances_of_this_very_process_are_understood() {
        let own = i32::try_from(std::process::id()).unwrap();
        let process_context = ProcessContext::of(own).unwrap();
        assert!(!process_context.limits.is_empty() && !process_context.processors.is_empty());
        assert_eq!(taps(own), []);
    }
}
