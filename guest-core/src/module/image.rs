//! The part of a module that goes into the guest: the sections that its new functions need, directly or through others. A section that would keep them from
//! working there is refused by name.

use super::alternatives::{AltLayout, Alternative};
use super::instruction_tables::{BUGS, FIXUPS, Rows};
use super::jump_table::JumpRows;
use super::layout::{AreaKind, Layout, LayoutError};
use super::orc::OrcRows;
use super::sections::{SectionOffset, SymbolPlace};
use super::selection::Selection;
use super::sites::TableError;
use super::{Patch, PatchModule};

/// The part of a module that goes into the guest, with its layout.
#[derive(Debug)]
pub struct Image<'m, 'd> {
    pub(crate) module: &'m PatchModule<'d>,
    pub(crate) patch: &'m Patch,
    /// The area and offset of each placed section, by section index.
    pub(crate) places: Vec<Option<(AreaKind, u64)>>,
    /// Alternatives in placed code.
    pub(crate) alternatives: Vec<Alternative>,
    /// ORC rows of placed code.
    pub(crate) orc: OrcRows<'d>,
    /// Exception table rows of placed code.
    pub(crate) fixups: Rows,
    /// WARN and BUG in placed code.
    pub(crate) bugs: Rows,
    /// Branches on static keys in placed code.
    pub(crate) jump_rows: JumpRows,
    /// Calls of `__fentry__` in placed code.
    pub(crate) fentry_sites: Vec<SectionOffset>,
    /// Offset of the trampolines in the text area, where they have space.
    pub(crate) trampolines: Option<u64>,
    layout: Layout,
    undefined: Vec<Undefined>,
}

/// A symbol that the guest must provide.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Undefined {
    /// Name of the symbol.
    pub name: String,
    /// For a livepatch symbol, its object (`vmlinux` or a module) and its position there. `None` for an ordinary symbol, which must be exported.
    pub object: Option<(String, u64)>,
    /// True if the module works without it (a weak symbol).
    pub weak: bool,
    /// The first reference to it: section and offset.
    pub needed_by: String,
}

