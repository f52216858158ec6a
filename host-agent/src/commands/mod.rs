//! What each command does; each gives a report, or fails with [`Failure`].

mod apply;
mod domains;
mod inspect;
mod revert;
mod status;
mod update;

pub use apply::{apply, check};
pub use domains::domains;
pub use inspect::inspect;
pub use revert::revert;
pub use status::status;
pub use update::update;

use crate::error::Failure;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// More bytes than a livepatch module has; what is larger is not read.
const MODULE_BYTES_MAX: u64 = 64 << 20;

/// Reads a module, up to [`MODULE_BYTES_MAX`].
fn read_module(path: &Path) -> Result<Vec<u8>, Failure> {
    let failed = |source| Failure::File {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .map_err(failed)?
        .take(MODULE_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > MODULE_BYTES_MAX {
        let text = format!("larger than {} MiB: no livepatch module", MODULE_BYTES_MAX >> 20);
        return Err(failed(std::io::Error::other(text)));
    }
    Ok(bytes)
}
