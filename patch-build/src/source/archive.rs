//! Single files out of a `linux-source` package's archive, whose 1.3 GB take many seconds to decompress: it is a `.tar.xz` in blocks of
//! some 24 MB each, which can be decompressed by themselves, and its files are in the order of their names. So a file is
//! looked for as a word in a dictionary.
//!
//! Formats: xz, "The .xz File Format" 1.1.0, sections 2 to 4; tar, POSIX.1-2017 "ustar Interchange Format", with GNU's long names.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;

use crate::command;

const HEADER_BYTES: usize = 12;
const FOOTER_BYTES: usize = 12;
/// A block that is larger than this in memory makes looking things up slower than reading it all.
const BLOCK_BYTES_MAX: u64 = 128 << 20;
const BLOCKS_MAX: u64 = 10_000;
/// As much of a block as mostly has the name of a file in it.
const BEGINNING_BYTES: usize = 1 << 20;
const SECTOR: usize = 512;
/// Of a name in a tar header.
const NAME_BYTES: usize = 100;

/// An archive in memory.
pub(super) struct Archive {
    xz: Vec<u8>,
    blocks: Vec<Block>,
}

struct Block {
    /// Its bytes in the file, padding and all.
    packed: Range<usize>,
    /// As the index has it: `packed` without the padding.
    unpadded: u64,
    size: u64,
}

/// A header of a tar file.
struct Header {
    /// Empty where it is not known: the block begins behind the first half of it.
    name: String,
    is_file: bool,
    size: usize,
}

impl Archive {
    /// Reads the index of a `.tar.xz`. None where it is not one stream of blocks that are each small enough.
    pub fn open(xz: Vec<u8>) -> Option<Self> {
        let footer = xz.get(xz.len().checked_sub(FOOTER_BYTES)?..)?;
        if footer.get(10..)? != b"YZ" || !xz.starts_with(b"\xfd7zXZ\0") {
            return None;
        }
        let backward = u32::from_le_bytes(footer.get(4..8)?.try_into().ok()?);
        let index_len = (usize::try_from(backward).ok()? + 1) * 4;
        let index_start = xz.len().checked_sub(FOOTER_BYTES + index_len)?;
        let mut index = xz.get(index_start..)?;
        if take(&mut index, 1)? != [0] {
            return None;
        }
        let count = number(&mut index)?;
        if count > BLOCKS_MAX {
            return None;
        }
        let (mut blocks, mut start) = (Vec::new(), HEADER_BYTES);
        for _ in 0..count {
            let (unpadded, size) = (number(&mut index)?, number(&mut index)?);
            let end = start.checked_add(usize::try_from(unpadded).ok()?.checked_next_multiple_of(4)?)?;
            blocks.push(Block {
                packed: start..end,
                unpadded,
                size,
            });
            start = end;
        }
        let fits = start == index_start && blocks.iter().all(|block| block.size <= BLOCK_BYTES_MAX);
        fits.then_some(Self { xz, blocks })
    }

    /// The texts of the files of those names (`linux-source-6.1/ipc/util.c`). None where one of them is not found: it is not there, or the
    /// archive is not in order.
    pub fn files(&self, names: &[String]) -> Option<BTreeMap<String, Vec<u8>>> {
        let mut unpacked = BTreeMap::new();
        let mut found = BTreeMap::new();
        for name in names {
            found.insert(name.clone(), self.file(name, &mut unpacked)?);
        }
        Some(found)
    }

    fn file(&self, name: &str, unpacked: &mut BTreeMap<usize, Vec<u8>>) -> Option<Vec<u8>> {
        // The last block whose first file is not behind it. A block in the middle of a file has none.
        let (mut low, mut high) = (0, self.blocks.len());
        while high - low > 1 {
            let middle = usize::midpoint(low, high);
            let mut known = None;
            for index in middle..high {
                if let Some(first) = self.first_name(index)? {
                    known = Some((index, first));
                    break;
                }
            }
            match known {
                Some((index, first)) if first.as_str() <= name => low = index,
                _ => high = middle,
            }
        }
        let (start, entry) = entries(self.block(low, unpacked)?).find(|(_, entry)| entry.name == name)?;
        if !entry.is_file {
            return None;
        }
        let mut text = self.block(low, unpacked)?.get(start..)?.to_vec();
        while text.len() < entry.size {
            low += 1;
            text.extend_from_slice(self.block(low, unpacked)?);
        }
        text.truncate(entry.size);
        Some(text)
    }

