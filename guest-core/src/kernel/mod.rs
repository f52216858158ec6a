//! Finds the guest's kernel in guest memory alone, and reads what patching needs of it.
//!
//! The path is: interrupt table → [`image`] → [`kallsyms`] → `banner`, `vmcoreinfo`, BTF. Each step is checked against another. A kernel that is
//! not understood is refused.

pub mod alternatives;
pub mod exports;
pub mod ftrace;
pub mod guard;
pub mod image;
pub mod kallsyms;
pub mod list;
pub mod livepatch;
pub mod locks;
pub mod modules;
pub mod nops;
pub mod patch_state;
pub mod resolve;
pub mod sites;
pub mod sysctl;
pub mod tracers;

use crate::addr::{Gpa, Gva};
use crate::btf::{Btf, BtfError};
use crate::change::ChangeError;
use crate::memory::{MemoryError, PhysMemory, VirtMemory};
use crate::paging::{AddressSpace, MappedMemory, entry};
use crate::reads::Reads;
use crate::text::plain;
use crate::vcpu::Registers;
use image::{Image, ImageError, Segment};
use kallsyms::{Kallsyms, KallsymsError};

/// The bits of an int in a word.
const INT: u64 = 0xffff_ffff;
/// Longest banner that is read.
const BANNER_BYTES_MAX: usize = 512;
/// Most bytes of BTF that are read, more than any kernel has.
const BTF_BYTES_MAX: u64 = 32 << 20;
/// Most bytes of read-only data that are searched, more than any kernel has.
const RODATA_BYTES_MAX: u64 = 64 << 20;
/// Most bytes of other memory of the image that are searched, more than any kernel has.
const IMAGE_BYTES_MAX: u64 = 128 << 20;
/// Most bytes of VMCOREINFO: one page (kernel/crash_core.c).
const VMCOREINFO_BYTES_MAX: u64 = 4096;
/// Most CPUs that a kernel can be built for (`NR_CPUS` of a distribution kernel is 8192).
const CPUS_MAX: u64 = 8192;

/// Bytes of the image that are read at once in a search. A table of offsets is shorter.
const SEARCH_STEP: usize = 1 << 20;

/// What the guest is doing when it changes data of an unspecified kind.
const CHANGING: &str = "changing its kernel's data";

/// Why the guest's kernel was not found, cannot be read or is not understood. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KernelError {
    /// No kernel image was found.
    #[error("finding the kernel image")]
    Image(#[from] ImageError),
    /// The image has no symbol table that fits it.
    #[error("reading the kernel's symbols")]
    Kallsyms(#[from] KallsymsError),
    /// The kernel lacks a symbol that every supported kernel has.
    #[error("the kernel has no symbol {0}")]
    NoSymbol(&'static str),
    /// Several symbols have a name that only one should have.
    #[error("the kernel has {count} symbols {name}, and nothing tells which one is meant")]
    ManySymbols {
        /// The name.
        name: &'static str,
        /// How many there are.
        count: usize,
    },
    /// Guest memory cannot be read.
    #[error("reading {what} at {at}")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// Guest-virtual address.
        at: Gva,
        /// Why.
        source: MemoryError,
    },
    /// Two sources that must agree do not agree.
    #[error("{what}: {found:?} is not {expected:?}")]
    Disagrees {
        /// What was compared.
        what: &'static str,
        /// The value from the second source.
        found: String,
        /// The value from the first source.
        expected: String,
    },
    /// The kernel is not fully started yet.
    #[error(
        "the guest's kernel is still starting (system_state is {state}, SYSTEM_RUNNING is {running}); try again when it is up"
    )]
    Starting {
        /// Its `system_state`.
        state: u64,
        /// The value in a kernel that is fully started.
        running: u64,
    },
    /// The restoration of a change that was cut off cannot be planned.
    #[error("planning to restore {what}")]
    Restore {
        /// What was to be restored.
        what: &'static str,
        /// Why not.
        source: ChangeError,
    },
    /// The guest changed what was read while it was read.
    #[error(transparent)]
    Changed(ChangeError),
    /// The kernel was changing what was read.
    #[error(transparent)]
    Held(locks::Held),
    /// The kernel's type information cannot be read, or lacks a type.
    #[error("reading the kernel's type information (BTF)")]
    Btf(#[from] BtfError),
}

