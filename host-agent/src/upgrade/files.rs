//! The files that a process has open: what the guest's disks, logs and RAM really are, whatever leads to their names by now.
//!
//! Source: `proc_pid_fd(5)`; a link there leads to the open file itself, also where its name is gone.

use super::error::UpgradeError;
use crate::domains::names::Name;
use crate::domains::process::proc_path;
use qmp::RamMap;
use qmp::memory::Backing;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What tells a file from all others of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Identity {
    /// A regular file.
    File {
        /// The device that it lies on.
        device: u64,
        /// Its inode number there.
        inode: u64,
    },
    /// A block device: several nodes may lead to it.
    Block {
        /// Its number.
        device: u64,
    },
}

impl Identity {
    fn of(found: &Metadata) -> Option<Self> {
        if found.is_file() {
            let (device, inode) = (found.dev(), found.ino());
            Some(Self::File { device, inode })
        } else if found.file_type().is_block_device() {
            let device = found.rdev();
            Some(Self::Block { device })
        } else {
            None
        }
    }

    /// Of what has that name; None where that is neither a file nor a block device.
    pub(super) fn at(path: &Path) -> Option<Self> {
        Self::of(&fs::metadata(path).ok()?)
    }
}

/// A file or block device that a process has open.
#[derive(Debug, Clone, PartialEq, Eq)]
struct OpenFile {
    number: i32,
    /// As /proc shows it, with ` (deleted)` where that name is gone.
    path: PathBuf,
    identity: Identity,
}

/// The files that a process has open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct OpenFiles {
    /// Those that must be the same in another process: not where its messages, its process id and the guest's RAM are.
    compared: Vec<OpenFile>,
    all: BTreeSet<Identity>,
}

impl OpenFiles {
    /// Of the process `pid`, whose RAM is `ram`. `alone` are the names of files that are not to be the same in two processes.
    pub(super) fn of<'a>(
        pid: i32,
        ram: &RamMap,
        alone: impl IntoIterator<Item = &'a Path>,
    ) -> Result<Self, UpgradeError> {
        let alone: Vec<Identity> = alone.into_iter().filter_map(Identity::at).collect();
        let in_ram = |file: &OpenFile| {
            ram.regions.iter().any(|region| match (&region.backing, file.identity) {
                (Backing::Shared(shared), Identity::File { inode, .. }) => {
                    shared.inode == inode && Path::new(&shared.path) == file.path
                }
                _ => false,
            })
        };
        let all = read(pid).map_err(UpgradeError::host(format!("reading the open files of process {pid}")))?;
        let is_wanted = |file: &OpenFile| {
            file.number > 2 && !is_memory(&file.path) && !alone.contains(&file.identity) && !in_ram(file)
        };
        Ok(Self {
            all: all.iter().map(|file| file.identity).collect(),
            compared: all.into_iter().filter(is_wanted).collect(),
        })
    }

    /// Demands that each name still leads to the file that is open: by its name the new process would open another one.
    pub(super) fn check_names(&self, pid: i32) -> Result<(), UpgradeError> {
        for OpenFile { number, path, identity } in &self.compared {
            if Identity::at(path) != Some(*identity) {
                return Err(UpgradeError::unfit(
                    format!("the file {}", path.display()),
                    format!(
                        "process {pid} has it open (descriptor {number}), but that name does not lead to it any more, so the new \
                         process would have another file; shut the guest down, and start it anew with the file that it is to have"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// Demands that another process has the same files open.
    pub(super) fn check_same(&self, new: &Self) -> Result<(), UpgradeError> {
        let (ours, theirs) = (self.by_identity(), new.by_identity());
        let only = |these: &BTreeMap<Identity, &Path>, others: &BTreeMap<Identity, &Path>| {
            let some = these.iter().filter(|(identity, _)| !others.contains_key(identity));
            let some: BTreeSet<String> = some.map(|(_, path)| path.display().to_string()).collect();
            some.into_iter().collect::<Vec<_>>().join(", ")
        };
        let (lacking, more) = (only(&ours, &theirs), only(&theirs, &ours));
        if lacking.is_empty() && more.is_empty() {
            return Ok(());
        }
        let or_none = |text: String| if text.is_empty() { "no other".to_owned() } else { text };
        Err(UpgradeError::Differs {
            what: "file open",
            old: or_none(lacking),
            new: or_none(more),
            reason: "the old one's command line leads to another file by now, or the file was opened after the start",
        })
    }

    /// Whether that file is open, for whatever.
    pub(super) fn has(&self, identity: Identity) -> bool {
        self.all.contains(&identity)
    }

    fn by_identity(&self) -> BTreeMap<Identity, &Path> {
        let pairs = self.compared.iter().map(|file| (file.identity, file.path.as_path()));
        pairs.collect()
    }
}

/// A memfd, or shared anonymous memory.
pub(super) fn is_memory(path: &Path) -> bool {
    let text = path.to_string_lossy();
    text.starts_with("/memfd:") || text.starts_with("/dev/zero")
}

fn read(pid: i32) -> io::Result<Vec<OpenFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(proc_path(pid, "fd"))? {
        let link = entry?.path();
        // One that was closed meanwhile.
        let (Ok(path), Ok(found)) = (fs::read_link(&link), fs::metadata(&link)) else {
            continue;
        };
        let number = link.file_name().and_then(|name| name.to_str()?.parse().ok());
        if let (Some(number), Some(identity)) = (number, Identity::of(&found)) {
            files.push(OpenFile { number, path, identity });
        }
    }
    files.sort_by_key(|file| file.number);
    Ok(files)
}

/// Paths of the names that only one process can have.
pub(super) fn real(names: &[Name]) -> impl Iterator<Item = &Path> {
    names.iter().map(|name| name.own.as_path())
}

/// The same, in the new process.
pub(super) fn temporary(names: &[Name]) -> impl Iterator<Item = &Path> {
    names.iter().map(|name| name.temporary.as_path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    fn own(folder: &Path) -> OpenFiles {
        let pid = i32::try_from(std::process::id()).unwrap();
        let ram = RamMap {
            pid,
            regions: Vec::new(),
        };
        let mut found = OpenFiles::of(pid, &ram, []).unwrap();
        // Other tests have files open, too.
        found.compared.retain(|file| file.path.starts_with(folder));
        found
    }

    #[test]
    fn a_file_that_was_replaced_or_deleted_is_named_and_one_that_was_renamed_is_another_for_its_old_name() {
        let folder = std::env::temp_dir().join(format!("vmpatch-files-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (disk, other) = (folder.join("disk"), folder.join("other"));
        let open = File::create(&disk).unwrap();
        let pid = 7;
        own(&folder).check_names(pid).unwrap();
        fs::rename(&disk, &other).unwrap();
        own(&folder).check_names(pid).unwrap();

        let old = own(&folder);
        let replaced = File::create(&disk).unwrap();
        let mut new = own(&folder);
        new.compared.retain(|file| file.path == disk);
        let text = old.check_same(&new).unwrap_err().to_string();
        let words = format!(
            "another file open than the old one ({}, not {})",
            disk.display(),
            other.display()
        );
        assert!(text.contains(&words), "{text}");
        assert!(old.check_same(&old).is_ok());
        drop(replaced);

        fs::remove_file(&other).unwrap();
        let text = own(&folder).check_names(pid).unwrap_err().to_string();
        let words = format!("the file {} (deleted): process 7 has it open", other.display());
        assert!(text.starts_with(&words), "{text}");
        drop(open);
        fs::remove_dir_all(folder).unwrap();
    }
}
