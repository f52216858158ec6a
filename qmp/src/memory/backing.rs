//! The memory that holds a range of guest RAM in the QEMU process: `/proc/PID/maps` (`proc_pid_maps(5)`).
//!
//! ```text
//! 7f56e00fd000-7f56e40fd000 rw-s 00000000 00:01 1032    /memfd:memory-backend-memfd (deleted)
//! ```

use crate::text::{TextError, hex};
use guest_core::Hva;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The memory that holds a range of guest RAM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backing {
    /// Private memory of the process: anonymous, or a private mapping of a file, whose changes do not reach the file. It is accessed through the
    /// process (`process_vm_readv`).
    Private,
    /// A shared mapping of a file or memfd: a process that opens the file has the same memory as the guest.
    Shared(SharedFile),
}

/// An open file of the QEMU process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SharedFile {
    /// Offset of the range in the file, in bytes.
    pub offset: u64,
    /// The file's inode number.
    pub inode: u64,
    /// The path as /proc shows it, such as `/memfd:memory-backend-memfd (deleted)`. It is for people, and cannot be opened.
    pub path: String,
    /// The mapping's address range, as `/proc/PID/map_files` names it.
    mapping: (u64, u64),
}

/// Why the memory behind guest RAM was not found or cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// /proc cannot be read: the process is gone, or belongs to another user.
    #[error("cannot read {path}")]
    Proc {
        /// The file or directory.
        path: PathBuf,
        /// The host's error.
        #[source]
        cause: io::Error,
    },
    /// A line of /proc/PID/maps is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The process does not map that range as one: it is not the QEMU that was asked.
    #[error("{len} bytes at {at} are not one mapping of the process")]
    NotMapped {
        /// The first byte.
        at: Hva,
        /// Bytes.
        len: u64,
    },
    /// The file cannot be opened, neither in map_files nor in fd.
    #[error("cannot open {file} (inode {inode}) of process {pid}: neither in map_files nor in fd")]
    NotOpened {
        /// The path as /proc shows it.
        file: String,
        /// Its inode number.
        inode: u64,
        /// The process.
        pid: i32,
    },
}

impl SharedFile {
    /// Opens the file of process `pid` for reading and writing: through the mapping if the caller has CAP_CHECKPOINT_RESTORE, otherwise through an open
    /// descriptor of the same inode.
    pub fn open(&self, pid: i32) -> Result<File, BackingError> {
        let (start, end) = self.mapping;
        let mapping = PathBuf::from(format!("/proc/{pid}/map_files/{start:x}-{end:x}"));
        if let Some(file) = self.open_same(&mapping) {
            return Ok(file);
        }
        let fds = PathBuf::from(format!("/proc/{pid}/fd"));
        let entries = fs::read_dir(&fds).map_err(|cause| BackingError::Proc { path: fds, cause })?;
        let found = entries.flatten().find_map(|entry| self.open_same(&entry.path()));
        found.ok_or_else(|| BackingError::NotOpened {
            file: self.path.clone(),
            inode: self.inode,
            pid,
        })
    }

    /// Opens `path` if it leads to the same file. Checks that before it opens: the open of a device or pipe can have effects.
    fn open_same(&self, path: &Path) -> Option<File> {
        let same = |inode: u64, is_file: bool| is_file && inode == self.inode;
        let target = fs::metadata(path).ok()?;
        if !same(target.ino(), target.is_file()) || fs::read_link(path).ok()?.to_str()? != self.path {
            return None;
        }
        let file = File::options().read(true).write(true).open(path).ok()?;
        let opened = file.metadata().ok()?;
        same(opened.ino(), opened.is_file()).then_some(file)
    }
}

/// A line of `/proc/PID/maps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mapping {
    start: u64,
    end: u64,
    shared: bool,
    offset: u64,
    device: String,
    inode: u64,
    path: String,
}

/// The mappings of process `pid`.
pub fn mappings(pid: i32) -> Result<Vec<Mapping>, BackingError> {
    let path = PathBuf::from(format!("/proc/{pid}/maps"));
    let text = fs::read(&path).map_err(|cause| BackingError::Proc { path, cause })?;
    Ok(parse(&String::from_utf8_lossy(&text))?)
}

fn parse(text: &str) -> Result<Vec<Mapping>, TextError> {
    let line_error = |line| TextError::new("/proc/PID/maps", "a mapping", line);
    text.lines()
        .map(|line| parse_line(line).ok_or_else(|| line_error(line)))
        .collect()
}

fn parse_line(line: &str) -> Option<Mapping> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let shared = match words.next()?.as_bytes() {
        [_, _, _, b's'] => true,
        [_, _, _, b'p'] => false,
        _ => return None,
    };
    let offset = hex(words.next()?)?;
    let device = words.next()?.to_owned();
    let inode = words.next()?.parse().ok()?;
    let path = words.next().unwrap_or_default().trim_start().to_owned();
    Some(Mapping {
        start: hex(start)?,
        end: hex(end)?,
        shared,
        offset,
        device,
        inode,
        path,
    })
}

