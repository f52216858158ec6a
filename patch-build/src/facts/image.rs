//! The kernel itself, out of the compressed image that a boot loader takes.

use std::io::Read;
use std::path::PathBuf;

use guest_core::addr::Gva;
use guest_core::kernel::kallsyms::{Kallsyms, KallsymsError};
use object::{Object, ObjectSection};

use crate::command;

/// No kernel is larger than this, decompressed; bounds memory.
const VMLINUX_BYTES_MAX: u64 = 1 << 30;

/// Why a kernel image could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file has no header that a boot loader looks for.
    #[error("{} is no bzImage: no \"HdrS\" at 0x202", path.display())]
    NoBzImage {
        /// The image.
        path: PathBuf,
    },
    /// The header points outside the file.
    #[error("{}: the compressed kernel would be {length} bytes at {offset:#x}, beyond the file's end", path.display())]
    Payload {
        /// The image.
        path: PathBuf,
        /// Where the compressed kernel starts.
        offset: usize,
        /// Its length.
        length: usize,
    },
    /// Compressed in a way that is not known.
    #[error("{}: a kernel compressed by neither lz4, zstd, xz nor gzip: it starts with {found:02x?}", path.display())]
    Compression {
        /// The image.
        path: PathBuf,
        /// Its first bytes.
        found: Vec<u8>,
    },
    /// The compressed kernel is damaged.
    #[error("{}: can't decompress the kernel: {what}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// What the decompressor said.
        what: String,
    },
    /// A program of the host failed.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// What was compressed is no ELF file.
    #[error("{}: the decompressed kernel is no ELF file", path.display())]
    Elf {
        /// The image.
        path: PathBuf,
        /// The cause.
        source: object::Error,
    },
    /// A section is missing.
    #[error("{}: the kernel has no section {section}", path.display())]
    NoSection {
        /// The image.
        path: PathBuf,
        /// The section.
        section: &'static str,
    },
    /// Its symbol table could not be read.
    #[error("{}: can't read the kernel's symbols", path.display())]
    Kallsyms {
        /// The image.
        path: PathBuf,
        /// The cause.
        source: KallsymsError,
    },
}

/// Reads the kernel out of `file` (of the path `path`, for messages): a bzImage, or a `vmlinux` as it is.
///
/// The header is described in Documentation/x86/boot.rst; what is compressed is `vmlinux`, and its length in four bytes
/// (scripts/Makefile.lib of 6.1, `size_append`).
pub(super) fn vmlinux(path: &std::path::Path, file: Vec<u8>) -> Result<Vec<u8>, Error> {
    if file.starts_with(b"\x7fELF") {
        return Ok(file);
    }
    if file.get(0x202..0x206) != Some(b"HdrS") {
        return Err(Error::NoBzImage { path: path.to_owned() });
    }
    let sectors = usize::from(file.get(0x1f1).copied().unwrap_or_default());
    let offset = (sectors + 1) * 512 + number(&file, 0x248);
    let length = number(&file, 0x24c);
    let payload = offset
        .checked_add(length)
        .and_then(|end| file.get(offset..end))
        .ok_or_else(|| Error::Payload {
            path: path.to_owned(),
            offset,
            length,
        })?;
    decompress(path, payload)
}

/// The 32-bit number at `at`, 0 beyond the end.
fn number(file: &[u8], at: usize) -> usize {
    let bytes = file.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    usize::try_from(u32::from_le_bytes(bytes.unwrap_or_default())).unwrap_or_default()
}

