//! The archive that the kernel unpacks as its first root file system: cpio in its "newc" form, as
//! Documentation/driver-api/early-userspace/buffer-format.rst of Linux 6.1 describes it.

/// `st_mode` of a regular file, without permissions.
const REGULAR: u32 = 0o100_000;
/// `st_mode` of a folder, without permissions.
const FOLDER: u32 = 0o040_000;
/// `st_mode` of a character device, without permissions.
const CHARACTER_DEVICE: u32 = 0o020_000;
/// The name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive in the making. Names are relative to the root and begin without a slash; a folder must be added before what
/// lies in it.
#[derive(Debug, Default)]
pub struct Newc {
    bytes: Vec<u8>,
    entries: u32,
}

/// An archive's entry is longer than its 32-bit field can say.
#[derive(Debug, thiserror::Error)]
#[error("{name} has {bytes} bytes, more than an initramfs can hold in one file")]
pub struct TooLong {
    /// The entry's name.
    pub name: String,
    /// The entry's length.
    pub bytes: usize,
}

impl Newc {
    /// Adds a folder that everyone may enter.
    pub fn folder(&mut self, name: &str) -> Result<(), TooLong> {
        self.entry(name, FOLDER | 0o755, (0, 0), b"")
    }

    /// Adds a file with its permissions.
    pub fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<(), TooLong> {
        self.entry(name, REGULAR | (permissions & 0o7777), (0, 0), content)
    }

    /// Adds a character device that only root may use.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) -> Result<(), TooLong> {
        self.entry(name, CHARACTER_DEVICE | 0o600, (major, minor), b"")
    }

    /// Ends the archive and gives its bytes.
    pub fn finish(mut self) -> Result<Vec<u8>, TooLong> {
        self.entry(TRAILER, 0, (0, 0), b"")?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) -> Result<(), TooLong> {
        let too_long = |_| TooLong {
            name: name.to_owned(),
            bytes: content.len(),
        };
        let length = u32::try_from(content.len()).map_err(too_long)?;
        let name_length = u32::try_from(name.len() + 1).map_err(too_long)?;
        self.entries += 1;
        // inode, mode, uid, gid, links, time, length, device of the file (2), device of this node (2), name, checksum
        let (major, minor) = device;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            major,
            minor,
            name_length,
            0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    /// Header with name, and content, each fill a multiple of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_header_of_hexadecimal_fields_its_name_and_its_content() {
        let mut archive = Newc::default();
        archive.file("init", 0o755, b"abc").unwrap();
        let expected = [
            "070701", "00000001", "000081ed", "00000000", "00000000", "00000001", "00000000", "00000003", "00000000",
            "00000000", "00000000", "00000000", "00000005", "00000000", "init\0\0", "abc\0",
        ];
        assert_eq!(String::from_utf8(archive.bytes).unwrap(), expected.concat());
    }

    #[test]
    fn an_archive_is_readable_by_the_cpio_program_of_every_distribution() {
        let mut archive = Newc::default();
        archive.folder("dev").unwrap();
        archive.character_device("dev/console", 5, 1).unwrap();
        archive.file("dev/longer name", 0o640, &[7; 1001]).unwrap();
        let path = std::env::temp_dir().join(format!("vmpatch-newc-{}", std::process::id()));
        std::fs::write(&path, archive.finish().unwrap()).unwrap();
        let script = format!("busybox cpio -tv < {} 2>&1", path.display());
        let listed = crate::command::output("sh", &["-c", &script], std::path::Path::new("/")).unwrap();
        std::fs::remove_file(&path).unwrap();
        let listed = String::from_utf8(listed).unwrap();
        let kinds: Vec<_> = listed
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .collect();
        assert_eq!(
            kinds.get(..3),
            Some(["drwxr-xr-x", "crw-------", "-rw-r-----"].as_slice()),
            "{listed}"
        );
        assert!(listed.contains("dev/longer name"), "{listed}");
    }
}
