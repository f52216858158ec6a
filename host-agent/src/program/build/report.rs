//! What `build` says when it is done.

use patch_build::sheet::ReviewSheet;
use serde::Serialize;
use std::fmt::Write;

/// What `build` made.
#[derive(Debug, Clone, Serialize)]
pub struct Building {
    /// The module's file; none where nothing was written.
    pub file: Option<String>,
    /// Its length.
    pub bytes: usize,
    /// What is in it.
    pub sheet: ReviewSheet,
}

/// What was built, and the review sheet if it is wanted.
pub fn text(report: &Building, explain: bool) -> String {
    let mut text = String::new();
    if explain {
        let _ = writeln!(text, "{}", report.sheet);
    }
    if let Some(file) = &report.file {
        let replaced = report.sheet.items.iter().filter(|item| item.old_size.is_some()).count();
        let _ = writeln!(
            text,
            "{file}: {} bytes, {replaced} functions of {} replaced",
            report.bytes, report.sheet.kernel
        );
        if !explain {
            for warning in &report.sheet.warnings {
                let _ = writeln!(text, "warning: {warning}");
            }
        }
    }
    text
}
