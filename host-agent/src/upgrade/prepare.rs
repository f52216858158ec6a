//! All that can be known before the new process is started: whether the guest can be moved, and how.

use super::binary::{self, Version};
use super::error::UpgradeError;
use super::files::{self, OpenFiles};
use super::fit;
use super::identity::Identity;
use super::line::{self, Context, Rewritten};
use super::named;
use super::origin::{self, Origin};
use super::way;
use crate::cli::{Options, UpgradeOptions};
use crate::domains::names::Name;
use crate::domains::{self, Domain};
use crate::error::Failure;
use crate::lock::{DomainLock, LockError};
use crate::progress::Progress;
use crate::session::{Session, Target};
use qmp::migrate::{Facts, Pair, Way};
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the old QEMU has to greet.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// The first QEMU seen to lose no writes of an emulated guest that is copied while it runs; see `qmp::migrate::Limits::standing`.
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
    pub(super) origin: Origin,
    /// How the memory gets there.
    pub(super) way: Way,
    /// The guest must stand while it is copied.
    pub(super) standing: bool,
    /// What the operator should know.
    pub(super) warnings: Vec<String>,
}

/// Looks at all of it.
pub(super) fn prepare(options: &Options, wanted: &UpgradeOptions, progress: &Progress) -> Result<Prepared, Failure> {
    refuse_libvirts(options)?;
    let target = Target::from_options(options)?;
    let program =
        std::path::absolute(&wanted.qemu).map_err(UpgradeError::host(format!("finding {}", wanted.qemu.display())))?;
    let version = binary::version(&program).map_err(UpgradeError::from)?;
    let session = Session::open(&target, progress).map_err(overtaken)?;
    session.refuse_if_busy()?;
    let (shown, release, pid) = (session.shown(), session.kernel.release.clone(), session.attached.pid());
    let is_emulated = session.attached.accelerator() == "tcg";
    let identity = Identity::of(&session).map_err(UpgradeError::from)?;
    progress.detail(&format!("{}: {} places to compare", shown, identity.len()));
    // QEMU serves one client per socket.
    let lock = session.into_lock()?;
    let old = Domain::of_peer(pid, &target.socket)?;
    if old.is_libvirts() {
        return Err(UpgradeError::Libvirt {
            domain: old.to_string(),
        }
        .into());
    }
    progress.step(&format!("{shown}: looking at process {pid}"));
    let pair = Pair::new(&target.socket, CONNECT_TIME_MAX).map_err(UpgradeError::from)?;
    let facts = pair.source_facts().map_err(UpgradeError::from)?;
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
        data: wanted.data_dir.clone(),
        taps: origin::taps(pid),
        generation: facts.generation.clone(),
    };
    let line = line::rewrite(&words, &context).map_err(UpgradeError::from)?;
    let arguments = line::arguments(&words);
    fit::check_networks(&facts)?;
    fit::check_bonds(&facts, &arguments)?;
    let mut warnings = Vec::new();
    if version < facts.version {
        let (new, old) = (binary::spell(version), binary::spell(facts.version));
        warnings.push(format!(
            "{new} is older than {old}, from which the guest comes: QEMU promises the other direction only"
        ));
    }
    let ram = pair.source_ram(pid).map_err(UpgradeError::from)?;
    let mut names: Vec<Name> = line.names.iter().map(|name| name.in_folder(&folder)).collect();
    names.sort_by_key(|name| is_same(&name.own, &target.socket));
    let files = OpenFiles::of(pid, &ram, files::real(&names))?;
    files.check_names(pid)?;
    named::check_unchanged(pid, &arguments, &folder, &files)?;
    named::check_log(&arguments, &folder, &files)?;
    let way = way::choose(&pair, &facts, version, &ram, wanted.way)?;
    if way == Way::Precopy {
        way::check_room(&ram)?;
    }
    let standing = way == Way::Precopy && is_emulated && facts.version < FIRST_WITHOUT_LOSS;
    if standing {
        warnings.push(format!(
            "QEMU {} loses what an emulated guest writes while it is copied: the guest stands for all of the copy",
            binary::spell(facts.version)
        ));
    }
    Ok(Prepared {
        old,
        socket: target.socket,
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
        origin: Origin::of(pid).map_err(UpgradeError::from)?,
        way,
        standing,
        warnings,
    })
}

/// One who waited for the lock of a process whose guest another one has moved meanwhile finds its socket in other hands, or nobody.
fn overtaken(failure: Failure) -> Failure {
    match failure {
        Failure::OtherProcess { expected: old, .. } => UpgradeError::Overtaken { old }.into(),
        Failure::Lock(LockError::Process { pid: old, cause }) if cause.kind() == ErrorKind::NotFound => {
            UpgradeError::Overtaken { old }.into()
        }
        failure => failure,
    }
}

/// Before anything else: what a command says of a domain whose only QMP socket is libvirt's would be of no use here.
fn refuse_libvirts(options: &Options) -> Result<(), Failure> {
    let survey = domains::all()?;
    let named = |domain: &&Domain| options.domain.is_some() && domain.name == options.domain;
    let found = match &options.qmp {
        Some(socket) => survey.by_qmp(socket),
        None => survey.iter().find(named),
    };
    match found.filter(|domain| domain.is_libvirts()) {
        Some(domain) => Err(UpgradeError::Libvirt {
            domain: domain.to_string(),
        }
        .into()),
        None => Ok(()),
    }
}

/// Whether two paths lead to the same file.
pub(super) fn is_same(path: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    path == other || identity(path).is_some_and(|found| identity(other) == Some(found))
}