/// A kernel found in a guest: pure data, valid as long as that kernel runs.
#[derive(Debug)]
pub struct Kernel {
    /// The kernel image.
    pub image: Image,
    /// The symbols of the image, without those of modules.
    pub symbols: Kallsyms,
    /// The types.
    pub btf: Btf,
    /// The kernel's own page tables (`init_top_pgt`), which have all kernel mappings.
    pub space: AddressSpace,
    /// `linux_banner`, without the newline.
    pub banner: String,
    /// `uname -r`.
    pub release: String,
    /// The checks that agreed, for `inspect`.
    pub sources: Vec<String>,
    /// Guest-virtual start of the direct map of all physical memory.
    page_offset: Gva,
    /// The per-CPU offset of each possible CPU.
    per_cpu_offsets: Vec<u64>,
}

impl Kernel {
    /// Finds the kernel. The guest may run: only data are read that do not change after boot.
    pub fn find(memory: &dyn PhysMemory, vcpus: &[Registers]) -> Result<Self, KernelError> {
        let image = Image::find(memory, vcpus)?;
        let (symbols, held) = read_symbols(memory, &image)?;
        let space = own_tables(&image, &symbols)?;
        let mapped = MappedMemory { memory, space };
        let btf = Btf::parse(read_btf(&mapped, &symbols)?)?;
        check_started(&mapped, &symbols, &btf)?;
        let banner = read_text(&mapped, &symbols, "linux_banner", BANNER_BYTES_MAX)?;
        let banner = banner.trim_end().to_owned();
        let release = banner.split(' ').nth(2).unwrap_or_default().to_owned();
        let mut sources = vec![
            format!("image {}-{} through the interrupt table", image.start(), image.end()),
            format!("{} symbols ({:?}) at {}", symbols.len(), symbols.form(), held.start),
        ];
        sources.push(check_vmcoreinfo(&mapped, &symbols, &release)?);
        let page_offset = read_word(&mapped, &symbols, "page_offset_base")?;
        let per_cpu_offsets = read_per_cpu_offsets(&mapped, &symbols)?;
        Ok(Self {
            image,
            symbols,
            btf,
            space,
            banner,
            release,
            sources,
            page_offset: Gva(page_offset),
            per_cpu_offsets,
        })
    }

    /// The guest-virtual address of a symbol that must exist exactly once.
    pub fn symbol(&self, name: &'static str) -> Result<Gva, KernelError> {
        require(&self.symbols, name)
    }

    /// The guest-virtual address of a symbol of a feature that the kernel may have been built without; `None` if it has no such symbol.
    ///
    /// # Errors
    ///
    /// It has several: it does have the feature, and it is unknown where.
    pub fn symbol_of_feature(&self, name: &'static str) -> Result<Option<Gva>, KernelError> {
        match self.symbols.named(name).count() {
            0 => Ok(None),
            1 => self.symbol(name).map(Some),
            count => Err(KernelError::ManySymbols { name, count }),
        }
    }

    /// The offset of each possible CPU, which is added to a per-CPU symbol.
    pub fn per_cpu_offsets(&self) -> &[u64] {
        &self.per_cpu_offsets
    }

    /// The kernel together with the guest's memory.
    pub fn live<'a>(&'a self, memory: &'a dyn PhysMemory) -> Live<'a> {
        Live {
            kernel: self,
            memory,
            reads: None,
            doing: CHANGING,
        }
    }
}

/// A kernel with the memory of its guest: reads the kernel's virtual addresses.
#[derive(Clone, Copy)]
pub struct Live<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The guest's memory.
    pub memory: &'a dyn PhysMemory,
    /// Where reads are recorded.
    reads: Option<&'a Reads>,
    /// What the guest is doing when it changes what is read.
    doing: &'static str,
}

