//! All that can be known before the new process is started: whether the guest can be moved, and how.

use super::binary::{self, Version};
use super::error::UpgradeError;
use super::files::{self, OpenFiles};
use super::identity::Identity;
use super::line::{self, Context, Rewritten};
use super::named;
use super::origin::{self, Origin};
use crate::cli::{Options, UpgradeOptions, WayName};
use crate::domains::names::Name;
use crate::domains::{self, Domain};
use crate::error::Failure;
use crate::lock::DomainLock;
use crate::progress::Progress;
use crate::session::{Session, Target};
use qmp::memory::Backing;
use qmp::migrate::{Facts, Pair, Way};
use qmp::{RamMap, RunState};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the old QEMU has to greet.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// The first QEMU that can hand guest RAM over as descriptors.
const FIRST_WITH_CPR: Version = (10, 0, 0);
/// The first QEMU seen to lose no writes of an emulated guest that is copied while it runs; see `qmp::migrate::Limits::standing`.
const FIRST_WITHOUT_LOSS: Version = (10, 0, 0);
/// Room in memory that is left for all else, in bytes.
const ROOM_LEFT: u64 = 64 << 20;

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
    let session = Session::open(&target, progress)?;
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
    check_state(&pair)?;
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
    };
    let line = line::rewrite(&words, &context).map_err(UpgradeError::from)?;
    check_networks(&facts)?;
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
    let arguments = line::arguments(&words);
    named::check_unchanged(pid, &arguments, &folder, &files)?;
    named::check_log(&arguments, &folder, &files)?;
    let way = choose_way(&pair, &facts, version, &ram, wanted.way)?;
    if way == Way::Precopy {
        check_room(&ram)?;
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

fn check_state(pair: &Pair) -> Result<(), UpgradeError> {
    let RunState::Other(state) = pair.source_state()? else {
        return Ok(());
    };
    let reason = match state.as_str() {
        "postmigrate" => {
            "all of it was sent to another process once; if it is to go on in this one, QMP `cont` lets it"
        }
        _ => "only one that runs, or is paused by its operator, is moved",
    };
    Err(UpgradeError::unfit(
        format!("the guest is in the state `{state}`"),
        reason,
    ))
}

/// A network that was plugged in later, which the command line does not tell.
fn check_networks(facts: &Facts) -> Result<(), UpgradeError> {
    if facts.networks.iter().any(|network| network.contains("type=user")) {
        return Err(UpgradeError::unfit(
            "a network of type `user`",
            "the guest's connections live in the old process; use a tap or a bridge, or -nic none where there is no network",
        ));
    }
    Ok(())
}

/// The best way that is open, or the one that the operator wants.
fn choose_way(
    pair: &Pair,
    facts: &Facts,
    version: Version,
    ram: &RamMap,
    wanted: Option<WayName>,
) -> Result<Way, UpgradeError> {
    let mut reasons = Vec::new();
    let ways = match wanted {
        Some(way) => vec![way.way()],
        None => vec![Way::CprTransfer, Way::IgnoreShared, Way::Precopy],
    };
    for way in ways {
        let in_the_way = obstacles(way, pair, facts, version, ram)?;
        if in_the_way.is_empty() {
            return Ok(way);
        }
        reasons.push(format!("{}: {}", way.name(), in_the_way.join("; ")));
    }
    Err(UpgradeError::unfit("QEMU can't send this guest", reasons.join(". ")))
}

fn obstacles(
    way: Way,
    pair: &Pair,
    facts: &Facts,
    version: Version,
    ram: &RamMap,
) -> Result<Vec<String>, UpgradeError> {
    let mut found = Vec::new();
    let files = kept_files(ram);
    match way {
        Way::CprTransfer => {
            for version in [facts.version, version]
                .into_iter()
                .filter(|version| *version < FIRST_WITH_CPR)
            {
                found.push(format!("QEMU {} does not know it", binary::spell(version)));
            }
            if !found.is_empty() {
                return Ok(found);
            }
        }
        Way::IgnoreShared if files != Some(ram.regions.len()) => {
            found.push("the guest's RAM is not in files that both processes can map".to_owned());
        }
        // Both would map the same file, and the new one would write old copies of pages over newer ones.
        Way::Precopy if files != Some(0) => {
            found.push("the guest's RAM is in a file that the new process would map, too".to_owned());
        }
        Way::IgnoreShared | Way::Precopy => {}
    }
    found.extend(pair.blockers(way)?);
    Ok(found)
}

/// How many regions of RAM lie in a file that has a name, and can be opened by it; None where one of them has lost its name.
fn kept_files(ram: &RamMap) -> Option<usize> {
    let mut count = 0;
    for region in &ram.regions {
        if let Backing::Shared(file) = &region.backing {
            if file.path.starts_with("/memfd:") || file.path.starts_with("/dev/zero") {
                continue;
            }
            let found = fs::metadata(Path::new(&file.path)).ok()?;
            if found.ino() != file.inode {
                return None;
            }
            count += 1;
        }
    }
    Some(count)
}

/// Whether two paths lead to the same file.
pub(super) fn is_same(path: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).ok().map(|found| (found.dev(), found.ino()));
    path == other || identity(path).is_some_and(|found| identity(other) == Some(found))
}

/// Whether the host has room for the guest's RAM once more.
fn check_room(ram: &RamMap) -> Result<(), UpgradeError> {
    let wanted: u64 = ram.regions.iter().map(|region| region.len).sum();
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = available(&text) else {
        return Ok(());
    };
    if available < wanted.saturating_add(ROOM_LEFT) {
        let what = format!("the host has {} MiB of memory left", available >> 20);
        let reason = format!("a copy of the guest's RAM needs {} MiB", wanted >> 20);
        return Err(UpgradeError::unfit(what, reason));
    }
    Ok(())
}

/// `proc_meminfo(5)`.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::available;

    #[test]
    fn the_hosts_memory_is_read_in_bytes() {
        assert_eq!(available("MemFree: 1 kB\nMemAvailable:   20480 kB\n"), Some(20 << 20));
        assert_eq!(available("MemFree: 1 kB\n"), None);
    }
}
