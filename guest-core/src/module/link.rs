//! The finished bytes of a module for given addresses.

use super::LinkError;
use super::jump_labels::{JumpLabels, JumpLayout};
use super::layout::AreaKind;
use super::orc::OrcTables;
use super::rows::Table;
use super::sections::{Relocation, SectionOffset, SymbolPlace};
use super::{Image, ResolveError, ResolveSymbol};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// Where the areas of a [`Layout`](super::Layout) will be in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bases {
    /// First byte of the text area.
    pub text: Gva,
    /// First byte of the read-only data area.
    pub rodata: Gva,
    /// First byte of the data area.
    pub data: Gva,
    /// What a per-CPU pointer to the first byte of the per-CPU area is; of no matter where that is empty.
    pub per_cpu: Gva,
    /// The `struct module` by which the guest is going to know the patch: what `THIS_MODULE` is for the patch's code.
    pub module: Gva,
}

/// What linking asks of the guest.
#[derive(Clone, Copy)]
pub struct GuestContext<'g> {
    /// Its symbols.
    pub symbols: &'g dyn ResolveSymbol,
    /// Its kernel's memory: what the kernel has done to its own thunks decides what is done here.
    pub memory: &'g dyn VirtMemory,
    /// Modules that the patch is for, too, but that the guest has not loaded: relocations against their symbols are left undone, as
    /// only functions for those modules use them (`.klp.rela.*`, kernel/livepatch/core.c, `klp_init_object_loaded`).
    pub pending: &'g [String],
    /// Its static keys.
    pub jump_labels: JumpLayout,
    /// `boot_cpu_data.x86_capability`: CPU feature bits and, behind them, bug bits.
    pub capabilities: &'g [u32],
}

/// A module, ready to be written into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linked {
    /// Bytes of the text area. Gaps hold int3.
    pub text: Vec<u8>,
    /// Bytes of the read-only data area.
    pub rodata: Vec<u8>,
    /// Bytes of the data area.
    pub data: Vec<u8>,
    /// Bytes of the per-CPU area, the same for each CPU.
    pub per_cpu: Vec<u8>,
    /// Which new function stands for which old one.
    pub functions: Vec<LinkedFunction>,
    /// How to unwind through the text; the tables are in the read-only data area.
    pub orc: OrcTables,
    /// Its fault fixups, in the read-only data area.
    pub fixups: Table,
    /// Its places of WARN and BUG, in the data area.
    pub bugs: Table,
    /// Its functions' ftrace sites, in ascending order.
    pub sites: Vec<Gva>,
    /// Its branches on static keys.
    pub jump_labels: JumpLabels,
}

/// A function to be replaced, and where its replacement will be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkedFunction {
    /// Object of the old function: a module, or none for the kernel image.
    pub object: Option<String>,
    /// Name of the old function.
    pub old_name: String,
    /// Position of the old function among symbols of its name, from 1 on; 0: the only one.
    pub sympos: u64,
    /// Address of the new function.
    pub new: Gva,
    /// Bytes of the new function. Parts that the compiler split off (`.cold`) lie elsewhere in the text area.
    pub size: u64,
}

impl Image<'_, '_> {
    /// Links the image for `bases`, and does what the kernel's loader would do for this guest.
    ///
    /// Errors: see [`LinkError`]. The guest is read, not written.
    pub fn link(&self, bases: &Bases, guest: &GuestContext<'_>) -> Result<Linked, LinkError> {
        let mut linker = Linker::new(self, bases, guest)?;
        linker.relocate()?;
        // The kernel's order (arch/x86/kernel/module.c, module_finalize): a direct paravirt call may be replaced by an
        // alternative, and replacements contain returns and indirect branches.
        linker.patch_paravirt()?;
        linker.patch_indirect()?;
        linker.patch_returns()?;
        linker.apply_alternatives()?;
        let sites = linker.silence_fentry()?;
        let jump_labels = linker.link_jump_labels()?;
        let orc = linker.write_orc()?;
        let tables = (linker.write_rows(&self.fixups)?, linker.write_rows(&self.bugs)?);
        linker.finish(orc, tables, jump_labels, sites)
    }
}

/// One area's bytes in the making.
struct Buffer {
    kind: AreaKind,
    base: Gva,
    bytes: Vec<u8>,
}

/// The areas in the making.
pub(super) struct Linker<'i, 'd, 'g> {
    pub(super) image: &'i Image<'i, 'd>,
    pub(super) guest: &'i GuestContext<'g>,
    buffers: [Buffer; 5],
    this_module: Gva,
    /// By symbol: the address found, so that each symbol is looked up once.
    addresses: Vec<Option<u64>>,
}