impl<'a> Live<'a> {
    /// The same guest, with all reads recorded in `reads`, for planners.
    pub fn recording<'b>(&self, reads: &'b Reads) -> Live<'b>
    where
        'a: 'b,
    {
        Live {
            reads: Some(reads),
            ..*self
        }
    }

    /// The same guest, to read what the kernel does not change after its start, or not as long as the pointers to it are unchanged: its text and
    /// tables, and those of loaded modules. Such reads are not recorded.
    #[must_use]
    pub fn constant(&self) -> Self {
        Self { reads: None, ..*self }
    }

    /// The same guest, to read what it changes when it is `doing` something, as messages name it.
    #[must_use]
    pub fn that_changes_when(&self, doing: &'static str) -> Self {
        Self { doing, ..*self }
    }

    /// Reads guest-physical memory.
    ///
    /// # Errors
    ///
    /// As [`PhysMemory::read`].
    pub fn read_physical(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, buf)?;
        if let Some(reads) = self.reads {
            reads.keep(at, buf, self.doing);
        }
        Ok(())
    }

    /// The guest-physical address of a kernel address: by the constant distance of the image or the direct map if one of them holds the address,
    /// otherwise by the kernel's page tables.
    pub fn physical(&self, at: Gva) -> Result<(Gpa, u64), MemoryError> {
        if let Some(segment) = self.kernel.image.segment(at) {
            return Ok((Gpa(at.0.wrapping_sub(self.kernel.image.distance)), segment.end.0 - at.0));
        }
        let direct = Gpa(at.0.wrapping_sub(self.kernel.page_offset.0));
        if let Some(range) = self.memory.ram().iter().find(|range| range.contains(&direct)) {
            return Ok((direct, range.end.0 - direct.0));
        }
        let there = match self.reads {
            None => self.kernel.space.translate(self.memory, at)?,
            Some(reads) => {
                let mut entries = Vec::new();
                let seen = &mut |gpa, entry| entries.push((gpa, entry));
                let there = self.kernel.space.translate_seeing(self.memory, at, seen)?;
                for (gpa, entry) in entries {
                    reads.keep_bits(gpa, entry, entry::TARGET, self.doing);
                }
                there
            }
        };
        Ok((there.gpa, there.page_size - (at.0 & (there.page_size - 1))))
    }
}

impl VirtMemory for Live<'_> {
    fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut at = at;
        let mut rest = buf;
        while !rest.is_empty() {
            let (gpa, contiguous) = self.physical(at)?;
            let len = rest.len().min(usize::try_from(contiguous).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(len);
            self.read_physical(gpa, now)?;
            at = at.wrapping_add(len as u64);
            rest = later;
        }
        Ok(())
    }
}

/// Searches the image for kallsyms. Gives also the segment that holds it.
///
/// kallsyms is in read-only data. But a kernel that was started with `rodata=off`, or is still starting, maps all of its image as writable code
/// (mark_rodata_ro, arch/x86/mm/init_64.c). Therefore all other segments are searched if no read-only data hold it.
fn read_symbols(memory: &dyn PhysMemory, image: &Image) -> Result<(Kallsyms, Segment), KernelError> {
    let (rodata, rest): (Vec<Segment>, Vec<Segment>) = image
        .segments
        .iter()
        .partition(|segment| !segment.writable && !segment.executable);
    let what = "read-only data of the kernel image";
    match search(memory, image, &rodata, (what, RODATA_BYTES_MAX)) {
        Err(KernelError::Kallsyms(KallsymsError::NoTokenIndex { .. })) => {
            let what = "writable or executable memory of the kernel image";
            search(memory, image, &rest, (what, IMAGE_BYTES_MAX))
        }
        found => found,
    }
}