fn decompress(path: &std::path::Path, payload: &[u8]) -> Result<Vec<u8>, Error> {
    let damaged = |what: String| Error::Damaged {
        path: path.to_owned(),
        what,
    };
    let packed = payload.get(..payload.len().saturating_sub(4)).unwrap_or_default();
    let expected = number(payload, packed.len());
    let mut kernel = Vec::new();
    match payload.get(..4).unwrap_or_default() {
        [0x02, 0x21, 0x4c, 0x18] => {
            let decoder = lz4_flex::frame::FrameDecoder::new(packed);
            decoder.take(VMLINUX_BYTES_MAX).read_to_end(&mut kernel)
        }
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let decoder =
                ruzstd::decoding::StreamingDecoder::new(packed).map_err(|error| damaged(error.to_string()))?;
            decoder.take(VMLINUX_BYTES_MAX).read_to_end(&mut kernel)
        }
        [0xfd, b'7', b'z', b'X'] => return Ok(command::filter("xz", &["-dc", "--single-stream"], packed)?),
        // gzip's own last four bytes are the length.
        [0x1f, 0x8b, ..] => return Ok(command::filter("gzip", &["-dc"], payload)?),
        found => {
            return Err(Error::Compression {
                path: path.to_owned(),
                found: found.to_vec(),
            });
        }
    }
    .map_err(|error| damaged(error.to_string()))?;
    if kernel.len() != expected {
        return Err(damaged(format!("{} bytes came out, not {expected}", kernel.len())));
    }
    Ok(kernel)
}

/// The kernel's own table of symbols.
pub(super) fn symbols(path: &std::path::Path, vmlinux: &[u8]) -> Result<Kallsyms, Error> {
    let elf = object::File::parse(vmlinux).map_err(|source| Error::Elf {
        path: path.to_owned(),
        source,
    })?;
    let section = |section| {
        elf.section_by_name(section).ok_or_else(|| Error::NoSection {
            path: path.to_owned(),
            section,
        })
    };
    let (text, rodata) = (section(".text")?, section(".rodata")?);
    let data = rodata.data().map_err(|source| Error::Elf {
        path: path.to_owned(),
        source,
    })?;
    // The address form is right if the text starts where its section does, and the last text symbol is within it.
    let accept = |symbols: &Kallsyms| {
        let expected = Gva(text.address());
        match symbols.unique("_text") {
            Some(found) if found == expected => Ok(()),
            found => Err(format!("_text is at {found:?}, but its section at {expected:?}")),
        }
    };
    Kallsyms::find(data, Gva(rodata.address()), &accept).map_err(|source| Error::Kallsyms {
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A bzImage with one setup sector that holds `payload` and the length of what it holds.
    fn bz_image(payload: &[u8], unpacked: u32) -> Vec<u8> {
        let mut file = vec![0; 1024];
        file[0x1f1] = 1;
        file[0x202..0x206].copy_from_slice(b"HdrS");
        file[0x24c..0x250].copy_from_slice(&(u32::try_from(payload.len()).unwrap() + 4).to_le_bytes());
        file.extend(payload);
        file.extend(unpacked.to_le_bytes());
        file
    }

    /// "abc" by `lz4 -l` and by `zstd`.
    const LZ4: [u8; 12] = [0x02, 0x21, 0x4c, 0x18, 4, 0, 0, 0, 0x30, b'a', b'b', b'c'];
    const ZSTD: [u8; 12] = [0x28, 0xb5, 0x2f, 0xfd, 0x20, 0x03, 0x19, 0x00, 0x00, b'a', b'b', b'c'];

    #[test]
    fn the_kernel_is_decompressed_by_what_its_first_bytes_say() {
        for payload in [LZ4, ZSTD] {
            assert_eq!(vmlinux(Path::new("x"), bz_image(&payload, 3)).unwrap(), b"abc");
        }
    }

    #[test]
    fn a_kernel_of_another_length_than_its_image_says_is_refused() {
        let message = vmlinux(Path::new("x"), bz_image(&LZ4, 4)).unwrap_err().to_string();
        assert_eq!(message, "x: can't decompress the kernel: 3 bytes came out, not 4");
    }

    #[test]
    fn what_is_no_kernel_image_is_refused_by_name() {
        let message = vmlinux(Path::new("x"), b"hello".to_vec()).unwrap_err().to_string();
        assert_eq!(message, "x is no bzImage: no \"HdrS\" at 0x202");
        let mut cut = bz_image(&LZ4, 3);
        cut.truncate(1030);
        assert!(matches!(vmlinux(Path::new("x"), cut), Err(Error::Payload { .. })));
    }
}