/// Why a module has no layout.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// A section that is not handled concerns needed code or data.
    #[error("unsupported section {section}, for {concerns}: {reason}")]
    UnsupportedSection {
        /// The section's name.
        section: String,
        /// The code or data that the section concerns, or that refers to it: section and offset.
        concerns: String,
        /// Why it is not handled.
        reason: &'static str,
    },
    /// Needed code or data refer to a section that does not go into the guest.
    #[error("{needed_by} refers to section {section}, symbol '{symbol}', which is not placed in the guest: {reason}")]
    NotPlaced {
        /// The place of the reference: section and offset.
        needed_by: String,
        /// The symbol that it refers to; empty for a section symbol.
        symbol: String,
        /// The section's name.
        section: String,
        /// Why the section is not placed.
        reason: &'static str,
    },
    /// A symbol of a kind that the kernel's loader also refuses.
    #[error("{needed_by} refers to {symbol}, whose section index {index:#x} no module may use")]
    SymbolKind {
        /// The place of the reference.
        needed_by: String,
        /// The symbol's name.
        symbol: String,
        /// Its `st_shndx`.
        index: u16,
    },
    /// A table for the loader is malformed.
    #[error(transparent)]
    Table(#[from] TableError),
    /// A section does not fit into its area.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

impl<'d> PatchModule<'d> {
    /// Selects the sections that `patch` needs, and assigns their places. `alt_layout` is that of the guest's kernel.
    ///
    /// # Errors
    ///
    /// A needed section cannot go into the guest.
    pub fn image<'m>(&'m self, patch: &'m Patch, alt_layout: &AltLayout) -> Result<Image<'m, 'd>, ImageError> {
        self.image_with(patch, alt_layout, 0)
    }

    /// The same with space for a [trampoline](super::Linked::trampolines) of that many bytes for each function.
    ///
    /// # Errors
    ///
    /// As [`image`](Self::image).
    pub(crate) fn image_with<'m>(
        &'m self,
        patch: &'m Patch,
        alt_layout: &AltLayout,
        trampoline_bytes: u64,
    ) -> Result<Image<'m, 'd>, ImageError> {
        let alternatives = self.alternatives(alt_layout)?;
        let (fixups, bugs, jump_rows) = (self.rows(FIXUPS)?, self.rows(BUGS)?, self.jump_rows()?);
        let mut selection = Selection::new(self, patch, &alternatives, [&fixups, &bugs], &jump_rows);
        for function in patch.objects.iter().flat_map(|object| &object.functions) {
            selection.need(function.new.section, "", || {
                format!("the patch of {}", function.old_name)
            })?;
        }
        selection.close()?;
        selection.refuse_unhandled()?;
        let mut layout = Layout::default();
        for (id, area) in &selection.needed {
            if let Some(section) = self.section(*id) {
                layout.place(*id, section, *area)?;
            }
        }
        let functions = patch
            .objects
            .iter()
            .map(|object| object.functions.len() as u64)
            .sum::<u64>();
        let trampolines = match trampoline_bytes {
            0 => None,
            each => Some(layout.reserve("trampolines", AreaKind::Text, functions.saturating_mul(each), each)?),
        };
        let mut orc = self.orc_rows(|section| selection.needed.get(&section) == Some(&AreaKind::Text))?;
        orc.reserve_row(trampolines.is_some());
        orc.place(&mut layout)?;
        let is_text = |section| selection.needed.get(&section) == Some(&AreaKind::Text);
        let (fixups, bugs) = (fixups.place(&mut layout, is_text)?, bugs.place(&mut layout, is_text)?);
        let jump_rows = jump_rows.place(&mut layout, is_text)?;
        let mut fentry_sites = self.fentry_sites()?;
        fentry_sites.retain(|site| is_text(site.section));
        let mut places = vec![None; self.elf.sections.len()];
        for placed in &layout.sections {
            if let Some(place) = places.get_mut(placed.section.0) {
                *place = Some((placed.area, placed.offset));
            }
        }
        let undefined = selection.undefined.into_values().collect();
        let needed = selection.needed;
        let alternatives = alternatives
            .into_iter()
            .filter(|a| needed.contains_key(&a.site.section))
            .collect();
        Ok(Image {
            module: self,
            patch,
            places,
            alternatives,
            orc,
            fixups,
            bugs,
            jump_rows,
            fentry_sites,
            trampolines,
            layout,
            undefined,
        })
    }
}

impl Image<'_, '_> {
    /// The memory that the image needs.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// True if placed code has branches on static keys.
    pub fn has_jump_labels(&self) -> bool {
        !self.jump_rows.is_empty()
    }

    /// Number of placed functions with an ftrace site.
    pub fn traceable(&self) -> usize {
        self.fentry_sites.len()
    }

    /// The symbols that the guest must provide, by name.
    pub fn undefined(&self) -> &[Undefined] {
        &self.undefined
    }

    /// The named symbols in the patch's own memory in the guest, in the file's order.
    pub fn symbols(&self) -> impl Iterator<Item = PlacedSymbol<'_>> {
        let symbols = self.module.elf.symbols.iter().filter(|symbol| !symbol.name.is_empty());
        symbols.filter_map(|symbol| {
            let SymbolPlace::Defined(at) = symbol.place else {
                return None;
            };
            let section = self.module.section(at.section)?;
            let (area, start) = (*self.places.get(at.section.0)?)?;
            (!matches!(area, AreaKind::PerCpu | AreaKind::Scratch) && at.offset < section.size).then_some(
                PlacedSymbol {
                    name: symbol.name,
                    area,
                    offset: start.checked_add(at.offset)?,
                    size: symbol.size,
                    is_function: symbol.is_function,
                },
            )
        })
    }
}

/// A symbol in the patch's own memory in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlacedSymbol<'d> {
    /// Its name.
    pub name: &'d str,
    /// The area that it is in.
    pub area: AreaKind,
    /// Bytes from the area's start.
    pub offset: u64,
    /// Bytes; 0 where the file does not say.
    pub size: u64,
    /// True for a function.
    pub is_function: bool,
}
