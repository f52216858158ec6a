//! Splits a patch that changes several objects of the guest (the image and modules) where not all of them are loaded. The part for loaded
//! objects is applied. The rest is pending, and is applied as a patch of its own once its module is loaded.

use super::{Refusal, targets};
use crate::kernel::resolve::GuestSymbols;
use crate::kernel::{KernelError, Live};
use crate::module::{AltLayout, AreaKind, ImageError, Patch, PatchModule, PatchObject};
use crate::registry::Registry;
use std::collections::BTreeSet;

/// The objects of a patch that are not patched now.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// SHA-256 of the module file, in hex.
    digest: String,
    /// Modules that the guest has not loaded.
    pub pending: Vec<String>,
    /// Objects that an earlier part of the same module has patched.
    done: Vec<PatchObject>,
}

/// Removes from `patch` the objects that are not patched now, and gives them.
pub(super) fn split(
    live: &Live<'_>,
    symbols: &GuestSymbols<'_>,
    registry: &Registry,
    digest: &str,
    patch: &mut Patch,
) -> Result<Parts, KernelError> {
    let patched: BTreeSet<Option<&str>> = registry
        .records()
        .filter(|record| record.digest == digest)
        .flat_map(|record| record.functions.iter().map(|function| function.object.as_deref()))
        .collect();
    let mut parts = Parts {
        digest: digest.to_owned(),
        ..Parts::default()
    };
    for object in std::mem::take(&mut patch.objects) {
        match object.name.as_deref() {
            name if patched.contains(&name) => parts.done.push(object),
            Some(name) if !is_live(live, symbols, name)? => parts.pending.push(name.to_owned()),
            _ => patch.objects.push(object),
        }
    }
    Ok(parts)
}

fn is_live(live: &Live<'_>, symbols: &GuestSymbols<'_>, name: &str) -> Result<bool, KernelError> {
    match symbols.module(name)? {
        Some(module) => targets::is_live(live, module),
        None => Ok(false),
    }
}

impl Parts {
    /// True where an earlier part of the module is in the guest.
    pub fn is_later(&self) -> bool {
        !self.done.is_empty()
    }

    /// The name under which `patch`, the remaining part of the patch of `module`, is applied: the module's name; for a later part with the
    /// names of its objects.
    pub fn id(
        &self,
        registry: &Registry,
        module: &PatchModule<'_>,
        patch: &Patch,
        alternatives: &AltLayout,
    ) -> Result<String, Refusal> {
        let id = module.name().to_owned();
        let mut records = registry.records();
        let first = records.find(|record| record.id == id || record.digest == self.digest);
        let Some(first) = first else {
            return match patch.objects.as_slice() {
                [] => Err(Refusal::Pending {
                    id,
                    objects: self.pending.clone(),
                }),
                _ => Ok(id),
            };
        };
        if first.digest != self.digest {
            return Err(Refusal::OtherModule {
                id,
                applied: first.digest.clone(),
                file: self.digest.clone(),
            });
        }
        if patch.objects.is_empty() {
            return Err(Refusal::AlreadyApplied { id });
        }
        let names = patch
            .objects
            .iter()
            .map(|object| object.name.as_deref().unwrap_or("vmlinux"));
        let objects = names.collect::<Vec<_>>().join("+");
        if let Some(section) = self.shared_data(module, patch, alternatives)? {
            return Err(Refusal::SharedData {
                section,
                id: first.id.clone(),
                objects,
            });
        }
        Ok(format!("{id}:{objects}"))
    }

    /// The name of a section with variables that both parts would have.
    fn shared_data(
        &self,
        module: &PatchModule<'_>,
        patch: &Patch,
        alternatives: &AltLayout,
    ) -> Result<Option<String>, ImageError> {
        let done = Patch {
            objects: self.done.clone(),
            ..patch.clone()
        };
        let variables = |patch: &Patch| {
            let image = module.image(patch, alternatives)?;
            let sections = image.layout().sections.iter().cloned();
            let data = sections.filter(|placed| matches!(placed.area, AreaKind::Data | AreaKind::PerCpu));
            Ok::<Vec<_>, ImageError>(data.collect())
        };
        let (old, new) = (variables(&done)?, variables(patch)?);
        let mut shared = new
            .into_iter()
            .filter(|new| old.iter().any(|old| old.section == new.section));
        Ok(shared.next().map(|section| section.name))
    }
}
