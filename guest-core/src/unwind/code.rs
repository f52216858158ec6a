//! All code that the kernel may run, and the ORC tables to unwind through it: the kernel's own text, its modules, patches, and ftrace's
//! trampolines.
//!
//! Other code is unknown: kprobes' instruction slots, and modules that were loaded later. A frame in unknown code cannot be unwound. A
//! *word* that points into it is not harmless either: a kprobe's slot jumps back to the probed function, whose address is then on no stack.
//! The same holds for BPF's code, which is only looked up for a frame in it: see [`super::bpf`].

use super::bpf::BpfCode;
use super::error::{SetupError, UnwindError};
use super::modules::Modules;
use super::orc::{ENTRY_BYTES_MAX, OrcFormat, Rule};
use super::scan::{OldCode, OldFunction};
use super::table::OrcTable;
use super::trampolines::{Trampoline, Trampolines};
use super::view::KernelView;
use super::walk::Frame;
use crate::addr::Gva;
use std::ops::Range;

/// Functions that every kernel has. The ORC entry of their first instruction shows how registers are numbered.
const PROBES: [&str; 3] = ["schedule", "vfs_read", "kfree"];
/// The address range of all kernel code: the top 2 GiB, `__START_KERNEL_map` (arch/x86/include/asm/page_64_types.h).
const CODE_START: Gva = Gva(0xffff_ffff_8000_0000);
/// The end of the address ranges of modules and of the alias mapping. Small negative numbers are above it.
const CODE_END: Gva = Gva(0xffff_ffff_ff40_0000);
/// A symbol of the kernels whose indirect SP entries add before they dereference (5.8 to 5.11).
const ADDS_FIRST: &str = "asm_call_on_stack";

/// The code of a patch in the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatchCode {
    /// Guest-virtual address range of its text.
    pub text: Range<Gva>,
    /// Its ORC table, in guest memory, sorted.
    pub orc: OrcTable,
}

/// A range of text with its table.
#[derive(Debug, PartialEq, Eq)]
struct TextRange {
    text: Range<Gva>,
    orc: Option<OrcTable>,
    /// Name of the module; `None` for a patch.
    module: Option<Box<str>>,
}

/// All code of a kernel at one moment.
#[derive(Debug)]
pub struct CodeMap {
    format: OrcFormat,
    /// `_stext.._etext`
    text: Range<Gva>,
    /// `_sinittext.._einittext`: code that ran at boot. Its memory was freed, but the first idle task's stack still has frames of it, to
    /// which nothing ever returns.
    init_text: Option<Range<Gva>>,
    /// `_text.._end`: text and data
    image: Range<Gva>,
    orc: OrcTable,
    modules: Option<Modules>,
    tracers: Option<Trampolines>,
    bpf: Option<BpfCode>,
    loaded: Loaded,
}

/// The code that the kernel loads and unloads.
#[derive(Debug, Default, PartialEq, Eq)]
struct Loaded {
    /// Text of modules and patches, sorted. A patch in the text cave takes precedence over the kernel's own table.
    ranges: Vec<TextRange>,
    /// Other memory of modules, sorted.
    data: Vec<Range<Gva>>,
    trampolines: Vec<Trampoline>,
}

impl CodeMap {
    /// Reads the code that the kernel has loaded now. `patches` are the patches in the guest.
    ///
    /// # Errors
    ///
    /// The lists of code, or the ORC tables, cannot be read.
    pub fn read(view: &dyn KernelView, patches: &[PatchCode]) -> Result<Self, SetupError> {
        let symbol = |name: &str| view.symbol(name).ok_or_else(|| SetupError::NoSymbol(name.to_owned()));
        let orc = own_table(view)?;
        let mut map = Self {
            format: format(view, &orc)?,
            text: symbol("_stext")?..symbol("_etext")?,
            init_text: view
                .symbol("_sinittext")
                .zip(view.symbol("_einittext"))
                .map(|(start, end)| start..end),
            image: symbol("_text")?..symbol("_end")?,
            orc,
            modules: Modules::find(view)?,
            tracers: Trampolines::find(view)?,
            bpf: BpfCode::find(view),
            loaded: Loaded::default(),
        };
        map.refresh(view, patches)?;
        Ok(map)
    }

    /// Reads the loaded code again. Gives true if it has changed.
    ///
    /// # Errors
    ///
    /// As [`CodeMap::read`].
    pub fn refresh(&mut self, view: &dyn KernelView, patches: &[PatchCode]) -> Result<bool, SetupError> {
        let modules = self
            .modules
            .as_ref()
            .map_or(Ok(Vec::new()), |modules| modules.read(view))?;
        let mut now = Loaded::default();
        for module in modules {
            let of_module = |text| TextRange {
                text,
                orc: module.orc,
                module: Some(module.name.clone()),
            };
            now.ranges.extend(module.text.into_iter().map(of_module));
            now.data.extend(module.data);
        }
        let of_patch = |patch: &PatchCode| TextRange {
            text: patch.text.clone(),
            orc: Some(patch.orc),
            module: None,
        };
        now.ranges.extend(patches.iter().map(of_patch));
        now.ranges.sort_by_key(|range| range.text.start);
        now.data.sort_by_key(|data| data.start);
        now.trampolines = self
            .tracers
            .as_ref()
            .map_or(Ok(Vec::new()), |tracers| tracers.read(view))?;
        let changed = now != self.loaded;
        self.loaded = now;
        Ok(changed)
    }

