//! Many cycles of apply and revert in one process.

use super::bench::{open, options};
use super::{Result, held_threads};
use crate::figures::{Figures, micros};
use guest_core::guest::Changed;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// A line is printed after so many.
const TOLD_EACH: usize = 50;

/// Applies the module and reverts it so many times. No thread of the guest's process may be held after either.
///
/// # Errors
///
/// Something failed; a patch may be left in the guest.
pub fn run(name: &str, vmpatch: &Path, module: &Path, count: usize) -> Result<()> {
    let mut session = open(name, vmpatch)?;
    let pid = u32::try_from(session.identity().pid)?;
    let bytes = fs::read(module)?;
    let (mut pauses, mut tries, start) = (Vec::new(), 0, Instant::now());
    let free = || -> Result<()> {
        match held_threads(pid)?.as_slice() {
            [] => Ok(()),
            held => Err(format!("threads are held: {held:?}").into()),
        }
    };
    for cycle in 1..=count {
        let Changed {
            record,
            committed: applied,
            ..
        } = session.apply(module, &bytes, &options())?;
        free()?;
        let Changed {
            committed: reverted, ..
        } = session.revert(&record.id, &options())?;
        free()?;
        tries += applied.tries + reverted.tries;
        pauses.extend([applied.pause_us_max, reverted.pause_us_max]);
        if cycle % TOLD_EACH == 0 {
            println!("{cycle} cycles, {} s", start.elapsed().as_secs());
        }
    }
    println!(
        "{count} cycles in {} s, {tries} looks for a safe moment; pause, µs: {}; a cycle {} µs",
        start.elapsed().as_secs(),
        Figures::of(pauses),
        micros(start.elapsed()) / u64::try_from(count.max(1))?
    );
    Ok(())
}
