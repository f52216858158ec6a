//! What the program `in-box` does inside a host in a box: beside the guest's QEMU, as vmpatch is there.

pub mod bench;
pub mod cut_off;
pub mod cycles;

use std::fs;
use std::io;

/// What goes wrong inside the box, in words.
pub type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The threads of a process that are traced, or stopped by a tracer or a signal, as their state says: nothing of that may be left.
///
/// # Errors
///
/// The process has ended.
pub fn held_threads(pid: u32) -> io::Result<Vec<String>> {
    let mut held = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))?.flatten() {
        // A thread that ends meanwhile is held by nobody.
        let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.map_or("", str::trim)
        };
        let (tracer, state) = (field("TracerPid:"), field("State:"));
        if !matches!(tracer, "" | "0") || state.starts_with(['t', 'T']) {
            let thread = entry.file_name();
            held.push(format!("{}: {state}, traced by {tracer}", thread.to_string_lossy()));
        }
    }
    Ok(held)
}
