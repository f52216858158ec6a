//! The memory and the types of the kernel that runs this host, as the kernel itself shows them to root: `/proc/kcore` and
//! `/sys/kernel/btf`.

use guest_core::btf::{Btf, BtfError};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The kernel's memory as an ELF core file: fs/proc/kcore.c.
const KCORE: &str = "/proc/kcore";
/// Types of the kernel and its modules, BTF: Linux 5.2, those of modules 5.11.
const BTF: &str = "/sys/kernel/btf";
/// ELF file header and program header of 64 bits: include/uapi/linux/elf.h.
const FILE_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
/// More ranges than that no kernel has: one for each range of RAM and a few more.
const RANGES_MAX: u16 = 4096;
const LOAD: u32 = 1;
const NOTE: u32 = 4;
/// Most bytes of the notes: a `task_struct`, the state of one thread, and the kernel's lines for crash dumps.
const NOTES_MAX: u64 = 1 << 20;
/// The note with the `task_struct` of the thread that reads it.
const NT_TASKSTRUCT: u32 = 4;
/// Header of BTF up to `str_len`: include/uapi/linux/btf.h.
const BTF_HEADER: usize = 24;

/// Why the host's kernel can't be read.
#[derive(Debug, thiserror::Error)]
pub enum HostKernelError {
    /// A file can't be read.
    #[error("reading {path}, which takes root, and a kernel that lets root read it (no lockdown=confidentiality)")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{path} is not understood: {what}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// The kernel's types are not understood.
    #[error("the types of this host's kernel")]
    Types(#[from] BtfError),
    /// An address that leads nowhere.
    #[error("this host's kernel has no memory at {at:#x}")]
    Address {
        /// The address.
        at: u64,
    },
}

/// Memory of a kernel by its own addresses.
pub(crate) trait KernelMemory {
    /// Fills the buffer from `at` on.
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), HostKernelError>;

    /// The word at `at`.
    fn word(&self, at: u64) -> Result<u64, HostKernelError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The half word at `at`.
    fn half(&self, at: u64) -> Result<u32, HostKernelError> {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }
}

/// A range of the core file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    kind: u32,
    /// Where it is in the file.
    offset: u64,
    /// Its first byte in the kernel.
    at: u64,
    len: u64,
}

/// The kernel's memory.
#[derive(Debug)]
pub(crate) struct Kcore {
    file: File,
    ranges: Vec<Range>,
}

impl Kcore {
    pub fn open() -> Result<Self, HostKernelError> {
        let failed = |source| HostKernelError::File {
            path: KCORE.into(),
            source,
        };
        let file = File::open(KCORE).map_err(failed)?;
        let mut header = [0; FILE_HEADER];
        file.read_exact_at(&mut header, 0).map_err(failed)?;
        let (at, count) = program_headers(&header).map_err(content)?;
        let mut table = vec![0; usize::from(count) * PROGRAM_HEADER];
        file.read_exact_at(&mut table, at).map_err(failed)?;
        let (headers, _) = table.as_chunks::<PROGRAM_HEADER>();
        let ranges = headers.iter().map(range).collect();
        Ok(Self { file, ranges })
    }

    /// The `task_struct` of this thread, as it was just now.
    pub fn own_task(&self) -> Result<Vec<u8>, HostKernelError> {
        let note = self.ranges.iter().find(|range| range.kind == NOTE);
        let note = note.ok_or(content("it has no notes"))?;
        let len = usize::try_from(note.len.min(NOTES_MAX)).unwrap_or(0);
        let mut bytes = vec![0; len];
        let read = self.file.read_exact_at(&mut bytes, note.offset);
        read.map_err(|source| HostKernelError::File {
            path: KCORE.into(),
            source,
        })?;
        let task = note_of(&bytes, NT_TASKSTRUCT).ok_or(content("it has no task_struct of this thread"))?;
        Ok(task.to_vec())
    }
}

impl KernelMemory for Kcore {
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<(), HostKernelError> {
        let missing = HostKernelError::Address { at };
        let Some(offset) = offset_of(&self.ranges, at, buf.len() as u64) else {
            return Err(missing);
        };
        self.file.read_exact_at(buf, offset).map_err(|_| missing)
    }
}

fn content(what: &'static str) -> HostKernelError {
    HostKernelError::Content {
        path: KCORE.into(),
        what,
    }
}

/// Where the program headers are, and how many.
fn program_headers(header: &[u8; FILE_HEADER]) -> Result<(u64, u16), &'static str> {
    let number = |at| u16::from_le_bytes([byte(header, at), byte(header, at + 1)]);
    if !header.starts_with(b"\x7fELF\x02\x01") || usize::from(number(54)) != PROGRAM_HEADER {
        return Err("it is no ELF file of 64 bits");
    }
    match number(56) {
        0 => Err("it has no program headers"),
        count if count > RANGES_MAX => Err("it has too many program headers"),
        count => Ok((word(header, 32), count)),
    }
}

fn range(header: &[u8; PROGRAM_HEADER]) -> Range {
    Range {
        kind: half(header, 0),
        offset: word(header, 8),
        at: word(header, 16),
        len: word(header, 32),
    }
}

/// Where `len` bytes at `at` are in the file.
fn offset_of(ranges: &[Range], at: u64, len: u64) -> Option<u64> {
    let holds = |range: &&Range| {
        let inside = at.checked_sub(range.at).and_then(|inside| inside.checked_add(len));
        range.kind == LOAD && inside.is_some_and(|end| end <= range.len)
    };
    let range = ranges.iter().find(holds)?;
    range.offset.checked_add(at - range.at)
}

