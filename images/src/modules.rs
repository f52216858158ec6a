//! Kernel modules out of a kernel's package, with all that they depend on, in the order in which a guest must load them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

use crate::cache;
use crate::command;
use crate::kernel::KernelFiles;

/// Modules below one that was asked for: a chain longer than this can only be a cycle.
const MAX_DEPTH: usize = 32;

/// Why a module could not be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel's package has no such module, nor is it built in.
    #[error("kernel {release} has no module {name}")]
    Unknown {
        /// The kernel's release.
        release: String,
        /// The module's name.
        name: String,
    },
    /// The modules depend on one another.
    #[error("module {name} of kernel {release} depends on itself")]
    Cycle {
        /// The kernel's release.
        release: String,
        /// The module's name.
        name: String,
    },
    /// The module's file is not the ELF file that it should be.
    #[error("can't read the module {}", path.display())]
    Elf {
        /// The module's file.
        path: PathBuf,
        /// The cause.
        source: object::Error,
    },
    /// It could not be decompressed.
    #[error(transparent)]
    Command(#[from] command::Error),
    /// A file could not be read.
    #[error(transparent)]
    Files(#[from] cache::Error),
}

/// A module, decompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The name under which the kernel lists it, with underscores.
    pub name: String,
    /// The ELF file.
    pub bytes: Vec<u8>,
}

/// The modules `names` of `kernel` with all that they depend on, each after those that it depends on. What is built into
/// the kernel is left out.
pub fn with_dependencies(kernel: &KernelFiles, names: &[&str]) -> Result<Vec<Module>, Error> {
    let mut loader = Loader {
        release: &kernel.release,
        files: BTreeMap::new(),
        loaded: Vec::new(),
    };
    for list in ["modules.builtin", "modules.order"] {
        let path = kernel.modules.join(list);
        let text = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
        let built_in = list == "modules.builtin";
        for line in text.lines() {
            let file = (!built_in).then(|| kernel.modules.join(line));
            loader.files.insert(module_name(line), file);
        }
    }
    for name in names {
        loader.load(&module_name(name), 0)?;
    }
    Ok(loader.loaded)
}

struct Loader<'a> {
    release: &'a str,
    /// Every module's file by its name; `None` where it is built in.
    files: BTreeMap<String, Option<PathBuf>>,
    loaded: Vec<Module>,
}

impl Loader<'_> {
    fn load(&mut self, name: &str, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::Cycle {
                release: self.release.to_owned(),
                name: name.to_owned(),
            });
        }
        let unknown = || Error::Unknown {
            release: self.release.to_owned(),
            name: name.to_owned(),
        };
        let Some(listed) = self.files.get(name).ok_or_else(unknown)?.clone() else {
            return Ok(());
        };
        if self.loaded.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let bytes = read(&listed)?;
        let elf = |source| Error::Elf {
            path: listed.clone(),
            source,
        };
        for dependency in dependencies(&bytes).map_err(elf)? {
            self.load(&dependency, depth + 1)?;
        }
        self.loaded.push(Module {
            name: name.to_owned(),
            bytes,
        });
        Ok(())
    }
}

/// A module's file, decompressed. The lists name it without the suffix of its compression (6.1 has none, 6.12 `.xz`).
fn read(listed: &Path) -> Result<Vec<u8>, Error> {
    for (suffix, program) in [(".xz", "xz"), (".zst", "zstd")] {
        let packed = PathBuf::from(format!("{}{suffix}", listed.display()));
        if packed.exists() {
            return Ok(command::output(
                program,
                &["-dcq", &packed.to_string_lossy()],
                Path::new("/"),
            )?);
        }
    }
    Ok(fs::read(listed).map_err(cache::Error::io("read", listed))?)
}

