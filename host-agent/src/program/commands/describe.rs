//! A patch of a record, for the report.

use crate::program::report::{Function, Patch};
use guest_core::registry::Record;
use std::path::Path;

/// State of a patch that was reverted, and whose code the guest may still use.
pub(super) const CODE_KEPT: &str = "reverted, code kept";

/// A patch, for the report.
pub(super) fn describe(record: &Record, path: Option<&Path>, state: &str, functions: &str) -> Patch {
    Patch {
        id: record.id.clone(),
        file: path.map(|path| path.display().to_string()),
        state: state.to_owned(),
        digest: Some(record.digest.clone()),
        model: Some(record.model.clone()),
        functions: record
            .functions
            .iter()
            .map(|function| Function::new(function, functions))
            .collect(),
        replaces: record.replaces.clone(),
        pending: record.pending.clone(),
        escapes: record.escapes.clone().unwrap_or_default(),
        ..Patch::default()
    }
}

/// A patch that is reverted: what has become of its code.
pub(super) fn describe_reverted(record: &Record) -> Patch {
    if !record.must_stay() {
        return describe(record, None, "reverted", "original");
    }
    Patch {
        reason: Some(format!("until it reboots, the guest may use {}", used(record))),
        ..describe(record, None, CODE_KEPT, "original")
    }
}

/// What the guest may use of a patch after a revert.
pub(super) fn used(record: &Record) -> String {
    match record.escapes.as_deref() {
        None => "any of it, as the vmpatch that applied it has not looked".to_owned(),
        Some(names) => names.join(", "),
    }
}
