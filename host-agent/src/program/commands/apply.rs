//! `apply` and `check`.

use super::describe::{describe, used};
use super::status;
use super::steps::{APPLY, IN_TRANSITION, Steps};
use super::target::open;
use crate::program::cli::{ModelName, Options};
use crate::program::failure::Failure;
use crate::program::report::{Guest, Identity, Patch, Patches, Pause, Verified};
use guest_core::module::PatchModule;
use guest_core::plan::{self, Checksums, Refusal};
use guest_core::registry::Record;
use host_agent::hypervisor::Activity;
use host_agent::module_file;
use host_agent::session::{Access, Changed, PatchError, Session};
use std::path::{Path, PathBuf};

/// The state of a patch that is in the guest already.
pub(super) const ALREADY: &str = "already applied";

/// Applies modules one after another; the first that fails ends it, and those before it stay: the report says which.
pub fn apply(options: &Options, files: &[PathBuf]) -> Result<(Patches, Option<Failure>), Failure> {
    let modules = read(files)?;
    let mut session = open(options, Access::Change)?;
    session.recover()?;
    let mut steps = Steps::new(APPLY);
    for (path, bytes) in modules {
        steps.step(not_done(path, APPLY.not_done, None), || {
            apply_one(&mut session, options, path, &bytes).or_else(|failure| pending(path, &failure).ok_or(failure))
        });
    }
    say_who_has_not_moved_over(&mut steps.patches, &session);
    let report = Patches {
        guest: Guest::of(&session),
        patches: steps.patches,
        upgrade_due: None,
    };
    Ok((report, steps.failure))
}

/// Says of a patch in transition what the guest says of it.
pub(super) fn say_who_has_not_moved_over(patches: &mut [Patch], session: &Session) {
    for patch in patches.iter_mut().filter(|patch| patch.state == IN_TRANSITION) {
        let file = patch.file.take();
        if let Some(shown) = status::patches_in_transition(session).into_iter().next() {
            *patch = shown;
        }
        patch.file = file;
    }
}

/// The files are read before the guest, whose reader can open none.
fn read(files: &[PathBuf]) -> Result<Vec<(&PathBuf, Vec<u8>)>, Failure> {
    let modules = files.iter().map(|path| Ok((path, module_file::read(path)?)));
    modules.collect()
}

/// Plans all that `apply` would do, and stops there.
pub fn check(options: &Options, files: &[PathBuf]) -> Result<Patches, Failure> {
    let modules = read(files)?;
    let session = open(options, Access::Read)?;
    let mut patches = Vec::new();
    let mut planned: Vec<Record> = Vec::new();
    for (path, bytes) in modules {
        let record = match session.check(path, &bytes, &options.patching()) {
            Ok(plan) => plan.record,
            Err(failure) => {
                let there = already_applied(&session, path, failure.into());
                patches.push(there.or_else(|failure| pending(path, &failure).ok_or(failure))?);
                continue;
            }
        };
        if planned.iter().any(|earlier| earlier.digest == record.digest) {
            patches.push(describe(&record, Some(path), ALREADY, "original"));
            continue;
        }
        if let Some(refusal) = clash(&planned, &record) {
            return Err(refused(path, refusal));
        }
        let mut patch = describe(&record, Some(path), "would apply", "original");
        // What was planned for has been read before.
        let module = PatchModule::parse(&bytes).ok();
        patch.module = module.as_ref().map(Identity::of);
        say_what_it_was_made_for(&mut patch, &session, module.as_ref(), &record);
        say_what_stays(&mut patch, &record);
        say_what_it_covers(&mut patch, &session, &record);
        patches.push(patch);
        planned.push(record);
    }
    Ok(Patches {
        guest: Guest::of(&session),
        patches,
        upgrade_due: None,
    })
}

/// That a module does not fit.
pub(super) fn refused(path: &Path, refusal: Refusal) -> Failure {
    Failure::Patch(PatchError::Refused {
        path: path.to_owned(),
        source: Box::new(refusal),
    })
}

/// Why `record` could not be applied once those before it are, each of which was planned for the guest as it is now.
fn clash(before: &[Record], record: &Record) -> Option<Refusal> {
    let earlier = before.iter().find(|earlier| earlier.id == record.id)?;
    Some(Refusal::OtherModule {
        id: record.id.clone(),
        applied: earlier.digest.clone(),
        file: record.digest.clone(),
    })
}

/// A patch that has to wait for the guest to load what it is for: no failure, as what is not loaded has no flaw.
pub(super) fn pending(path: &Path, failure: &Failure) -> Option<Patch> {
    let Failure::Patch(PatchError::Refused { source, .. }) = failure else {
        return None;
    };
    let Refusal::Pending { id, objects } = source.as_ref() else {
        return None;
    };
    Some(Patch {
        id: id.clone(),
        pending: objects.clone(),
        ..not_done(path, "pending", None)
    })
}

/// The patch that is applied already, of the very same module, where that is why it is not applied again; else the failure.
fn already_applied(session: &Session, path: &Path, failure: Failure) -> Result<Patch, Failure> {
    let id = match &failure {
        Failure::Patch(PatchError::Refused { source, .. }) => match source.as_ref() {
            Refusal::AlreadyApplied { id } => id,
            _ => return Err(failure),
        },
        _ => return Err(failure),
    };
    let active = status::active(session, id).map_err(|refusal| refused(path, refusal))?;
    Ok(Patch {
        file: Some(path.display().to_string()),
        state: ALREADY.to_owned(),
        ..active
    })
}

