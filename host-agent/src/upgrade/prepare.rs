//! All that can be known before the new process is started: whether the guest can be moved, and how.

use super::UpgradeOptions;
use super::argv::{self, Context, Rewritten};
use super::binary::{self, Version};
use super::error::UpgradeError;
use super::files::{self, OpenFiles};
use super::fit;
use super::identity::Identity;
use super::method;
use super::named;
use super::process_context::{self, ProcessContext};
use crate::domains::names::Name;
use crate::domains::{self, Domain};
use crate::hypervisor::Accelerator;
use crate::lock::{DomainLock, LockError};
use crate::session::{OpenError, Session};
use crate::target::{Selector, Target};
use qmp::migrate::{Facts, Method, Pair};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the old QEMU has to greet.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// The first QEMU seen to lose no writes of an emulated guest that is copied while it runs; see `qmp::migrate::Limits::paused_throughout`.
const FIRST_WITHOUT_LOSS: Version = (10, 0, 0);

/// A move that nothing speaks against so far.
pub(super) struct Prepared {
    /// The old process.
    pub(super) old: Domain,
    /// Its QMP socket.
    pub(super) socket: PathBuf,
    /// The right to change it.
    pub(super) lock: DomainLock,
    /// What must arrive.
    pub(super) identity: Identity,
    /// The guest, for the report.
    pub(super) shown: String,
    /// `uname -r`.
    pub(super) release: String,
    /// The new program.
    pub(super) program: PathBuf,
    /// Its version.
    pub(super) version: Version,
    /// The old process's machine.
    pub(super) facts: Facts,
    /// It is connected.
    pub(super) pair: Pair,
    /// The new command line.
    pub(super) line: Rewritten,
    /// The new working folder.
    pub(super) folder: PathBuf,
    /// Its names in the file system, the socket at which both are reached last: it changes hands last.
    pub(super) names: Vec<Name>,
    /// The files that the old process has open.
    pub(super) files: OpenFiles,
    /// What the new process runs as.
    pub(super) process_context: ProcessContext,
    /// How the memory gets there.
    pub(super) method: Method,
    /// The guest must be paused while it is copied.
    pub(super) paused_throughout: bool,
    /// What the operator should know.
    pub(super) warnings: Vec<String>,
}

/// Finds out whether the guest can be moved, and how.
///
/// # Errors
///
/// It can't be moved.
pub(super) fn prepare(target: &Target, wanted: &UpgradeOptions) -> Result<Prepared, UpgradeError> {
    let program =
        std::path::absolute(&wanted.qemu).map_err(UpgradeError::host(format!("finding {}", wanted.qemu.display())))?;
    let version = binary::version(&program)?;
    let Understood {
        shown,
        release,
        pid,
        is_emulated,
        identity,
        lock,
    } = understand(target)?;
    let (socket, old) = domain_of(target, pid, &shown)?;
    tracing::debug!(guest = shown, "looking at process {pid}");
    let pair = Pair::new(&socket, CONNECT_TIME_MAX)?;
    let facts = pair.source_facts()?;
    fit::check_state(&pair)?;
    fit::check_program(&old)?;
    let (words, folder) = domains::command_line_of(pid)
        .map_err(UpgradeError::host(format!("reading the command line of process {pid}")))?;
    let context = Context {
        machine: facts.machine.clone(),
        old_program: old
            .binary
            .as_ref()
            .map(|binary| binary.path.clone())
            .unwrap_or_default(),
        new_program: program.clone(),
        data: wanted.data_dirs.clone(),
        taps: process_context::taps(pid),
        generation: facts.generation.clone(),
    };
    let line = argv::rewrite(&words, &context)?;
    let arguments = argv::arguments(&words);
    fit::check_networks(&facts)?;
    fit::check_bonds(&facts, &arguments)?;
    let ram = pair.source_ram(pid)?;
    let mut names: Vec<Name> = line.names.iter().map(|name| name.in_folder(&folder)).collect();
    names.sort_by_key(|name| is_same(&name.own, &socket));
    let files = OpenFiles::of(pid, &ram, files::real(&names))?;
    files.check_names(pid)?;
    named::check_unchanged(pid, &arguments, &folder, &files)?;
    named::check_log(&arguments, &folder, &files)?;
    let method = method::choose(&pair, &facts, version, &ram, wanted.method)?;
    if method == Method::Precopy {
        method::check_room(&ram)?;
    }
    let paused_throughout = method == Method::Precopy && is_emulated && facts.version < FIRST_WITHOUT_LOSS;
    let warnings = warnings(version, facts.version, paused_throughout);
    Ok(Prepared {
        old,
        socket,
        lock,
        identity,
        shown,
        release,
        program,
        version,
        facts,
        pair,
        line,
        folder,
        names,
        files,
        process_context: ProcessContext::of(pid)?,
        method,
        paused_throughout,
        warnings,
    })
}

