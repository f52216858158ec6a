//! The guest's kernel: found in guest memory alone, and everything about it that patching needs.
//!
//! The way in: interrupt table → [`image`] → [`kallsyms`] → `banner`, `vmcoreinfo`, BTF. Each step is checked against
//! another; a kernel that is not understood is refused.

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
/// More BTF than any kernel carries; bounds memory.
const BTF_BYTES_MAX: u64 = 32 << 20;
/// More read-only data than any kernel has, in bytes; bounds memory and time.
const RODATA_BYTES_MAX: u64 = 64 << 20;
/// More than any kernel image has of all else, in bytes.
const IMAGE_BYTES_MAX: u64 = 128 << 20;
/// Bytes of VMCOREINFO, at the most one page (kernel/crash_core.c).
const VMCOREINFO_BYTES_MAX: u64 = 4096;
/// CPUs that a kernel can be built for at the most (`NR_CPUS` of a distribution kernel is 8192).
const CPUS_MAX: u64 = 8192;

/// What the guest is doing when it changes something of which nothing more is known.
const CHANGING: &str = "changing its kernel's data";

/// Why the kernel was not understood. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// There is no kernel image.
    #[error("finding the kernel image")]
    Image(#[from] ImageError),
    /// There is an image, without a symbol table that fits it.
    #[error("reading the kernel's symbols")]
    Kallsyms(#[from] KallsymsError),
    /// A symbol that every supported kernel has is not there.
    #[error("the kernel has no symbol {0}")]
    NoSymbol(&'static str),
    /// Something the symbols point at could not be read.
    #[error("reading {what} at {at}")]
    Unreadable {
        /// What was being read.
        what: &'static str,
        /// Where.
        at: Gva,
        /// Why.
        source: MemoryError,
    },
    /// Two sources that must agree do not.
    #[error("{what}: {found:?} is not {expected:?}")]
    Disagrees {
        /// What was compared.
        what: &'static str,
        /// What the second source says.
        found: String,
        /// What the first source says.
        expected: String,
    },
    /// The kernel is not up yet.
    #[error(
        "the guest's kernel is still starting (system_state is {state}, SYSTEM_RUNNING is {running}); try again when it is up"
    )]
    Starting {
        /// Its `system_state`.
        state: u64,
        /// The value that it has once the kernel is up.
        running: u64,
    },
    /// What was read changed while it was read.
    #[error(transparent)]
    Changed(ChangeError),
    /// The kernel was changing what was read.
    #[error(transparent)]
    Held(locks::Held),
    /// The kernel's type information is not understood.
    #[error("reading the kernel's type information (BTF)")]
    Btf(#[from] BtfError),
}

/// A kernel found in a guest: pure data, valid as long as that kernel runs.
#[derive(Debug)]
pub struct Kernel {
    /// Its image.
    pub image: Image,
    /// Its symbols, without those of modules.
    pub symbols: Kallsyms,
    /// Its types.
    pub btf: Btf,
    /// Its own page tables (`init_top_pgt`), which hold all kernel mappings.
    pub space: AddressSpace,
    /// `linux_banner`, without the newline.
    pub banner: String,
    /// `uname -r`.
    pub release: String,
    /// What agreed with what, for `inspect`.
    pub sources: Vec<String>,
    /// First byte of the direct map of all physical memory.
    page_offset: Gva,
    /// One per possible CPU: what to add to a per-CPU symbol.
    per_cpu_offsets: Vec<u64>,
}

impl Kernel {
    /// Finds the kernel. Nothing is assumed to be stopped: only what does not change after boot is read.
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

    /// The address of a kernel symbol that must exist once.
    pub fn symbol(&self, name: &'static str) -> Result<Gva, KernelError> {
        require(&self.symbols, name)
    }

    /// For each possible CPU, what to add to a per-CPU symbol.
    pub fn per_cpu_offsets(&self) -> &[u64] {
        &self.per_cpu_offsets
    }

    /// The kernel together with the memory it lives in.
    pub fn live<'a>(&'a self, memory: &'a dyn PhysMemory) -> Live<'a> {
        Live {
            kernel: self,
            memory,
            reads: None,
            doing: CHANGING,
        }
    }
}

/// A kernel and the guest memory that it lives in: reads its virtual addresses.
#[derive(Clone, Copy)]
pub struct Live<'a> {
    /// The kernel.
    pub kernel: &'a Kernel,
    /// The guest's memory.
    pub memory: &'a dyn PhysMemory,
    /// Where what is read is written down.
    reads: Option<&'a Reads>,
    /// What the guest is doing when it changes what is read.
    doing: &'static str,
}