/// Searches these segments for kallsyms, up to a number of bytes.
fn search(
    memory: &dyn PhysMemory,
    image: &Image,
    segments: &[Segment],
    (what, bytes_max): (&'static str, u64),
) -> Result<(Kallsyms, Segment), KernelError> {
    let mut failure = KallsymsError::NoTokenIndex {
        at: image.start(),
        bytes: 0,
    };
    let mut left = bytes_max;
    for segment in segments {
        let after = left.checked_sub(segment.end.0 - segment.start.0);
        left = after.ok_or_else(|| KernelError::Disagrees {
            what,
            found: format!(
                "a segment {}-{} behind {} bytes",
                segment.start,
                segment.end,
                bytes_max - left
            ),
            expected: format!("at most {bytes_max} bytes"),
        })?;
        let found = search_segment(memory, image, segment).map_err(|source| KernelError::Unreadable {
            what,
            at: segment.start,
            source,
        })?;
        match found {
            Ok(symbols) => return Ok((symbols, *segment)),
            // An error in tables that were found tells more than their absence elsewhere.
            Err(KallsymsError::NoTokenIndex { at, bytes }) => {
                if let KallsymsError::NoTokenIndex { .. } = failure {
                    failure = KallsymsError::NoTokenIndex { at, bytes };
                }
            }
            Err(error) => failure = error,
        }
    }
    Err(failure.into())
}

/// Searches a segment for kallsyms. What lies behind the tables is not read.
fn search_segment(
    memory: &dyn PhysMemory,
    image: &Image,
    segment: &Segment,
) -> Result<Result<Kallsyms, KallsymsError>, MemoryError> {
    let find = |bytes: &[u8]| Kallsyms::find(bytes, segment.start, &|symbols| fits(memory, image, symbols));
    // Pages that are not written to cost nothing.
    let mut bytes = vec![0; usize::try_from(segment.end.0 - segment.start.0).unwrap_or(0)];
    let (all, mut read, mut is_near) = (bytes.len(), 0, false);
    while read < all {
        let next = all.min(read + SEARCH_STEP);
        if let Some(part) = bytes.get_mut(read..next) {
            image.read(memory, segment.start.wrapping_add(read as u64), part)?;
        }
        let known = bytes.get(..next).unwrap_or_default();
        // The table of offsets may be behind the index.
        if is_near
            && next < all
            && let Ok(found) = find(known)
        {
            return Ok(Ok(found));
        }
        is_near = !is_near && kallsyms::has_token_index(known, read.saturating_sub(SEARCH_STEP));
        read = next;
    }
    Ok(find(&bytes))
}

/// Refuses a kernel that is not fully started: much of what is read below does not exist before. A kernel that is shutting down has it all.
fn check_started(memory: &dyn VirtMemory, symbols: &Kallsyms, btf: &Btf) -> Result<(), KernelError> {
    let state = read_word(memory, symbols, "system_state")? & INT;
    let running = btf.enumerator("SYSTEM_RUNNING")?.cast_unsigned();
    if state < running {
        return Err(KernelError::Starting { state, running });
    }
    Ok(())
}

/// Checks symbols against the image: the text is executable, and the banner is at its symbol.
fn fits(memory: &dyn PhysMemory, image: &Image, symbols: &Kallsyms) -> Result<(), String> {
    let at = |name: &str| symbols.unique(name).ok_or(format!("no single symbol {name}"));
    // _etext is behind the text: its address may be of another kind, or not mapped.
    for (name, last) in [("_stext", 0), ("_etext", 1)] {
        let address = at(name)?;
        if !image
            .segment(Gva(address.0.wrapping_sub(last)))
            .is_some_and(|segment| segment.executable)
        {
            return Err(format!("{name} {address} is not in executable memory of the image"));
        }
    }
    let banner = at("linux_banner")?;
    let mut bytes = [0; 14];
    let gpa = image
        .physical(banner)
        .ok_or(format!("linux_banner {banner} is outside of the image"))?;
    memory.read(gpa, &mut bytes).map_err(|error| error.to_string())?;
    if &bytes != b"Linux version " {
        return Err(format!(
            "linux_banner {banner} holds {:?}",
            String::from_utf8_lossy(&bytes)
        ));
    }
    Ok(())
}

fn require(symbols: &Kallsyms, name: &'static str) -> Result<Gva, KernelError> {
    symbols.unique(name).ok_or(KernelError::NoSymbol(name))
}

/// The kernel's own top-level page table. It maps all kernel addresses, whatever process was current.
fn own_tables(image: &Image, symbols: &Kallsyms) -> Result<AddressSpace, KernelError> {
    let root = require(symbols, "init_top_pgt")?;
    let root = image.physical(root).ok_or(KernelError::Disagrees {
        what: "init_top_pgt",
        found: root.to_string(),
        expected: format!("an address in the image {}-{}", image.start(), image.end()),
    })?;
    Ok(AddressSpace {
        root,
        levels: image.space.levels,
    })
}

fn read_word(memory: &dyn VirtMemory, symbols: &Kallsyms, what: &'static str) -> Result<u64, KernelError> {
    let at = require(symbols, what)?;
    memory
        .read_u64(at)
        .map_err(|source| KernelError::Unreadable { what, at, source })
}

/// `__per_cpu_offset[nr_cpu_ids]`; `nr_cpu_ids` is an unsigned int.
fn read_per_cpu_offsets(memory: &dyn VirtMemory, symbols: &Kallsyms) -> Result<Vec<u64>, KernelError> {
    let cpus = read_word(memory, symbols, "nr_cpu_ids")? & INT;
    let what = "__per_cpu_offset";
    let at = require(symbols, what)?;
    let mut bytes = vec![0; 8 * usize::try_from(cpus.min(CPUS_MAX)).unwrap_or(0)];
    memory
        .read(at, &mut bytes)
        .map_err(|source| KernelError::Unreadable { what, at, source })?;
    Ok(bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| u64::from_le_bytes(*word))
        .collect())
}

