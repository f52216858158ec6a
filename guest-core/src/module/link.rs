//! Links a module: the finished bytes for given addresses.

use super::LinkError;
use super::instruction_tables::Table;
use super::jump_labels::{JumpLabels, JumpLayout};
use super::layout::AreaKind;
use super::orc::OrcTables;
use super::sections::{Relocation, SectionOffset, SymbolPlace};
use super::{Image, ResolveError, ResolveSymbol};
use crate::addr::Gva;
use crate::memory::VirtMemory;

/// The guest-virtual addresses of the areas of a [`Layout`](super::Layout).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bases {
    /// First byte of the text area.
    pub text: Gva,
    /// First byte of the read-only data area.
    pub rodata: Gva,
    /// First byte of the data area.
    pub data: Gva,
    /// The per-CPU pointer to the first byte of the per-CPU area. It is not used if the area is empty.
    pub per_cpu: Gva,
    /// The `struct module` of the patch in the guest: `THIS_MODULE` for the patch's code.
    pub module: Gva,
}

/// What linking needs of the guest.
#[derive(Clone, Copy)]
pub struct GuestContext<'g> {
    /// Symbols of its kernel and modules.
    pub symbols: &'g dyn ResolveSymbol,
    /// Its kernel's memory. Linking follows what the kernel has made of its own thunks.
    pub memory: &'g dyn VirtMemory,
    /// Modules that the patch also changes, but that the guest has not loaded. Relocations against their symbols are not applied, because only functions for
    /// these modules use them (`.klp.rela.*`, kernel/livepatch/core.c, `klp_init_object_loaded`).
    pub pending: &'g [String],
    /// Offsets in its static keys.
    pub jump_labels: JumpLayout,
    /// `boot_cpu_data.x86_capability`: CPU feature bits and, behind them, bug bits.
    pub capabilities: &'g [u32],
}

/// A linked module, ready to be staged in the guest.
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
    /// The new functions, with the old ones that they replace.
    pub functions: Vec<LinkedFunction>,
    /// The ORC tables of the text, in the read-only data area.
    pub orc: OrcTables,
    /// The exception table, in the read-only data area.
    pub fixups: Table,
    /// The table of WARN and BUG, in the data area.
    pub bugs: Table,
    /// Guest-virtual addresses of its functions' ftrace sites, in ascending order.
    pub sites: Vec<Gva>,
    /// The branches on static keys.
    pub jump_labels: JumpLabels,
    /// Guest-virtual address of the space for trampolines, in the order of the functions, where the image has it and an ORC entry for it.
    pub trampolines: Option<Gva>,
}

/// An old function, and the address of the new one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkedFunction {
    /// Object of the old function: a module, or `None` for the kernel image.
    pub object: Option<String>,
    /// Name of the old function.
    pub old_name: String,
    /// Position of the old function among symbols of its name, from 1; 0 if the name is unique.
    pub sympos: u64,
    /// Guest-virtual address of the new function.
    pub new: Gva,
    /// Length of the new function in bytes. Its split parts (`.cold`) are elsewhere in the text area.
    pub size: u64,
}

impl Image<'_, '_> {
    /// Links the image for `bases`, and processes its tables as the kernel's loader would for this guest. Reads the guest and changes nothing.
    ///
    /// # Errors
    ///
    /// The image cannot be linked for this guest.
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

/// The bytes of an area that is being linked.
struct Buffer {
    kind: AreaKind,
    base: Gva,
    bytes: Vec<u8>,
}

/// The areas that are being linked.
pub(super) struct Linker<'i, 'd, 'g> {
    pub(super) image: &'i Image<'i, 'd>,
    pub(super) guest: &'i GuestContext<'g>,
    buffers: [Buffer; 5],
    this_module: Gva,
    /// Addresses by symbol, so that each symbol is looked up once.
    addresses: Vec<Option<u64>>,
}

impl<'i, 'd, 'g> Linker<'i, 'd, 'g> {
    fn new(image: &'i Image<'_, 'd>, bases: &Bases, guest: &'i GuestContext<'g>) -> Result<Self, LinkError> {
        let layout = image.layout();
        // The guest has nothing there. Any address near the text will do.
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
        let has_row = |at: &Gva| orc.rows.iter().any(|(row, _)| row == at);
        let trampolines = self
            .image
            .trampolines
            .map(|at| self.base(AreaKind::Text).wrapping_add(at));
        let trampolines = trampolines.filter(has_row);
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
            trampolines,
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

    /// `len` bytes in their present state.
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

    /// The buffer that holds `len` bytes at `at`, and their offset in it; `None` if they are not all in one section.
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

    /// Sets the bits `set` in the word at an address in the module's own read-only data or data, and gives the word; `None` if the address is not the
    /// module's own.
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

    /// True if the place goes into the guest, or alternatives copy from there.
    pub(super) fn is_placed(&self, at: SectionOffset) -> bool {
        self.image.places.get(at.section.0).is_some_and(Option::is_some)
    }

    /// The error for code at `at` that a table lists. It shows `len` bytes of the code, up to the section's end.
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

    /// As [`Linker::address`], for a symbol. Its value may be outside of its section, if the addend leads back into it.
    fn section_address(&self, at: SectionOffset) -> Result<u64, LinkError> {
        let start = self.address(SectionOffset { offset: 0, ..at })?;
        Ok(start.wrapping_add(at.offset))
    }
}
