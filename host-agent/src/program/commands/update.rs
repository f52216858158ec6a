//! The bare command: brings a guest up to date from the patch directory.

use super::apply::{ALREADY, apply_one, not_done, pending, refused, say_who_has_not_moved_over};
use super::finish::ended;
use super::status;
use super::steps::{APPLY, so_far};
use super::target::target;
use crate::program::cli::Options;
use crate::program::failure::{Failure, exit_code};
use crate::program::report::{Guest, Patch, Patches};
use guest_core::kernel::livepatch;
use guest_core::module::PatchModule;
use host_agent::domains;
use host_agent::hypervisor::Identity;
use host_agent::module_file::{self, FileError};
use host_agent::outcome::GuestState;
use host_agent::session::{Access, Session};
use host_agent::upgrade::update_check::update_due;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The state of a module that a newer one replaces.
const SUPERSEDED: &str = "superseded";

/// Applies every module of the patch directory that was made for the guest's very kernel and is not applied yet, oldest
/// first. Where one replaces all others, the older ones are left out. One that fails does not keep the others from being tried, unless it leaves the guest not as before; the report says why for
/// each.
pub fn update(options: &Options) -> Result<(Patches, Option<Failure>), Failure> {
    let target = target(options)?;
    let files = modules(&options.patches)?;
    // All that is read of the host comes before the guest, whose reader can open nothing.
    let files: Vec<_> = files.into_iter().map(|path| (module_file::read(&path), path)).collect();
    let sandbox = options.sandbox.sandbox();
    let (mut session, upgrade_due) = Session::open_divided(&target, Access::Change, sandbox, upgrade_due)?;
    session.recover()?;
    let mut batch = Batch::default();
    batch.finish(&mut session, options);
    batch.apply_all(&mut session, options, files);
    let Batch {
        mut patches,
        first,
        stopped,
        failed,
        wanted,
    } = batch;
    say_who_has_not_moved_over(&mut patches, &session);
    let incomplete = first.map(|code| Failure::Incomplete {
        failed,
        all: wanted,
        code,
    });
    let (upgrade_due, unknown) = match upgrade_due {
        Ok(due) => (due, None),
        Err(failure) => (None, Some(failure)),
    };
    let failure = stopped.or(incomplete).or(unknown);
    let failure = failure.map(|failure| failure.after(so_far(&patches)));
    let report = Patches {
        guest: Guest::of(&session),
        patches,
        upgrade_due,
    };
    Ok((report, failure))
}

/// Whether the guest's QEMU was replaced on the host since it started.
fn upgrade_due(vm: &Identity) -> Result<Option<String>, Failure> {
    let Some(version) = vm.version else { return Ok(None) };
    let domains = domains::all()?;
    let domain = domains.iter().find(|domain| domain.pid == vm.pid);
    let program = domain.and_then(|domain| domain.binary.as_ref());
    Ok(update_due(version, vm.pid, program).map(|due| due.to_string()))
}

/// A file of the patch directory that was read.
type Read = (Result<Vec<u8>, FileError>, PathBuf);

/// What was done with the modules so far.
#[derive(Default)]
struct Batch {
    patches: Vec<Patch>,
    /// The exit code of the first failure.
    first: Option<u8>,
    /// The failure after which the guest must not be changed any more.
    stopped: Option<Failure>,
    failed: usize,
    wanted: usize,
}

impl Batch {
    /// Waits for the end of a transition. Where it does not come, no other patch can be applied.
    fn finish(&mut self, session: &mut Session, options: &Options) {
        match session.finish(options.patching().timeout) {
            Ok(None) => {}
            Ok(Some(finished)) => self.patches.push(ended(&finished)),
            Err(failure) => {
                self.patches = status::patches_in_transition(session);
                self.stopped = Some(failure.into());
            }
        }
    }

