//! The bare command: brings a guest up to date from the patch directory.

use super::apply::{apply_one, not_done, pending, refused};
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
use host_agent::upgrade::due::due;
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
    session.tidy()?;
    let mut patches = Vec::new();
    let (mut first, mut stopped) = (None, None);
    let mut failed = 0;
    let mut wanted = 0;
    let (files, superseded) = newest(&session, files);
    patches.extend(superseded);
    for (bytes, path) in files {
        let path = path.as_path();
        match consider(&mut session, options, path, bytes) {
            Ok(Some(patch)) => {
                wanted += 1;
                patches.push(patch);
            }
            Ok(None) => {}
            Err(error) => {
                wanted += 1;
                failed += 1;
                first.get_or_insert(exit_code::of(&error));
                patches.push(not_done(path, APPLY.after(&error), Some(error.chain().join(": "))));
                if error.guest_state() != GuestState::AsBefore {
                    stopped = Some(error);
                    break;
                }
            }
        }
    }
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
    let survey = domains::all()?;
    let domain = survey.iter().find(|domain| domain.pid == vm.pid);
    let program = domain.and_then(|domain| domain.binary.as_ref());
    Ok(due(version, vm.pid, program).map(|due| due.to_string()))
}

/// A file of the patch directory that was read.
type Read = (Result<Vec<u8>, FileError>, PathBuf);

/// The files from the last one on that replaces all other patches of this kernel, and what the report says of those before it.
fn newest(session: &Session, files: Vec<Read>) -> (Vec<Read>, Vec<Patch>) {
    let Some(last) = files.iter().rposition(|file| replaces_others(session, file)) else {
        return (files, Vec::new());
    };
    let mut older = files;
    let newest = older.split_off(last);
    let by = newest
        .first()
        .map(|(_, path)| module_file::stem(path))
        .unwrap_or_default();
    let of_this_kernel = older
        .iter()
        .filter(|file| with_module(file, |module| is_of(session, module)));
    let superseded =
        of_this_kernel.map(|(_, path)| not_done(path, SUPERSEDED, Some(format!("{by} replaces all others"))));
    (newest, superseded.collect())
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