/// The content of the first note of that type: name and content are padded to 4 bytes each.
fn note_of(mut bytes: &[u8], kind: u32) -> Option<&[u8]> {
    while bytes.len() >= 12 {
        let [name, content] = [half(bytes, 0), half(bytes, 4)].map(|len| usize::try_from(len).ok());
        let (name, content) = (name?.checked_next_multiple_of(4)?, content?);
        let rest = bytes.get(12..)?.get(name..)?;
        if half(bytes, 8) == kind {
            return rest.get(..content);
        }
        bytes = rest.get(content.checked_next_multiple_of(4)?..)?;
    }
    None
}

fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}

/// Four bytes at `at`, zero where they are missing.
pub(crate) fn half(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Eight bytes at `at`, zero where they are missing.
pub(crate) fn word(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// The types of the kernel and of its module `module`, which may be built into it.
pub(crate) fn types(module: &str) -> Result<Btf, HostKernelError> {
    let read = |name: &str| {
        let path = Path::new(BTF).join(name);
        fs::read(&path).map_err(|source| HostKernelError::File { path, source })
    };
    let kernel = read("vmlinux")?;
    let all = match read(module) {
        Ok(own) => join(&kernel, &own).ok_or(HostKernelError::Content {
            path: Path::new(BTF).join(module),
            what: "it is no BTF of a module",
        })?,
        Err(HostKernelError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => kernel,
        Err(error) => return Err(error),
    };
    Ok(Btf::parse(all)?)
}

/// One BTF of a kernel's and a module's: the module's numbers of types and places of names go on where the kernel's end
/// (Documentation/bpf/btf.rst, "split BTF").
fn join(kernel: &[u8], module: &[u8]) -> Option<Vec<u8>> {
    let (types, names) = sections(kernel)?;
    let (own_types, own_names) = sections(module)?;
    let [types_len, names_len] = [types.len() + own_types.len(), names.len() + own_names.len()].map(u32::try_from);
    let (types_len, names_len) = (types_len.ok()?, names_len.ok()?);
    let mut all = kernel.get(..4)?.to_vec();
    for field in [24, 0, types_len, types_len, names_len] {
        all.extend(u32::to_le_bytes(field));
    }
    for part in [types, own_types, names, own_names] {
        all.extend_from_slice(part);
    }
    Some(all)
}

/// Types and names of a BTF.
fn sections(btf: &[u8]) -> Option<(&[u8], &[u8])> {
    let header = usize::try_from(half(btf, 4)).ok()?;
    let section = |at: usize| {
        let [start, len] = [half(btf, at), half(btf, at + 4)].map(|field| usize::try_from(field).ok());
        btf.get(header.checked_add(start?)?..)?.get(..len?)
    };
    (header >= BTF_HEADER).then_some((section(8)?, section(16)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_by_the_kernels_addresses() {
        let mut header = [0; FILE_HEADER];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[32] = 64;
        header[54] = 56;
        header[56] = 2;
        assert_eq!(program_headers(&header), Ok((64, 2)));
        header[57] = 0xff;
        assert!(program_headers(&header).is_err());
        let mut load = [0; PROGRAM_HEADER];
        load[0] = 1;
        load[8..16].copy_from_slice(&0x3000u64.to_le_bytes());
        load[16..24].copy_from_slice(&0xffff_8880_0000_0000u64.to_le_bytes());
        load[32..40].copy_from_slice(&0x2000u64.to_le_bytes());
        let ranges = [range(&load)];
        assert_eq!(offset_of(&ranges, 0xffff_8880_0000_0010, 8), Some(0x3010));
        assert_eq!(offset_of(&ranges, 0xffff_8880_0000_1ff8, 8), Some(0x4ff8));
        for (at, len) in [(0xffff_8880_0000_1ff9, 8), (0x10, 8), (u64::MAX, 8)] {
            assert_eq!(offset_of(&ranges, at, len), None, "{at:#x}");
        }
    }

    #[test]
    fn a_note_is_found_behind_others() {
        let mut notes = Vec::new();
        for (kind, content) in [(1u32, &b"abcde"[..]), (4, b"task")] {
            notes.extend(5u32.to_le_bytes());
            notes.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
            notes.extend(kind.to_le_bytes());
            notes.extend(b"CORE\0\0\0\0");
            notes.extend(content);
            notes.resize(notes.len().next_multiple_of(4), 0);
        }
        assert_eq!(note_of(&notes, 4), Some(&b"task"[..]));
        assert_eq!(note_of(&notes, 3), None);
        assert_eq!(note_of(&notes[..notes.len() - 1], 4), None);
    }

    /// A BTF with those types and names.
    fn btf(types: &[u32], names: &[u8]) -> Vec<u8> {
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut bytes = vec![0x9f, 0xeb, 1, 0];
        let lens = [types.len(), names.len()].map(|len| u32::try_from(len).unwrap());
        for field in [24, 0, lens[0], lens[0], lens[1]] {
            bytes.extend(u32::to_le_bytes(field));
        }
        [bytes, types, names.to_vec()].concat()
    }

    #[test]
    fn a_modules_types_go_on_where_the_kernels_end() {
        let int = 1 << 24;
        let with_one_member = (4 << 24) | 1;
        // int; then struct kvm { int id; }, whose member is of the kernel's type 1.
        let kernel = btf(&[1, int, 4, 32], b"\0int\0");
        let module = btf(&[6, with_one_member, 4, 10, 1, 0], b"\0kvm\0id\0");
        let types = Btf::parse(join(&kernel, &module).unwrap()).unwrap();
        let found = types.structure("kvm").unwrap();
        assert_eq!((found.size(), found.offset("id")), (4, Ok(0)));
        assert_eq!(join(&kernel, &module[..30]), None);
        assert_eq!(join(&kernel, b""), None);
    }
}
