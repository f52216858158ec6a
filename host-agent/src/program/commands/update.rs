//! The bare command: brings a guest up to date from the patch directory.

use super::apply::{apply_one, not_done, pending, refused};
use super::steps::{APPLY, so_far};
use super::target::target;
use crate::program::cli::Options;
use crate::program::failure::{Failure, exit_code};
use crate::program::report::{Guest, Patch, Patches};
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

/// Applies every module of the patch directory that was made for the guest's very kernel and is not applied yet, oldest
/// first. One that fails does not keep the others from being tried, unless it leaves the guest not as before; the report says why for
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

/// Applies one file; `None` where it is for another kernel.
fn consider(
    session: &mut Session,
    options: &Options,
    path: &Path,
    bytes: Result<Vec<u8>, FileError>,
) -> Result<Option<Patch>, Failure> {
    let bytes = bytes?;
    let module = PatchModule::parse(&bytes).map_err(|source| refused(path, source.into()))?;
    if module.info().release() != Some(session.kernel().release.as_str()) {
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
