//! A livepatch module's file: read, and decompressed where it is compressed as a distribution's kernel modules are
//! (`CONFIG_MODULE_COMPRESS_*`: gzip, xz, zstd). What it is compressed with is seen from its first bytes, not from its name.

use ruzstd::decoding::StreamingDecoder;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// More bytes than a livepatch module has, compressed or not; what is larger is not read.
const BYTES_MAX: u64 = 64 << 20;
/// Most memory for a decompressor's dictionary, in KiB. The kernel's build uses 1 MiB for xz and up to 8 MiB for zstd.
const WINDOW_KIB_MAX: u32 = 16 << 10;
/// What the names of module files end with.
const SUFFIXES: [&str; 4] = [".ko", ".ko.gz", ".ko.xz", ".ko.zst"];

/// Why a module's file could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be read.
    #[error("reading {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is compressed, and can't be decompressed.
    #[error("decompressing {path} ({compression})")]
    Packed {
        /// The file.
        path: PathBuf,
        /// What it is compressed with.
        compression: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// How a file is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Xz,
    Zstd,
}

impl Compression {
    /// From a file's first bytes: RFC 1952 (with the only method that there is), the .xz file format 1.2, RFC 8878.
    fn of(bytes: &[u8]) -> Option<Self> {
        let known = [
            (&[0x1f, 0x8b, 8][..], Self::Gzip),
            (b"\xfd7zXZ\0", Self::Xz),
            (&[0x28, 0xb5, 0x2f, 0xfd], Self::Zstd),
        ];
        let found = known.into_iter().find(|(magic, _)| bytes.starts_with(magic));
        found.map(|(_, compression)| compression)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    fn decompress(self, packed: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Self::Gzip => at_most(flate2::read::GzDecoder::new(packed)),
            Self::Xz => at_most(lzma_rust2::XzReader::new_mem_limit(packed, true, WINDOW_KIB_MAX)),
            Self::Zstd => {
                let window = u64::from(WINDOW_KIB_MAX) << 10;
                let decoder = StreamingDecoder::new_with_max_window_size(packed, window);
                at_most(decoder.map_err(io::Error::other)?)
            }
        }
    }
}

/// True where a file of this name is taken for a module.
pub fn is_module(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// The file's name without what [`is_module`] looks at.
pub fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
    stem.unwrap_or(&name).to_owned()
}

/// The module in a file: at most 64 MiB, also when decompressed.
///
/// # Errors
///
/// It can't be read, or not be decompressed.
pub fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Read {
        path: path.to_owned(),
        source,
    };
    let bytes = at_most(File::open(path).map_err(failed)?).map_err(failed)?;
    match Compression::of(&bytes) {
        None => Ok(bytes),
        Some(compression) => compression.decompress(&bytes).map_err(|source| FileError::Packed {
            path: path.to_owned(),
            compression: compression.name(),
            source,
        }),
    }
}

/// All of `from`, up to [`BYTES_MAX`].
fn at_most(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > BYTES_MAX {
        let text = format!("larger than {} MiB: no livepatch module", BYTES_MAX >> 20);
        return Err(io::Error::other(text));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// What the programs that pack a distribution's modules make of `bytes`.
    fn packed(program: &str, args: &[&str], bytes: &[u8]) -> Vec<u8> {
        let mut command = Command::new(program);
        let mut child = command
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let bytes = bytes.to_vec();
        let writer = std::thread::spawn(move || stdin.write_all(&bytes));
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap().unwrap();
        assert!(output.status.success());
        output.stdout
    }

    /// As `scripts/Makefile.modinst` calls them.
    const PACKERS: [(&str, &[&str]); 3] = [
        ("gzip", &["-n", "-c"]),
        ("xz", &["--check=crc32", "--lzma2=dict=1MiB", "-c"]),
        ("zstd", &["-q", "-c"]),
    ];

    fn text() -> Vec<u8> {
        (0..200_000_u32)
            .flat_map(|n| (n % 251 * (n / 251)).to_le_bytes())
            .collect()
    }

    #[test]
    fn what_the_kernels_build_packs_is_unpacked() {
        for (program, args) in PACKERS {
            let packed = packed(program, args, &text());
            let compression = Compression::of(&packed).unwrap();
            assert_eq!(compression.name(), program);
            assert!(compression.decompress(&packed).unwrap() == text(), "{program}");
        }
        assert_eq!(Compression::of(b"\x7fELF\x02\x01\x01"), None);
    }

    #[test]
    fn a_packed_file_cut_off_or_damaged_is_an_error() {
        for (program, args) in PACKERS {
            let mut packed = packed(program, args, &text());
            let compression = Compression::of(&packed).unwrap();
            for len in [6, 20, packed.len() / 2, packed.len() - 6] {
                assert!(
                    compression.decompress(&packed[..len]).is_err(),
                    "{program} cut at {len}"
                );
            }
            let middle = packed.len() / 2;
            packed[middle] ^= 0x55;
            assert!(compression.decompress(&packed).is_err(), "{program} damaged");
        }
    }

    #[test]
    fn a_file_that_would_unpack_to_more_than_a_module_is_an_error() {
        let bomb = vec![0; usize::try_from(BYTES_MAX + 1).unwrap()];
        for (program, args) in PACKERS {
            let packed = packed(program, args, &bomb);
            let error = Compression::of(&packed).unwrap().decompress(&packed).unwrap_err();
            assert_eq!(
                error.to_string(),
                "larger than 64 MiB: no livepatch module",
                "{program}"
            );
        }
    }

    #[test]
    fn a_window_larger_than_any_kernels_build_asks_for_is_an_error() {
        let packed = packed("xz", &["--lzma2=dict=256MiB", "-c"], &text());
        let error = Compression::Xz.decompress(&packed).unwrap_err();
        assert!(error.to_string().contains("memory"), "{error}");
    }

    #[test]
    fn a_modules_file_is_known_by_its_name_and_named_without_it() {
        for name in ["a-b.ko", "a-b.ko.gz", "a-b.ko.xz", "a-b.ko.zst"] {
            assert!(is_module(Path::new(name)), "{name}");
            assert_eq!(stem(Path::new(name)), "a-b");
        }
        for name in ["a.ko.txt", "a.xz", "README"] {
            assert!(!is_module(Path::new(name)), "{name}");
        }
    }
}
