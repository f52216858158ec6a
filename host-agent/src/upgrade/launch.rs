//! Becoming another QEMU: `vmpatch launch` reads on its standard input what to become, takes the old process's place in all
//! that it inherits from its starter, and hands itself over to the new program.

use super::descriptor;
use super::process_context::{ProcessContext, resource};
use crate::domains::process;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{RLIM_INFINITY, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Pid, Uid, setgroups, setresgid, setresuid, setsid};
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What to become.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Spec {
    /// The new program.
    pub(super) program: PathBuf,
    /// Its arguments.
    pub(super) arguments: Vec<Vec<u8>>,
    /// Its working folder.
    pub(super) folder: PathBuf,
    /// What it runs as.
    pub(super) process_context: ProcessContext,
    /// The old process.
    pub(super) old: i32,
    /// What tells later that it was started for that ([`process::MARKER`]).
    pub(super) marker: String,
    /// The old one's descriptors that it needs.
    pub(super) descriptors: Vec<i32>,
    /// Those that are tap devices, for whoever brings a move to an end that was cut off ([`process::TAPS`]).
    pub(super) taps: String,
}

/// Why this process did not become another program.
#[derive(Debug, thiserror::Error)]
#[error("{doing}")]
pub struct LaunchError {
    doing: String,
    #[source]
    cause: io::Error,
}

impl LaunchError {
    fn at(doing: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let doing = doing.into();
        move |cause| Self { doing, cause }
    }
}

/// Reads a [`Spec`] and becomes that. Returns only where it could not.
pub fn launch() -> Result<(), LaunchError> {
    // SAFETY: this process has just begun, and has opened nothing.
    unsafe { descriptor::close_inherited() };
    let mut text = Vec::new();
    io::stdin()
        .read_to_end(&mut text)
        .map_err(LaunchError::at("reading what to start"))?;
    let spec: Spec = serde_json::from_slice(&text)
        .map_err(io::Error::from)
        .map_err(LaunchError::at("reading what to start"))?;
    become_it(&spec)
}

fn become_it(spec: &Spec) -> Result<(), LaunchError> {
    let ProcessContext { cgroups, limits, .. } = &spec.process_context;
    // First what needs the rights of whoever started vmpatch.
    setsid()
        .map_err(io::Error::from)
        .map_err(LaunchError::at("leaving the terminal"))?;
    join_cgroups(cgroups)?;
    fs::write("/proc/self/oom_score_adj", &spec.process_context.oom_score_adj).map_err(LaunchError::at(format!(
        "setting oom_score_adj to {}",
        spec.process_context.oom_score_adj
    )))?;
    run_on(&spec.process_context.processors)?;
    for (name, soft, hard) in limits {
        limit(name, *soft, *hard)?;
    }
    descriptor::inherit(spec.old, &spec.descriptors).map_err(LaunchError::at(format!(
        "taking over descriptors {:?} of process {}",
        spec.descriptors, spec.old
    )))?;
    umask(Mode::from_bits_truncate(spec.process_context.umask));
    become_user(&spec.process_context)?;
    let bytes = |bytes: &Vec<u8>| OsString::from_vec(bytes.clone());
    let cause = Command::new(&spec.program)
        .args(spec.arguments.iter().map(bytes))
        .env_clear()
        .envs(variables(&spec.process_context.environment))
        .env(process::MARKER, &spec.marker)
        .env(process::TAPS, &spec.taps)
        .current_dir(&spec.folder)
        .stdin(Stdio::null())
        .exec();
    Err(LaunchError::at(format!("starting {}", spec.program.display()))(cause))
}

fn variables(environment: &[Vec<u8>]) -> impl Iterator<Item = (&OsStr, &OsStr)> {
    environment.iter().filter_map(|variable| {
        let at = variable.iter().position(|byte| *byte == b'=')?;
        let (name, value) = variable.split_at(at);
        Some((OsStr::from_bytes(name), OsStr::from_bytes(value.get(1..)?)))
    })
}