impl Mapping {
    fn is_same_file(&self, other: &Self) -> bool {
        (&self.device, self.inode, self.shared) == (&other.device, other.inode, other.shared)
    }
}

/// The memory that holds the `len` bytes at `at`: one mapping, or several that are adjacent in memory and in the file (the kernel splits a mapping when
/// its parts get different advice).
pub fn find(mappings: &[Mapping], at: Hva, len: u64) -> Result<Backing, BackingError> {
    let not_mapped = || BackingError::NotMapped { at, len };
    let end = at.checked_add(len).ok_or_else(not_mapped)?.0;
    let covering: Vec<&Mapping> = mappings
        .iter()
        .filter(|mapping| mapping.end > at.0 && mapping.start < end)
        .collect();
    let (Some(first), Some(last)) = (covering.first(), covering.last()) else {
        return Err(not_mapped());
    };
    let joined = covering.windows(2).all(|pair| match pair {
        [a, b] => {
            let follows = a.inode == 0 || a.offset.checked_add(a.end - a.start) == Some(b.offset);
            a.end == b.start && a.is_same_file(b) && follows
        }
        _ => false,
    });
    if !joined || first.start > at.0 || last.end < end {
        return Err(not_mapped());
    }
    if !first.shared {
        return Ok(Backing::Private);
    }
    let offset = first.offset.checked_add(at.0 - first.start).ok_or_else(not_mapped)?;
    let mapping = (first.start, first.end);
    Ok(Backing::Shared(SharedFile {
        offset,
        inode: first.inode,
        path: first.path.clone(),
        mapping,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From a QEMU 10.0.2, shortened.
    const MAPS: &str = "\
5581e4c00000-5581e5000000 r--p 00000000 08:01 1577                       /usr/bin/qemu-system-x86_64
7f56e00fd000-7f56e40fd000 rw-s 00000000 00:01 1032                       /memfd:memory-backend-memfd (deleted)
7feea02b9000-7feea4000000 ---p 00000000 00:00 0 
7feea7e00000-7feeabe00000 rw-p 00000000 00:00 0 
";

    #[test]
    fn a_memfd_is_shared_and_an_anonymous_mapping_private() {
        let maps = parse(MAPS).unwrap();
        match find(&maps, Hva(0x7f56_e01f_d000), 0x1000).unwrap() {
            Backing::Shared(file) => {
                assert_eq!((file.offset, file.inode), (0x10_0000, 1032));
                assert_eq!(file.path, "/memfd:memory-backend-memfd (deleted)");
            }
            Backing::Private => panic!("a memfd taken for private memory"),
        }
        assert_eq!(find(&maps, Hva(0x7fee_a7e0_0000), 64 << 20).unwrap(), Backing::Private);
    }

    #[test]
    fn a_range_beyond_its_mapping_is_refused() {
        let maps = parse(MAPS).unwrap();
        for (at, len) in [
            (0x7fee_a7e0_0000, (64 << 20) + 1),
            (0x7fee_a7df_ffff, 2),
            (0x1000, 1),
            (u64::MAX, 2),
        ] {
            assert!(
                matches!(find(&maps, Hva(at), len), Err(BackingError::NotMapped { .. })),
                "{at:#x}"
            );
        }
    }

    #[test]
    fn a_split_mapping_counts_as_one_only_where_the_file_goes_on() {
        let whole = "1000-3000 rw-s 00000000 00:01 7 /memfd:a\n3000-5000 rw-s 00002000 00:01 7 /memfd:a\n";
        assert!(find(&parse(whole).unwrap(), Hva(0x2000), 0x2000).is_ok());
        for other in ["00003000 00:01 7", "00002000 00:01 8", "00002000 00:02 7"] {
            let text = format!("1000-3000 rw-s 00000000 00:01 7 /memfd:a\n3000-5000 rw-s {other} /memfd:a\n");
            assert!(find(&parse(&text).unwrap(), Hva(0x2000), 0x2000).is_err(), "{other}");
        }
        let anonymous = "1000-3000 rw-p 00000000 00:00 0 \n3000-5000 rw-p 00000000 00:00 0 \n";
        assert_eq!(
            find(&parse(anonymous).unwrap(), Hva(0x2000), 0x2000).unwrap(),
            Backing::Private
        );
    }

    #[test]
    fn a_line_of_another_form_is_refused() {
        for line in [
            "x",
            "1000-2000 rw 0 00:00 0",
            "1000 rw-p 0 00:00 0",
            "1000-2000 rw-p 0 00:00 x",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