    /// True for an address in known code.
    pub fn is_text(&self, at: Gva) -> bool {
        self.is_own_text(at) || self.range_at(at).is_some() || self.trampoline(at).is_some()
    }

    /// True for a word that may point into unknown code, as described at the top of this module.
    pub fn may_be_unknown_code(&self, word: u64) -> bool {
        let at = Gva(word);
        (CODE_START..CODE_END).contains(&at)
            && !self.image.contains(&at)
            && !self.is_text(at)
            // A return address may be one past the text.
            && !self.is_text(Gva(word - 1))
            && holding(&self.loaded.data, at, |data| data).is_none()
    }

    /// The rule that unwinds from `frame`, whose BP is `bp`.
    pub fn rule(&self, view: &dyn KernelView, frame: Frame, bp: u64) -> Result<Rule, UnwindError> {
        let (at, memory) = (frame.code(), as_memory(view));
        if !self.is_text(at) {
            let Frame { ip, sp, .. } = frame;
            let of_bpf = self.bpf.as_ref().and_then(|bpf| bpf.rule(view, frame, bp));
            return of_bpf.unwrap_or(Err(UnwindError::NotText { ip, sp }));
        }
        if let Some(range) = self.range_at(at) {
            let missing = || match &range.module {
                Some(module) => UnwindError::NoTable {
                    ip: frame.ip,
                    module: module.to_string(),
                },
                None => UnwindError::NoOrc { ip: at },
            };
            return range.orc.ok_or_else(missing)?.rule(memory, &self.format, at);
        }
        let there = self
            .trampoline(at)
            .and_then(|trampoline| trampoline.original(at))
            .unwrap_or(at);
        if !self.is_own_text(there) {
            return Err(UnwindError::NoOrc { ip: at });
        }
        self.orc.rule(memory, &self.format, there)
    }

    /// The function of `old` that BPF's code, in which `frame` is, may be about to call, although no stack holds its address.
    pub fn calls_from_bpf<'o>(&self, view: &dyn KernelView, frame: Frame, old: &'o OldCode) -> Option<&'o OldFunction> {
        let bpf = self.bpf.as_ref().filter(|_| !self.is_text(frame.code()))?;
        bpf.calls(view, frame.code(), old)
    }

    fn is_own_text(&self, at: Gva) -> bool {
        self.text.contains(&at) || self.init_text.as_ref().is_some_and(|text| text.contains(&at))
    }

    /// The format of this kernel's ORC entries.
    pub fn format(&self) -> &OrcFormat {
        &self.format
    }

    fn range_at(&self, at: Gva) -> Option<&TextRange> {
        holding(&self.loaded.ranges, at, |range| &range.text)
    }

    fn trampoline(&self, at: Gva) -> Option<&Trampoline> {
        holding(&self.loaded.trampolines, at, |trampoline| &trampoline.text)
    }
}

/// The element whose range holds `at`, in a list sorted by start.
fn holding<T>(sorted: &[T], at: Gva, range: impl Fn(&T) -> &Range<Gva>) -> Option<&T> {
    let behind = sorted.partition_point(|element| range(element).start <= at);
    sorted
        .get(behind.checked_sub(1)?)
        .filter(|element| range(element).contains(&at))
}

/// The kernel's own table. Its two arrays must have the same number of elements.
fn own_table(view: &dyn KernelView) -> Result<OrcTable, SetupError> {
    let symbol = |name: &str| view.symbol(name).ok_or_else(|| SetupError::NoSymbol(name.to_owned()));
    let (ips, ips_end) = (symbol("__start_orc_unwind_ip")?, symbol("__stop_orc_unwind_ip")?);
    let (entries, entries_end) = (symbol("__start_orc_unwind")?, symbol("__stop_orc_unwind")?);
    let size = view.btf().structure("orc_entry")?.size();
    let (ips_bytes, entries_bytes) = (ips_end.checked_sub(ips), entries_end.checked_sub(entries));
    let count = ips_bytes.filter(|bytes| bytes % 4 == 0).map(|bytes| bytes / 4);
    let agree = count.filter(|count| count.checked_mul(size) == entries_bytes);
    let count = agree.ok_or_else(|| SetupError::NotUnderstood {
        what: "ORC table",
        found: format!("{ips_bytes:?} bytes of addresses, {entries_bytes:?} bytes of entries"),
        expected: format!("as many addresses of 4 as entries of {size} bytes"),
    })?;
    OrcTable::new(ips, entries, count)
}

fn format(view: &dyn KernelView, orc: &OrcTable) -> Result<OrcFormat, SetupError> {
    let size = usize::try_from(view.btf().structure("orc_entry")?.size())
        .unwrap_or(0)
        .min(ENTRY_BYTES_MAX);
    let mut at_entry = Vec::new();
    for name in PROBES {
        let at = view.symbol(name).ok_or_else(|| SetupError::NoSymbol(name.to_owned()))?;
        let mut bytes = vec![0; size];
        orc.entry(as_memory(view), at, &mut bytes)
            .map_err(|source| SetupError::NoOrcEntry {
                function: name,
                source: Box::new(source),
            })?;
        at_entry.push(bytes);
    }
    OrcFormat::detect(view.btf(), &at_entry, view.symbol(ADDS_FIRST).is_some())
}

fn as_memory(view: &dyn KernelView) -> &dyn crate::memory::VirtMemory {
    view
}