impl<'i, 'd, 'g> Linker<'i, 'd, 'g> {
    fn new(image: &'i Image<'_, 'd>, bases: &Bases, guest: &'i GuestContext<'g>) -> Result<Self, LinkError> {
        let layout = image.layout();
        // Nothing is there in the guest: any address serves that is as near to everything as the text is.
        let scratch = Gva(bases
            .text
            .0
            .saturating_add(layout.text.size)
            .next_multiple_of(layout.scratch.align));
        let mut buffers = layout.areas().map(|(kind, area)| {
            let base = match kind {
                AreaKind::Text => bases.text,
                AreaKind::RoData => bases.rodata,
                AreaKind::Data => bases.data,
                AreaKind::PerCpu => bases.per_cpu,
                AreaKind::Scratch => scratch,
            };
            // Layout::place bounds the size.
            let size = usize::try_from(area.size).unwrap_or_default();
            let filler = if kind == AreaKind::Text { 0xcc } else { 0 };
            Buffer {
                kind,
                base,
                bytes: vec![filler; size],
            }
        });
        for (kind, area) in layout.areas() {
            let base = buffers.iter().find(|b| b.kind == kind).map_or(Gva(0), |b| b.base);
            if base.checked_add(area.size).is_none() || base.align_down(area.align) != base {
                return Err(LinkError::Base {
                    area: kind,
                    size: area.size,
                    base,
                    align: area.align,
                });
            }
        }
        for placed in &layout.sections {
            let data = image
                .module
                .section(placed.section)
                .map_or(&[][..], |section| section.data);
            let start = usize::try_from(placed.offset).unwrap_or(usize::MAX);
            let buffer = buffers.iter_mut().find(|b| b.kind == placed.area);
            let end = usize::try_from(placed.offset.saturating_add(placed.size)).unwrap_or(usize::MAX);
            if let Some(slot) = buffer.and_then(|b| b.bytes.get_mut(start..end)) {
                // A NOBITS section has no bytes, and is zero.
                slot.fill(0);
                slot.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
            }
        }
        Ok(Self {
            image,
            guest,
            buffers,
            this_module: bases.module,
            addresses: vec![None; image.module.symbol_count()],
        })
    }

    fn finish(
        self,
        orc: OrcTables,
        (fixups, bugs): (Table, Table),
        jump_labels: JumpLabels,
        sites: Vec<Gva>,
    ) -> Result<Linked, LinkError> {
        let mut functions = Vec::new();
        for object in &self.image.patch.objects {
            for function in &object.functions {
                functions.push(LinkedFunction {
                    object: object.name.clone(),
                    old_name: function.old_name.clone(),
                    sympos: function.sympos,
                    new: Gva(self.address(function.new)?),
                    size: function.size,
                });
            }
        }
        let [text, rodata, data, per_cpu, _] = self.buffers.map(|buffer| buffer.bytes);
        Ok(Linked {
            text,
            rodata,
            data,
            per_cpu,
            functions,
            orc,
            fixups,
            bugs,
            jump_labels,
            sites,
        })
    }

    /// The guest-virtual address of a place in a placed section, or of a section's end.
    pub(super) fn address(&self, at: SectionOffset) -> Result<u64, LinkError> {
        let found = self.locate(at, 0).and_then(|(buffer, offset)| {
            let offset = u64::try_from(offset).ok()?;
            buffer.base.checked_add(offset)
        });
        found.map(|address| address.0).ok_or_else(|| self.outside(at, 0))
    }

    /// `len` bytes as they are by now.
    pub(super) fn bytes(&self, at: SectionOffset, len: usize) -> Result<&[u8], LinkError> {
        let found = self
            .locate(at, len)
            .and_then(|(buffer, offset)| buffer.bytes.get(offset..offset.checked_add(len)?));
        found.ok_or_else(|| self.outside(at, len))
    }

    /// Replaces bytes.
    pub(super) fn write(&mut self, at: SectionOffset, bytes: &[u8]) -> Result<(), LinkError> {
        let located = self
            .locate(at, bytes.len())
            .map(|(buffer, offset)| (buffer.kind, offset));
        let slot = located.and_then(|(kind, offset)| {
            let buffer = self.buffers.iter_mut().find(|buffer| buffer.kind == kind)?;
            buffer.bytes.get_mut(offset..offset.checked_add(bytes.len())?)
        });
        match slot {
            Some(slot) => slot.copy_from_slice(bytes),
            None => return Err(self.outside(at, bytes.len())),
        }
        Ok(())
    }