    /// The first name in a block that is known, where its beginning has one.
    fn first_name(&self, index: usize) -> Option<Option<String>> {
        let stream = self.stream(self.blocks.get(index)?)?;
        // What xz says of a reader that has enough is no matter; the name is compared with others.
        let script = format!("xz -dc 2>/dev/null | head -c {BEGINNING_BYTES}");
        let beginning = command::filter("sh", &["-c", &script], &stream).ok()?;
        let mut names = entries(&beginning).map(|(_, entry)| entry.name);
        Some(names.find(|name| !name.is_empty()))
    }

    fn block<'a>(&self, index: usize, unpacked: &'a mut BTreeMap<usize, Vec<u8>>) -> Option<&'a Vec<u8>> {
        Some(match unpacked.entry(index) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(slot) => {
                let stream = self.stream(self.blocks.get(index)?)?;
                slot.insert(command::filter("xz", &["-dc"], &stream).ok()?)
            }
        })
    }

    /// A whole `.xz` file that has nothing but that block.
    fn stream(&self, block: &Block) -> Option<Vec<u8>> {
        let header = self.xz.get(..HEADER_BYTES)?;
        let mut index = vec![0, 1];
        push_number(&mut index, block.unpadded);
        push_number(&mut index, block.size);
        index.resize(index.len().next_multiple_of(4), 0);
        index.extend(crc32(&index).to_le_bytes());
        let backward = u32::try_from(index.len() / 4 - 1).ok()?;
        let mut footer = backward.to_le_bytes().to_vec();
        footer.extend(header.get(6..8)?);
        let mut stream = [header, self.xz.get(block.packed.clone())?, &index].concat();
        stream.extend(crc32(&footer).to_le_bytes());
        stream.extend(footer);
        stream.extend(b"YZ");
        Some(stream)
    }
}

/// The entries that have their header in a piece of a tar file, and where what they hold begins. The piece may begin within a file.
fn entries(piece: &[u8]) -> impl Iterator<Item = (usize, Header)> + '_ {
    let mut at = 0;
    let mut long_name = None;
    std::iter::from_fn(move || {
        while let Some(header) = piece.get(at..at + SECTOR) {
            at += SECTOR;
            let Some((mut entry, kind)) = entry(header) else {
                continue;
            };
            if kind == b'L' {
                // The name of the next entry. Up to the zero byte that ends it.
                let name = piece.get(at..at.saturating_add(entry.size)).unwrap_or_default();
                long_name = Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned());
                at = at.saturating_add(entry.size.next_multiple_of(SECTOR));
                continue;
            }
            if let Some(name) = long_name.take() {
                entry.name = name;
            } else if at == SECTOR && entry.name.len() + 1 >= NAME_BYTES {
                // What came before it said the rest of its name.
                entry.name.clear();
            }
            let start = at;
            at = at.saturating_add(entry.size.next_multiple_of(SECTOR));
            return Some((start, entry));
        }
        None
    })
}