/// A patch of which nothing is in the guest.
pub(super) fn not_done(path: &Path, state: &str, reason: Option<String>) -> Patch {
    Patch {
        id: module_file::stem(path),
        file: Some(path.display().to_string()),
        state: state.to_owned(),
        reason,
        ..Patch::default()
    }
}

/// Applies one module, unless that very one is applied already.
pub(super) fn apply_one(session: &mut Session, options: &Options, path: &Path, bytes: &[u8]) -> Result<Patch, Failure> {
    tracing::debug!(guest = session.shown(), "applying {}", path.display());
    let Changed {
        record,
        committed,
        left,
        ..
    } = match session.apply(path, bytes, &options.patching()) {
        Ok(applied) => applied,
        Err(failure) => return already_applied(session, path, failure.into()),
    };
    let mut patch = describe(&record, Some(path), APPLY.done, "patched");
    patch.pause = Some(Pause::from(&committed));
    say_what_it_was_made_for(&mut patch, session, PatchModule::parse(bytes).ok().as_ref(), &record);
    say_what_stays(&mut patch, &record);
    say_what_it_covers(&mut patch, session, &record);
    patch.warnings.extend(left.map(|why| {
        format!("the code of a patch that was replaced is still in the guest, and the next vmpatch tries to remove it: {why}")
    }));
    say_what_began(&mut patch, session);
    if options.model == ModelName::None {
        patch
            .warnings
            .push("applied with --model none: tasks inside an old function finish it as it was".to_owned());
    }
    Ok(patch)
}

/// What QEMU does with the guest's memory by now. It may have begun within the pause: nothing was under way when that was asked for.
pub(super) fn say_what_began(patch: &mut Patch, session: &Session) {
    if let Ok(Activity::Busy(busy)) = session.activity() {
        patch.warnings.push(format!(
            "{busy}, and may have begun in the pause: what it makes may hold half of this change; cancel it, or run vmpatch there"
        ));
    }
}

/// Whether the guest's code and types were compared with the patch's own idea of them, and what risks its maker took.
fn say_what_it_was_made_for(patch: &mut Patch, session: &Session, module: Option<&PatchModule<'_>>, record: &Record) {
    let Some(module) = module else { return };
    patch.verified = Some(Verified::of(module, record));
    let (state, warning) = match plan::checksums(&session.live(), module) {
        Ok(Checksums::Compared) => ("compared", None),
        Ok(Checksums::Incomplete(symbols)) => (
            "incomplete",
            Some(format!(
                "not verified: the module has no checksum of the type of {}, which the guest has",
                symbols.join(", ")
            )),
        ),
        Ok(Checksums::NotInKernel) => (
            "none in kernel",
            (patch.verified != Some(Verified::All)).then(|| {
                "not verified: the guest's kernel has no checksums of types, and the module no sizes of them (.BTF.base)"
                    .to_owned()
            }),
        ),
        Ok(Checksums::Sizes) => ("sizes only", None),
        Ok(Checksums::NotInModule) => (
            "none in module",
            Some(
                "not verified: the module has no checksums of the types that it uses, which the guest's kernel has"
                    .to_owned(),
            ),
        ),
        Err(error) => (
            "unknown",
            Some(format!(
                "not verified: the kernel's checksums of types can't be read: {error}"
            )),
        ),
    };
    patch.checksums = Some(state);
    patch.warnings.extend(warning);
    patch.warnings.extend(parameters(module));
    let allowed = module
        .note()
        .ok()
        .flatten()
        .map(|note| note.allowed)
        .unwrap_or_default();
    patch.warnings.extend(allowed.iter().map(|allowed| {
        format!(
            "built with --allow {}: {}: {}",
            allowed.risk, allowed.place, allowed.reason
        )
    }));
}

/// What becomes of the parameters of a module (`parmtype` in its `.modinfo`: name and type, since Linux 2.6).
fn parameters(module: &PatchModule<'_>) -> Option<String> {
    let types = module.info().all("parmtype");
    let names: Vec<_> = types.map(|text| text.split(':').next().unwrap_or(text)).collect();
    let keeps = match names.as_slice() {
        [] => return None,
        [name] => format!("{name} keeps its value"),
        _ => format!("{} keep their values", names.join(", ")),
    };
    Some(format!(
        "{keeps} of the module's file: a patch has no parameters in the guest's /sys/module"
    ))
}

/// Warns of a patch whose code a revert is going to leave in the guest.
fn say_what_stays(patch: &mut Patch, record: &Record) {
    if record.must_stay() {
        patch.warnings.push(format!(
            "revert will put the old functions back, but keep this patch's code and variables in the guest until it reboots: the \
             guest may use {}",
            used(record)
        ));
    }
}

/// Warns of functions that earlier patches hold, which stay: their code does not run any more.
fn say_what_it_covers(patch: &mut Patch, session: &Session, record: &Record) {
    let stay = |other: &&Record| other.id != record.id && !record.replaces.contains(&other.id);
    for other in session.registry().records().filter(stay) {
        let shared = other
            .functions
            .iter()
            .map(|function| (function.name.as_str(), function.old));
        let shared: Vec<_> = shared
            .filter(|(_, old)| record.functions.iter().any(|own| own.old == *old))
            .collect();
        if !shared.is_empty() && other.order < record.order {
            let names: Vec<_> = shared.into_iter().map(|(name, _)| name).collect();
            patch.warnings.push(format!(
                "{} of {} is overridden: unless this module was built from a source with that fix, the fix is gone there",
                names.join(", "),
                other.id
            ));
        }
    }
}