/// The line of text at a symbol, as plain text for a terminal, up to `max` bytes.
fn read_text(
    memory: &dyn VirtMemory,
    symbols: &Kallsyms,
    what: &'static str,
    max: usize,
) -> Result<String, KernelError> {
    let at = require(symbols, what)?;
    let mut bytes = vec![0; max];
    memory
        .read(at, &mut bytes)
        .map_err(|source| KernelError::Unreadable { what, at, source })?;
    // The newline at the end of a banner.
    let len = bytes.iter().position(|byte| [0, b'\n'].contains(byte)).unwrap_or(max);
    Ok(plain(bytes.get(..len).unwrap_or_default()))
}

/// VMCOREINFO (kernel/crash_core.c) repeats the release and some addresses. If the kernel has it, it must agree.
fn check_vmcoreinfo(memory: &dyn VirtMemory, symbols: &Kallsyms, release: &str) -> Result<String, KernelError> {
    let (Some(data), Some(size)) = (symbols.unique("vmcoreinfo_data"), symbols.unique("vmcoreinfo_size")) else {
        return Ok("no VMCOREINFO in this kernel".to_owned());
    };
    let what = "VMCOREINFO";
    let unreadable = |at| move |source| KernelError::Unreadable { what, at, source };
    let at = Gva(memory.read_u64(data).map_err(unreadable(data))?);
    let size = memory
        .read_u64(size)
        .map_err(unreadable(size))?
        .min(VMCOREINFO_BYTES_MAX);
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    memory.read(at, &mut bytes).map_err(unreadable(at))?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let value = |key: &str| {
        text.lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
            .map(str::to_owned)
    };
    let agree = |what, found: Option<String>, expected: String| match found {
        Some(found) if found != expected => Err(KernelError::Disagrees { what, found, expected }),
        _ => Ok(()),
    };
    agree(
        "VMCOREINFO OSRELEASE against the banner",
        value("OSRELEASE"),
        release.to_owned(),
    )?;
    let stext = require(symbols, "_stext")?;
    agree(
        "VMCOREINFO SYMBOL(_stext) against kallsyms",
        value("SYMBOL(_stext)"),
        format!("{:x}", stext.0),
    )?;
    Ok(format!("VMCOREINFO at {at} agrees"))
}

fn read_btf(memory: &dyn VirtMemory, symbols: &Kallsyms) -> Result<Vec<u8>, KernelError> {
    let (start, stop) = (require(symbols, "__start_BTF")?, require(symbols, "__stop_BTF")?);
    let len = stop
        .checked_sub(start)
        .filter(|len| *len <= BTF_BYTES_MAX)
        .ok_or_else(|| KernelError::Disagrees {
            what: "__stop_BTF",
            found: stop.to_string(),
            expected: format!("at most {BTF_BYTES_MAX} bytes behind {start}"),
        })?;
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    memory
        .read(start, &mut bytes)
        .map_err(|source| KernelError::Unreadable {
            what: "BTF",
            at: start,
            source,
        })?;
    Ok(bytes)
}