    /// The buffer that holds `len` bytes at `at`, and their offset in it. None where they are not all in one section.
    fn locate(&self, at: SectionOffset, len: usize) -> Option<(&Buffer, usize)> {
        let (kind, base) = (*self.image.places.get(at.section.0)?)?;
        let end = at.offset.checked_add(u64::try_from(len).ok()?)?;
        self.image
            .module
            .section(at.section)
            .filter(|section| end <= section.size)?;
        let buffer = self.buffers.iter().find(|buffer| buffer.kind == kind)?;
        Some((buffer, usize::try_from(base.checked_add(at.offset)?).ok()?))
    }

    /// First byte of an area.
    pub(super) fn base(&self, area: AreaKind) -> Gva {
        self.buffers
            .iter()
            .find(|buffer| buffer.kind == area)
            .map_or(Gva(0), |buffer| buffer.base)
    }

    /// Writes at an offset of an area that was reserved for it.
    pub(super) fn write_area(&mut self, area: AreaKind, offset: u64, bytes: &[u8]) {
        let buffer = self.buffers.iter_mut().find(|buffer| buffer.kind == area);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let slot = buffer.and_then(|b| b.bytes.get_mut(start..start.saturating_add(bytes.len())));
        if let Some(slot) = slot {
            slot.copy_from_slice(bytes);
        }
    }

    /// The word at an address in the module's own read-only data or data, with the bits `set` set in it from now on. None where
    /// that is not the module's own.
    pub(super) fn own_word(&mut self, at: u64, set: u64) -> Option<u64> {
        let buffers = self.buffers.iter_mut();
        let mut buffers = buffers.filter(|buffer| matches!(buffer.kind, AreaKind::RoData | AreaKind::Data));
        let slot: &mut [u8; 8] = buffers.find_map(|buffer| {
            let offset = usize::try_from(at.checked_sub(buffer.base.0)?).ok()?;
            buffer.bytes.get_mut(offset..)?.first_chunk_mut()
        })?;
        let word = u64::from_le_bytes(*slot);
        *slot = (word | set).to_le_bytes();
        Some(word)
    }

    /// True where the place goes into the guest, or alternatives copy from there.
    pub(super) fn is_placed(&self, at: SectionOffset) -> bool {
        self.image.places.get(at.section.0).is_some_and(Option::is_some)
    }

    /// An error about code at `at` that a table lists: `len` bytes of it are shown, or those up to its section's end.
    pub(super) fn site_error(&self, table: &'static str, at: SectionOffset, len: usize, expected: String) -> LinkError {
        let found = (1..=len)
            .rev()
            .find_map(|len| self.bytes(at, len).ok())
            .unwrap_or_default()
            .to_vec();
        LinkError::Site {
            table,
            at: self.image.module.place(at),
            found,
            expected,
        }
    }

    fn outside(&self, at: SectionOffset, len: usize) -> LinkError {
        LinkError::Outside {
            at: self.image.module.place(at),
            len,
        }
    }

    /// The value of the symbol of a relocation at `at`.
    pub(super) fn symbol_address(&mut self, at: SectionOffset, relocation: &Relocation) -> Result<u64, LinkError> {
        let index = relocation.symbol.0;
        if let Some(Some(address)) = self.addresses.get(index) {
            return Ok(*address);
        }
        let module = self.image.module;
        let Some(symbol) = module.symbol(relocation) else {
            return Err(self.outside(at, 0));
        };
        let resolved = match symbol.place {
            SymbolPlace::Absolute(value) => Ok(Gva(value)),
            SymbolPlace::Defined(place) if module.is_this_module(place) => {
                Ok(self.this_module.wrapping_add(place.offset))
            }
            SymbolPlace::Defined(place) => Ok(Gva(self.section_address(place)?)),
            SymbolPlace::Livepatch { object, name, sympos } => {
                self.guest
                    .symbols
                    .any((object != "vmlinux").then_some(object), name, sympos)
            }
            SymbolPlace::Undefined { weak } => match self.guest.symbols.exported(symbol.name) {
                Err(ResolveError::NotFound { .. }) if weak => Ok(Gva(0)),
                resolved => resolved,
            },
            SymbolPlace::Common | SymbolPlace::Unknown(_) => return Err(self.outside(at, 0)),
        };
        let address = resolved.map_err(|cause| LinkError::Symbol {
            symbol: symbol.name.into(),
            needed_by: module.place(at),
            cause,
        })?;
        if let Some(slot) = self.addresses.get_mut(index) {
            *slot = Some(address.0);
        }
        Ok(address.0)
    }

    /// As [`Linker::address`], for a symbol: its value may lie outside its section, as the addend brings it back.
    fn section_address(&self, at: SectionOffset) -> Result<u64, LinkError> {
        let start = self.address(SectionOffset { offset: 0, ..at })?;
        Ok(start.wrapping_add(at.offset))
    }
}