/// What is read in the guest itself.
struct Understood {
    shown: String,
    release: String,
    pid: i32,
    is_emulated: bool,
    identity: Identity,
    lock: DomainLock,
}

fn understand(target: &Target) -> Result<Understood, UpgradeError> {
    let session = Session::open(target).map_err(overtaken)?;
    session.refuse_if_busy()?;
    let shown = session.shown();
    let identity = Identity::of(&session)?;
    tracing::info!(guest = shown, "{} places to compare", identity.len());
    Ok(Understood {
        shown,
        release: session.kernel().release.clone(),
        pid: session.identity().pid,
        is_emulated: session.identity().accelerator == Accelerator::Tcg,
        identity,
        // QEMU serves one client per socket.
        lock: session.into_lock()?,
    })
}

/// The guest's QMP socket, and its process as a domain.
fn domain_of(target: &Target, pid: i32, shown: &str) -> Result<(PathBuf, Domain), UpgradeError> {
    let Some(socket) = target.route.qmp_socket() else {
        let reason = "only a guest that is reached by a QMP socket can be moved";
        return Err(UpgradeError::unfit(shown, reason));
    };
    let old = Domain::of_peer(pid, socket)?;
    match old.is_libvirts() {
        true => Err(UpgradeError::Libvirt {
            domain: old.to_string(),
        }),
        false => Ok((socket.to_owned(), old)),
    }
}

fn warnings(new: Version, old: Version, paused_throughout: bool) -> Vec<String> {
    let [new_text, old_text] = [new, old].map(binary::spell);
    let older = (new < old).then(|| {
        format!(
            "{new_text} is older than {old_text}, from which the guest comes: QEMU promises the other direction only"
        )
    });
    let paused = paused_throughout.then(|| {
        format!("QEMU {old_text} loses what an emulated guest writes while it is copied: the guest is paused for all of the copy")
    });
    [older, paused].into_iter().flatten().collect()
}

/// One who waited for the lock of a process whose guest another one has moved meanwhile finds its socket in other hands, or nobody.
fn overtaken(error: OpenError) -> UpgradeError {
    match error {
        OpenError::OtherProcess { expected: old, .. } => UpgradeError::Overtaken { old },
        OpenError::Lock(LockError::Process { pid: old, cause }) if cause.kind() == ErrorKind::NotFound => {
            UpgradeError::Overtaken { old }
        }
        error => error.into(),
    }
}

/// Before anything else: what a command says of a domain whose only QMP socket is libvirt's would be of no use here.
///
/// # Errors
///
/// It is libvirt's.
pub fn refuse_libvirts(selector: &Selector) -> Result<(), UpgradeError> {
    let domains = domains::all()?;
    let found = match selector {
        Selector::QmpSocket(socket) => domains.by_qmp(socket),
        Selector::Name(name) => domains.iter().find(|domain| domain.name.as_ref() == Some(name)),
        Selector::Process(pid) => domains.iter().find(|domain| domain.pid == *pid),
    };
    match found.filter(|domain| domain.is_libvirts()) {
        Some(domain) => Err(UpgradeError::Libvirt {
            domain: domain.to_string(),
        }),
        None => Ok(()),
    }
}

/// Whether two paths lead to the same file.
pub(super) fn is_same(path: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    path == other || identity(path).is_some_and(|found| identity(other) == Some(found))
}
