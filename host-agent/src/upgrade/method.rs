//! How the guest's RAM can get into the new process.

use super::binary::{self, Version};
use super::error::UpgradeError;
use super::files;
use qmp::RamMap;
use qmp::memory::Backing;
use qmp::migrate::{Facts, Method, Pair};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The first QEMU that can hand guest RAM over as descriptors.
const FIRST_WITH_CPR: Version = (10, 0, 0);
/// Room in memory that is left for all else, in bytes.
const ROOM_LEFT: u64 = 64 << 20;

/// The best method that is open, or the one that the operator wants.
pub(super) fn choose(
    pair: &Pair,
    facts: &Facts,
    version: Version,
    ram: &RamMap,
    wanted: Option<Method>,
) -> Result<Method, UpgradeError> {
    let mut reasons = Vec::new();
    let methods = match wanted {
        Some(method) => vec![method],
        None => vec![Method::CprTransfer, Method::IgnoreShared, Method::Precopy],
    };
    for method in methods {
        let in_the_way = obstacles(method, pair, facts, version, ram)?;
        if in_the_way.is_empty() {
            return Ok(method);
        }
        reasons.push(format!("{}: {}", method.name(), in_the_way.join("; ")));
    }
    Err(UpgradeError::unfit("QEMU can't send this guest", reasons.join(". ")))
}

fn obstacles(
    method: Method,
    pair: &Pair,
    facts: &Facts,
    version: Version,
    ram: &RamMap,
) -> Result<Vec<String>, UpgradeError> {
    let mut found = Vec::new();
    let files = kept_files(ram);
    match method {
        // Seen from 11.1 to 10.0: the target ends in `vmstate_load_state`. Precopy works both ways.
        Method::CprTransfer if version < facts.version => {
            found.push(format!(
                "it does not work backwards, from QEMU {} to {}",
                binary::spell(facts.version),
                binary::spell(version)
            ));
            return Ok(found);
        }
        Method::CprTransfer => {
            for version in [facts.version, version]
                .into_iter()
                .filter(|version| *version < FIRST_WITH_CPR)
            {
                found.push(format!("QEMU {} does not know it", binary::spell(version)));
            }
            if !found.is_empty() {
                return Ok(found);
            }
        }
        // Not shown to be safe for the old process in QEMU 10.0.2.
        Method::IgnoreShared | Method::Precopy if facts.elastic => {
            found.push(
                "a virtio-mem device has some of the guest's RAM, and such a guest was only ever moved by cpr-transfer"
                    .to_owned(),
            );
            return Ok(found);
        }
        Method::IgnoreShared if files != Some(ram.regions.len()) => {
            found.push("the guest's RAM is not in files that both processes can map".to_owned());
        }
        // Both would map the same file, and the new one would write old copies of pages over newer ones.
        Method::Precopy if files != Some(0) => {
            found.push("the guest's RAM is in a file that the new process would map, too".to_owned());
        }
        Method::IgnoreShared | Method::Precopy => {}
    }
    found.extend(pair.blockers(method)?);
    Ok(found)
}

/// Whether the new process's RAM is its own where it is to be copied there: a file of the name may be another guest's.
pub(super) fn check_memory(method: Method, new: &RamMap) -> Result<(), UpgradeError> {
    if method == Method::Precopy && kept_files(new) != Some(0) {
        return Err(UpgradeError::unfit(
            "the new process's RAM is in a file that has a name",
            "others may have it, too; give mem-path= a folder, or the file that the old process has",
        ));
    }
    Ok(())
}

/// How many regions of RAM lie in a file that has a name, and can be opened by it; None where one of them has lost its name.
fn kept_files(ram: &RamMap) -> Option<usize> {
    let mut count = 0;
    for region in &ram.regions {
        if let Backing::Shared(file) = &region.backing {
            // Of a file that was made without a name (`mem-path` is a folder), or has lost it, each process has its own.
            if files::is_memory(Path::new(&file.path)) || file.path.ends_with(" (deleted)") {
                continue;
            }
            let found = fs::metadata(Path::new(&file.path)).ok()?;
            if found.ino() != file.inode {
                return None;
            }
            count += 1;
        }
    }
    Some(count)
}

/// Whether the host has room for the guest's RAM once more.
pub(super) fn check_room(ram: &RamMap) -> Result<(), UpgradeError> {
    let wanted: u64 = ram.regions.iter().map(|region| region.len).sum();
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let Some(available) = available(&text) else {
        return Ok(());
    };
    if available < wanted.saturating_add(ROOM_LEFT) {
        let what = format!("the host has {} MiB of memory left", available >> 20);
        let reason = format!("a copy of the guest's RAM needs {} MiB", wanted >> 20);
        return Err(UpgradeError::unfit(what, reason));
    }
    Ok(())
}

/// `proc_meminfo(5)`.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::available;

    #[test]
    fn the_hosts_memory_is_read_in_bytes() {
        assert_eq!(available("MemFree: 1 kB\nMemAvailable:   20480 kB\n"), Some(20 << 20));
        assert_eq!(available("MemFree: 1 kB\n"), None);
    }
}