impl<'a> Live<'a> {
    /// The same guest, where all that is read is written down in `reads`: for plans, which are made from it.
    pub fn recording<'b>(&self, reads: &'b Reads) -> Live<'b>
    where
        'a: 'b,
    {
        Live {
            reads: Some(reads),
            ..*self
        }
    }

    /// The same guest, to read what the kernel does not change after it has started up, or not as long as what leads there is the
    /// same: its text and tables, and those of a module that it has loaded. Such reads are not written down.
    #[must_use]
    pub fn constant(&self) -> Self {
        Self { reads: None, ..*self }
    }

    /// The same guest, to read what it changes when it is `doing` something, which a message says.
    #[must_use]
    pub fn that_changes_when(&self, doing: &'static str) -> Self {
        Self { doing, ..*self }
    }

    /// Reads guest-physical memory. Errors as [`PhysMemory::read`].
    pub fn read_physical(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.memory.read(at, buf)?;
        if let Some(reads) = self.reads {
            reads.keep(at, buf, self.doing);
        }
        Ok(())
    }

    /// The guest-physical address of a kernel address, through the image's and the direct map's constant distances
    /// where it lies in one of them, else through the kernel's page tables.
    pub fn physical(&self, at: Gva) -> Result<(Gpa, u64), MemoryError> {
        if let Some(segment) = self.kernel.image.segment(at) {
            return Ok((Gpa(at.0.wrapping_sub(self.kernel.image.distance)), segment.end.0 - at.0));
        }
        let direct = Gpa(at.0.wrapping_sub(self.kernel.page_offset.0));
        if let Some(range) = self.memory.ram().iter().find(|range| range.contains(&direct)) {
            return Ok((direct, range.end.0 - direct.0));
        }
        let mut entries = Vec::new();
        let seen = &mut |gpa, entry| entries.push((gpa, entry));
        let there = self.kernel.space.translate_seeing(self.memory, at, seen)?;
        for (gpa, entry) in self.reads.map_or(Vec::new(), |_| entries) {
            self.reads
                .into_iter()
                .for_each(|reads| reads.keep_bits(gpa, entry, entry::TARGET, self.doing));
        }
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

/// Looks through the image for kallsyms; gives the segment that held it, too.
///
/// It lies in read-only data. But a kernel started with `rodata=off`, and one that is still starting, maps all of its image as
/// writable code (mark_rodata_ro, arch/x86/mm/init_64.c), so where no read-only data holds it, all else is looked through.
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

/// Looks for kallsyms in these segments; what they are, and the most bytes that are looked at.
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
        let bytes = image
            .read_segment(memory, segment)
            .map_err(|source| KernelError::Unreadable {
                what,
                at: segment.start,
                source,
            })?;
        match Kallsyms::find(&bytes, segment.start, &|symbols| fits(memory, image, symbols)) {
            Ok(symbols) => return Ok((symbols, *segment)),
            // What failed with tables in sight says more than the absence of tables elsewhere.
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

/// Refuses a kernel that is not up yet: much of what is read below is not there before. One that goes down has it all.
fn check_started(memory: &dyn VirtMemory, symbols: &Kallsyms, btf: &Btf) -> Result<(), KernelError> {
    let state = read_word(memory, symbols, "system_state")? & INT;
    let running = btf.enumerator("SYSTEM_RUNNING")?.cast_unsigned();
    if state < running {
        return Err(KernelError::Starting { state, running });
    }
    Ok(())
}

/// Cross-checks symbols with the image: text is executable, the banner is where its symbol says.
fn fits(memory: &dyn PhysMemory, image: &Image, symbols: &Kallsyms) -> Result<(), String> {
    let at = |name: &str| symbols.unique(name).ok_or(format!("no single symbol {name}"));
    // _etext is one past the text: what lies there may be of another kind, or nothing.
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

/// The kernel's own top-level table: complete for kernel addresses, whatever process was current.
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

/// The line of text at a symbol, made fit for a terminal, at most `max` bytes.
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
    // the newline at the end of a banner
    let len = bytes.iter().position(|byte| [0, b'\n'].contains(byte)).unwrap_or(max);
    Ok(plain(bytes.get(..len).unwrap_or_default()))
}

/// VMCOREINFO (kernel/crash_core.c) repeats the release and some addresses; where a kernel has it, it must agree.
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