/// What a module's `depends=` says; the module's own list of settings is its section `.modinfo`, strings that end in NUL
/// (kernel/module/main.c of 6.1, `next_string`).
fn dependencies(module: &[u8]) -> Result<Vec<String>, object::Error> {
    let elf = object::File::parse(module)?;
    let Some(section) = elf.section_by_name(".modinfo") else {
        return Ok(Vec::new());
    };
    let settings = String::from_utf8_lossy(section.data()?).into_owned();
    let depends = settings
        .split('\0')
        .find_map(|setting| setting.strip_prefix("depends="));
    let names = depends.unwrap_or_default().split(',').filter(|name| !name.is_empty());
    Ok(names.map(module_name).collect())
}

/// The name of the module in a file: without folder and suffix, and with underscores, as the kernel spells it.
fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_named_as_the_kernel_names_it() {
        assert_eq!(module_name("kernel/drivers/char/hw_random/virtio-rng.ko"), "virtio_rng");
        assert_eq!(module_name("virtio_pci"), "virtio_pci");
    }

    #[test]
    fn a_file_that_is_no_elf_is_refused() {
        assert!(dependencies(b"not an ELF file").is_err());
    }

    #[test]
    fn dependencies_come_before_what_needs_them() {
        let folder = std::env::temp_dir().join(format!("vmpatch-modules-{}", std::process::id()));
        fs::create_dir_all(folder.join("kernel")).unwrap();
        fs::write(folder.join("modules.builtin"), "kernel/built-in.ko\n").unwrap();
        fs::write(
            folder.join("modules.order"),
            "kernel/top.ko\nkernel/low-level.ko\nkernel/loop.ko\n",
        )
        .unwrap();
        for (name, depends) in [("top", "low-level,built-in"), ("low-level", ""), ("loop", "loop")] {
            fs::write(folder.join(format!("kernel/{name}.ko")), elf_with_modinfo(depends)).unwrap();
        }
        let kernel = KernelFiles {
            release: "6.1.0-test".into(),
            vmlinuz: PathBuf::new(),
            config: PathBuf::new(),
            modules: folder.clone(),
            version: String::new(),
            packages: Vec::new(),
        };
        let names = |wanted: &str| {
            let modules = with_dependencies(&kernel, &[wanted])?;
            Ok::<_, Error>(modules.into_iter().map(|module| module.name).collect::<Vec<_>>())
        };
        assert_eq!(names("top").unwrap(), ["low_level", "top"]);
        assert_eq!(names("built_in").unwrap(), [""; 0]);
        assert_eq!(
            names("absent").unwrap_err().to_string(),
            "kernel 6.1.0-test has no module absent"
        );
        assert!(matches!(names("loop"), Err(Error::Cycle { .. })));
        fs::remove_dir_all(folder).unwrap();
    }

    /// The smallest relocatable ELF file with a `.modinfo`: header, that section's bytes, the name table, three headers.
    fn elf_with_modinfo(depends: &str) -> Vec<u8> {
        let modinfo = format!("license=GPL\0depends={depends}\0");
        let names = "\0.modinfo\0.shstrtab\0";
        let names_at = 64 + modinfo.len();
        let headers_at = (names_at + names.len()).next_multiple_of(8);
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        elf.extend(1_u16.to_le_bytes()); // ET_REL
        elf.extend(62_u16.to_le_bytes()); // EM_X86_64
        elf.extend(1_u32.to_le_bytes());
        elf.extend([0; 16]); // entry, program headers
        elf.extend((headers_at as u64).to_le_bytes());
        elf.extend([0; 4]);
        for value in [64_u16, 0, 0, 64, 3, 2] {
            elf.extend(value.to_le_bytes());
        }
        elf.extend(modinfo.as_bytes());
        elf.extend(names.as_bytes());
        elf.resize(headers_at, 0);
        elf.extend([0; 64]);
        for (name, kind, offset, size) in [(1_u32, 1_u32, 64, modinfo.len()), (10, 3, names_at, names.len())] {
            elf.extend(name.to_le_bytes());
            elf.extend(kind.to_le_bytes());
            elf.extend([0; 16]); // flags, address
            elf.extend((offset as u64).to_le_bytes());
            elf.extend((size as u64).to_le_bytes());
            elf.extend([0; 8]); // link, info
            elf.extend(1_u64.to_le_bytes());
            elf.extend([0; 8]);
        }
        elf
    }
}