/// A sector as the header of an entry, and the entry's kind; none where it is no header.
fn entry(header: &[u8]) -> Option<(Header, u8)> {
    let octal = |range: Range<usize>| {
        let text = std::str::from_utf8(header.get(range)?).ok()?;
        usize::from_str_radix(text.trim_matches(['\0', ' ']), 8).ok()
    };
    let text = |range: Range<usize>| {
        let bytes = header.get(range)?.split(|byte| *byte == 0).next()?;
        Some(String::from_utf8_lossy(bytes).into_owned())
    };
    if header.get(257..262)? != b"ustar" {
        return None;
    }
    // The sum counts its own place as spaces.
    let sum = |(at, byte): (usize, &u8)| usize::from(if (148..156).contains(&at) { b' ' } else { *byte });
    if octal(148..156)? != header.iter().enumerate().map(sum).sum::<usize>() {
        return None;
    }
    let kind = *header.get(156)?;
    // GNU's own headers have no prefix.
    let prefix = if header.get(257..263)? == b"ustar\0" {
        text(345..500)?
    } else {
        String::new()
    };
    let name = text(0..NAME_BYTES)?;
    let entry = Header {
        name: if prefix.is_empty() {
            name
        } else {
            format!("{prefix}/{name}")
        },
        is_file: kind == b'0' || kind == 0,
        size: octal(124..136)?,
    };
    Some((entry, kind))
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}

/// A number of seven bits in each byte, the lowest first (section 1.2).
fn number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..63).step_by(7) {
        let byte = *take(bytes, 1)?.first()?;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn push_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        bytes.push(u8::try_from(number & 0x7f).unwrap_or_default() | 0x80);
        number >>= 7;
    }
    bytes.push(u8::try_from(number).unwrap_or_default());
}

/// The checksum of section 6, bit by bit: it is taken of a few bytes only.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, _| {
        if sum & 1 == 1 {
            (sum >> 1) ^ 0xedb8_8320
        } else {
            sum >> 1
        }
    };
    let byte = |sum: u32, byte: &u8| (0..8).fold(sum ^ u32::from(*byte), step);
    !bytes.iter().fold(!0, byte)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const LONG: &str =
        "b/a-very-long-name-of-a-folder-that-goes-on-and-on/and-another-one-that-is-no-shorter/and-then/the-file.c";

    /// An archive of some files, made by the real tools, in blocks of that many bytes.
    fn archive(test: &str, block: &str) -> Option<Archive> {
        let folder = std::env::temp_dir().join(format!("vmpatch-archive-{}-{test}", std::process::id()));
        for (name, line, count) in [
            ("a.c", "a\n", 10),
            ("b/b.c", "b\n", 5000),
            (LONG, "long\n", 900),
            ("c/e.h", "e\n", 0),
            ("d.c", "d\n", 1),
        ] {
            let path = folder.join("top").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, line.repeat(count)).unwrap();
        }
        let script = "find top -print | LC_ALL=C sort | tar -c --no-recursion -T - | xz -1 --block-size=$0";
        let xz = command::output("sh", &["-c", script, block], Path::new(&folder)).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        Archive::open(xz)
    }

    #[test]
    fn files_are_found_in_whichever_block_they_are() {
        let archive = archive("blocks", "8192").unwrap();
        assert!(archive.blocks.len() > 2);
        let names = ["a.c", "b/b.c", LONG, "c/e.h", "d.c"].map(|name| format!("top/{name}"));
        let found = archive.files(&names).unwrap();
        let texts = names.each_ref().map(|name| String::from_utf8_lossy(&found[name]));
        let expected = [
            "a\n".repeat(10),
            "b\n".repeat(5000),
            "long\n".repeat(900),
            String::new(),
            "d\n".to_owned(),
        ];
        assert_eq!(texts, expected);
        assert!(archive.files(&["top/b".to_owned()]).is_none());
        assert!(archive.files(&["top/none.c".to_owned()]).is_none());
    }

    #[test]
    fn a_file_whose_header_is_in_two_blocks_is_not_looked_up() {
        let archive = archive("small-blocks", "4096").unwrap();
        assert!(archive.files(&["top/d.c".to_owned()]).is_some());
        assert!(archive.files(&[format!("top/{LONG}")]).is_none());
    }

    #[test]
    fn what_is_no_archive_of_blocks_is_left_to_those_who_read_all_of_it() {
        assert!(archive("one", "1000000").is_some());
        assert!(Archive::open(b"\xfd7zXZ\0 and no more".to_vec()).is_none());
        assert!(Archive::open(Vec::new()).is_none());
    }

    #[test]
    fn a_checksum_is_that_of_the_format() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }
}