fn become_user(process_context: &ProcessContext) -> Result<(), LaunchError> {
    let ([uid, euid, suid], [gid, egid, sgid]) = (
        process_context.users.map(Uid::from_raw),
        process_context.groups.map(Gid::from_raw),
    );
    if Uid::effective() == euid && Gid::effective() == egid && !Uid::effective().is_root() {
        return Ok(());
    }
    let others: Vec<Gid> = process_context
        .other_groups
        .iter()
        .copied()
        .map(Gid::from_raw)
        .collect();
    setgroups(&others)
        .and_then(|()| setresgid(gid, egid, sgid))
        .and_then(|()| setresuid(uid, euid, suid))
        .map_err(io::Error::from)
        .map_err(LaunchError::at(format!("becoming user {euid}")))
}

fn run_on(processors: &[usize]) -> Result<(), LaunchError> {
    let mut set = CpuSet::new();
    processors
        .iter()
        .try_for_each(|processor| set.set(*processor))
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &set))
        .map_err(io::Error::from)
        .map_err(LaunchError::at(format!("running on processors {processors:?}")))
}

/// Sets one limit, unless it is so already: a lower one than one's own can't be raised again without rights.
fn limit(name: &str, soft: Option<u64>, hard: Option<u64>) -> Result<(), LaunchError> {
    let Some(resource) = resource(name) else { return Ok(()) };
    let wanted = (soft.unwrap_or(RLIM_INFINITY), hard.unwrap_or(RLIM_INFINITY));
    let failed = || LaunchError::at(format!("setting the limit `{name}` to {wanted:?}"));
    let found = getrlimit(resource).map_err(io::Error::from).map_err(failed())?;
    if found == wanted {
        return Ok(());
    }
    setrlimit(resource, wanted.0, wanted.1)
        .map_err(io::Error::from)
        .map_err(failed())
}

/// Joins the old process's control groups, where they are not this one's already.
fn join_cgroups(cgroups: &[(String, String)]) -> Result<(), LaunchError> {
    let read = |path: &str| fs::read_to_string(path).map_err(LaunchError::at(format!("reading {path}")));
    let (own, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
    for (controllers, path) in cgroups {
        if own
            .lines()
            .any(|line| line.ends_with(&format!(":{controllers}:{path}")))
        {
            continue;
        }
        let failed = || LaunchError::at(format!("joining the control group {controllers}:{path}"));
        let folder = mounted(&mounts, controllers, path).ok_or_else(|| failed()(io::ErrorKind::NotFound.into()))?;
        fs::write(folder.join("cgroup.procs"), std::process::id().to_string()).map_err(failed())?;
    }
    Ok(())
}

/// The folder of a control group: `proc_pid_mountinfo(5)`.
fn mounted(mountinfo: &str, controllers: &str, path: &str) -> Option<PathBuf> {
    let line = |line: &str| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut words = kind.split(' ');
        let kind = words.next()?;
        let options = words.nth(1)?;
        let is_it = if controllers.is_empty() {
            kind == "cgroup2"
        } else {
            let has = |wanted: &str| options.split(',').any(|option| option == wanted);
            kind == "cgroup" && controllers.split(',').all(has)
        };
        let mut words = mount.split(' ').skip(3);
        let (root, at) = (words.next()?, words.next()?);
        let below = Path::new(path).strip_prefix(root).ok()?;
        is_it.then(|| Path::new(at).join(below))
    };
    mountinfo.lines().find_map(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_group_is_found_below_its_mount() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n\
                      31 23 0:27 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let memory = mounted(mounts, "memory", "/vms/vm42");
        assert_eq!(memory.as_deref(), Some(Path::new("/sys/fs/cgroup/memory/vms/vm42")));
        let unified = mounted(mounts, "", "/vms");
        assert_eq!(unified.as_deref(), Some(Path::new("/sys/fs/cgroup/unified/vms")));
        assert_eq!(mounted(mounts, "cpu", "/"), None);
    }

    #[test]
    fn variables_keep_what_follows_the_first_equals_sign() {
        let environment = [b"A=b=c".to_vec(), b"nonsense".to_vec()];
        let found: Vec<_> = variables(&environment).collect();
        assert_eq!(found, [(OsStr::new("A"), OsStr::new("b=c"))]);
    }
}