    /// Applies the modules, oldest first. Where the newest one that replaces all others is in force, there is no place for those before it; where it
    /// is not, the one before it is tried.
    fn apply_all(&mut self, session: &mut Session, options: &Options, files: Vec<Read>) {
        let (mut older, mut newer) = (files, Vec::new());
        while let Some(at) = older.iter().rposition(|file| replaces_others(session, file)) {
            let mut behind = older.split_off(at);
            let newest = behind.remove(0);
            behind.append(&mut newer);
            newer = behind;
            let by = module_file::stem(&newest.1);
            if self.apply(session, options, newest) {
                self.supersede(session, std::mem::take(&mut older), &by);
            }
        }
        for file in older.into_iter().chain(newer) {
            self.apply(session, options, file);
        }
    }

    /// Applies one file. Gives true where it is in force.
    fn apply(&mut self, session: &mut Session, options: &Options, (bytes, path): Read) -> bool {
        if self.stopped.is_some() {
            return false;
        }
        match consider(session, options, &path, bytes) {
            Ok(Some(patch)) => {
                self.wanted += 1;
                let in_force = [APPLY.done, ALREADY].contains(&patch.state.as_str());
                self.patches.push(patch);
                in_force
            }
            Ok(None) => false,
            Err(error) => {
                self.wanted += 1;
                self.failed += 1;
                self.first.get_or_insert(exit_code::of(&error));
                let reason = error.chain().join(": ");
                self.patches.push(not_done(&path, APPLY.after(&error), Some(reason)));
                if error.guest_state() != GuestState::AsBefore {
                    self.stopped = Some(error);
                }
                false
            }
        }
    }

    /// Says of the modules for this kernel that a newer one has taken their place.
    fn supersede(&mut self, session: &Session, older: Vec<Read>, by: &str) {
        let of_this_kernel = |file: &&Read| with_module(file, |module| is_of(session, module));
        let superseded = older.iter().filter(of_this_kernel);
        let reason = || Some(format!("{by} replaces all others"));
        let superseded = superseded.map(|(_, path)| not_done(path, SUPERSEDED, reason()));
        self.patches.extend(superseded);
    }
}

/// True where a file is a module for the guest's kernel that replaces all other patches. What cannot be read is dealt with in its turn.
fn replaces_others(session: &Session, file: &Read) -> bool {
    let replaces = |module: &PatchModule<'_>| {
        let layout = livepatch::layout(&session.live()).ok()?;
        module.patch(&layout).ok()?.replace
    };
    with_module(file, |module| is_of(session, module) && replaces(module) == Some(true))
}

/// True where a file is a module of which `holds` is true.
fn with_module((bytes, _): &Read, holds: impl FnOnce(&PatchModule<'_>) -> bool) -> bool {
    let bytes = bytes.as_deref().ok();
    bytes
        .and_then(|bytes| PatchModule::parse(bytes).ok())
        .is_some_and(|module| holds(&module))
}

fn is_of(session: &Session, module: &PatchModule<'_>) -> bool {
    module.info().release() == Some(session.kernel().release.as_str())
}

/// Applies one file; `None` where it is for another kernel.
fn consider(
    session: &mut Session,
    options: &Options,
    path: &Path,
    bytes: Result<Vec<u8>, FileError>,
) -> Result<Option<Patch>, Failure> {
    let bytes = bytes?;
    let module = PatchModule::parse(&bytes).map_err(|source| refused(path, source.into()))?;
    if !is_of(session, &module) {
        tracing::info!(
            "{}: for kernel {}",
            path.display(),
            module.info().release().unwrap_or("?")
        );
        return Ok(None);
    }
    let applied = apply_one(session, options, path, &bytes);
    applied
        .or_else(|failure| pending(path, &failure).ok_or(failure))
        .map(Some)
}

/// The modules of a directory: by age, those of one age by name.
fn modules(directory: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |source| Failure::File {
        path: directory.to_owned(),
        source,
    };
    let mut found: Vec<(SystemTime, PathBuf)> = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if module_file::is_module(&path) {
            let modified = entry
                .metadata()
                .and_then(|metadata| metadata.modified())
                .map_err(failed)?;
            found.push((modified, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}
