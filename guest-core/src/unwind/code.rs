//! All code that the kernel may be running, and how to unwind through each piece: the kernel's own text, its modules,
//! what vmpatch has laid, and ftrace's trampolines.
//!
//! What is not in here is unknown code: kprobes' instruction slots, modules that came later. A frame in it cannot be
//! unwound. A *word* that points into it must not be taken for harmless either: a kprobe's slot goes on, with a jump, in
//! the function that it was set on, whose address is then on no stack. So it is with code of BPF, which is looked up only
//! where a frame is in it: see [`super::bpf`].

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

/// Functions whose first instruction shows how registers are numbered in ORC entries; every kernel has them.
const PROBES: [&str; 3] = ["schedule", "vfs_read", "kfree"];
/// Where all kernel code lies: the top 2 GiB, `__START_KERNEL_map` (arch/x86/include/asm/page_64_types.h).
const CODE_START: Gva = Gva(0xffff_ffff_8000_0000);
/// One past the last address for modules, `MODULES_END`; small negative numbers are above it.
const CODE_END: Gva = Gva(0xffff_ffff_ff00_0000);
/// A symbol of kernels whose indirect SP entries add before they dereference (5.8 to 5.11).
const ADDS_FIRST: &str = "asm_call_on_stack";

/// Code that vmpatch has laid into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PatchCode {
    /// Its text.
    pub text: Range<Gva>,
    /// Its ORC table, in guest memory, sorted.
    pub orc: OrcTable,
}

/// A piece of text with the table for it.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    text: Range<Gva>,
    orc: Option<OrcTable>,
    /// The module's name; none for a patch.
    module: Option<Box<str>>,
}

/// All known code of a kernel at one moment.
#[derive(Debug)]
pub struct CodeMap {
    format: OrcFormat,
    /// `_stext.._etext`
    text: Range<Gva>,
    /// `_sinittext.._einittext`: code that ran at boot. Its memory was given away, but the first idle task's stack
    /// still has frames of it, to which nothing ever returns.
    init_text: Option<Range<Gva>>,
    /// `_text.._end`: text and data
    image: Range<Gva>,
    orc: OrcTable,
    modules: Option<Modules>,
    tracers: Option<Trampolines>,
    bpf: Option<BpfCode>,
    loaded: Loaded,
}

/// What comes and goes.
#[derive(Debug, Default, PartialEq, Eq)]
struct Loaded {
    /// Modules' and patches' text, sorted. A patch in the kernel's text cave stands before the kernel's own table.
    pieces: Vec<Piece>,
    /// Modules' other memory, sorted.
    data: Vec<Range<Gva>>,
    trampolines: Vec<Trampoline>,
}

impl CodeMap {
    /// Reads what the kernel has loaded now. `patches`: what vmpatch has laid.
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

    /// Reads again what may have changed since; true where it has.
    pub fn refresh(&mut self, view: &dyn KernelView, patches: &[PatchCode]) -> Result<bool, SetupError> {
        let modules = self
            .modules
            .as_ref()
            .map_or(Ok(Vec::new()), |modules| modules.read(view))?;
        let mut now = Loaded::default();
        for module in modules {
            let piece = |text| Piece {
                text,
                orc: module.orc,
                module: Some(module.name.clone()),
            };
            now.pieces.extend(module.text.into_iter().map(piece));
            now.data.extend(module.data);
        }
        let laid = |patch: &PatchCode| Piece {
            text: patch.text.clone(),
            orc: Some(patch.orc),
            module: None,
        };
        now.pieces.extend(patches.iter().map(laid));
        now.pieces.sort_by_key(|piece| piece.text.start);
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
        self.is_own_text(at) || self.piece(at).is_some() || self.trampoline(at).is_some()
    }

    /// True for a word that may point into code that is not known; see the module's text.
    pub fn may_be_unknown_code(&self, word: u64) -> bool {
        let at = Gva(word);
        (CODE_START..CODE_END).contains(&at)
            && !self.image.contains(&at)
            && !self.is_text(at)
            // a return address may be one past the text
            && !self.is_text(Gva(word - 1))
            && holding(&self.loaded.data, at, |data| data).is_none()
    }

    /// How to unwind from `frame`, whose BP is `bp`.
    pub fn rule(&self, view: &dyn KernelView, frame: Frame, bp: u64) -> Result<Rule, UnwindError> {
        let (at, memory) = (frame.code(), as_memory(view));
        if !self.is_text(at) {
            let Frame { ip, sp, .. } = frame;
            let of_bpf = self.bpf.as_ref().and_then(|bpf| bpf.rule(view, frame, bp));
            return of_bpf.unwrap_or(Err(UnwindError::NotText { ip, sp }));
        }
        if let Some(piece) = self.piece(at) {
            let missing = || match &piece.module {
                Some(module) => UnwindError::NoTable {
                    ip: frame.ip,
                    module: module.to_string(),
                },
                None => UnwindError::NoOrc { ip: at },
            };
            return piece.orc.ok_or_else(missing)?.rule(memory, &self.format, at);
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

    /// The function of `old` that code of BPF, in which `frame` is, may be about to call though no stack has its address.
    pub fn calls_from_bpf<'o>(&self, view: &dyn KernelView, frame: Frame, old: &'o OldCode) -> Option<&'o OldFunction> {
        let bpf = self.bpf.as_ref().filter(|_| !self.is_text(frame.code()))?;
        bpf.calls(view, frame.code(), old)
    }

    fn is_own_text(&self, at: Gva) -> bool {
        self.text.contains(&at) || self.init_text.as_ref().is_some_and(|text| text.contains(&at))
    }

    /// How this kernel writes ORC entries.
    pub fn format(&self) -> &OrcFormat {
        &self.format
    }

    fn piece(&self, at: Gva) -> Option<&Piece> {
        holding(&self.loaded.pieces, at, |piece| &piece.text)
    }

    fn trampoline(&self, at: Gva) -> Option<&Trampoline> {
        holding(&self.loaded.trampolines, at, |trampoline| &trampoline.text)
    }
}

/// The element whose range holds `at`, of a list sorted by start.
fn holding<T>(sorted: &[T], at: Gva, range: impl Fn(&T) -> &Range<Gva>) -> Option<&T> {
    let behind = sorted.partition_point(|element| range(element).start <= at);
    sorted
        .get(behind.checked_sub(1)?)
        .filter(|element| range(element).contains(&at))
}

/// The kernel's own table; its two arrays must agree in length.
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
            .map_err(|error| SetupError::NotUnderstood {
                what: "ORC table",
                found: error.to_string(),
                expected: format!("an entry for {name}"),
            })?;
        at_entry.push(bytes);
    }
    OrcFormat::detect(view.btf(), &at_entry, view.symbol(ADDS_FIRST).is_some())
}

fn as_memory(view: &dyn KernelView) -> &dyn crate::memory::VirtMemory {
    view
}
