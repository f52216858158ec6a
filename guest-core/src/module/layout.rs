//! The layout of a module's sections in memory, in areas with different permissions.

use super::sections::{Section, SectionId};

/// Most bytes of one area. A guest's text cave has 2 to 4 MiB in all.
const AREA_BYTES_MAX: u64 = 16 << 20;
/// Largest alignment of a section, in bytes. Areas begin at a page.
const ALIGN_MAX: u64 = 4096;

/// An area of a module in guest memory, by the permissions of its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AreaKind {
    /// Executable, not writable.
    Text,
    /// Neither executable nor writable.
    RoData,
    /// Writable.
    Data,
    /// Writable, with a copy for each CPU at the same offset from the start of the CPU's own area.
    PerCpu,
    /// Not in the guest: instructions that alternatives copy. Their addresses are behind the text.
    Scratch,
}

impl AreaKind {
    const ALL: [Self; 5] = [Self::Text, Self::RoData, Self::Data, Self::PerCpu, Self::Scratch];
}

/// The memory that one area needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Bytes.
    pub size: u64,
    /// Alignment of its first byte: a power of two, at most 4096.
    pub align: u64,
}

impl Default for Area {
    fn default() -> Self {
        Self { size: 0, align: 1 }
    }
}

/// The place of a section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedSection {
    /// The section.
    pub section: SectionId,
    /// Its name.
    pub name: String,
    /// Its area.
    pub area: AreaKind,
    /// Bytes from the area's start.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// The areas that a module needs, and the places of its sections in them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Layout {
    /// Text: the new functions.
    pub text: Area,
    /// Read-only data: constants, data that are written once at load, and the ORC tables of the text.
    pub rodata: Area,
    /// Data: variables with a value in the file, and those that are zero.
    pub data: Area,
    /// Per-CPU data: the initial values of variables with a copy for each CPU.
    pub per_cpu: Area,
    /// The placed sections, in the file's order. Those in [`AreaKind::Scratch`] are not in the guest.
    pub sections: Vec<PlacedSection>,
    pub(crate) scratch: Area,
}

/// Why a section has no place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The alignment is not a power of two, or larger than a page.
    #[error("section {section} is to be aligned to {align} bytes, expected a power of two up to 4096")]
    Align {
        /// The section's name.
        section: String,
        /// Bytes.
        align: u64,
    },
    /// The section is too big for its area.
    #[error("section {section} ({size} bytes) does not fit: {area:?} would exceed {max} bytes")]
    TooBig {
        /// The section's name.
        section: String,
        /// Its bytes.
        size: u64,
        /// The area that it belongs in.
        area: AreaKind,
        /// Most bytes of an area.
        max: u64,
    },
}

impl Layout {
    /// Places a section at the end of `area`.
    pub(crate) fn place(&mut self, id: SectionId, section: &Section<'_>, area: AreaKind) -> Result<(), LayoutError> {
        let offset = self.reserve(section.name, area, section.size, section.align)?;
        let name = section.name.to_owned();
        self.sections.push(PlacedSection {
            section: id,
            name,
            area,
            offset,
            size: section.size,
        });
        Ok(())
    }

    /// Reserves `size` aligned bytes at the end of `area`, and gives their offset. `name` is for errors.
    pub(crate) fn reserve(&mut self, name: &str, area: AreaKind, size: u64, align: u64) -> Result<u64, LayoutError> {
        if !align.is_power_of_two() || align > ALIGN_MAX {
            return Err(LayoutError::Align {
                section: name.into(),
                align,
            });
        }
        let slot = self.area_mut(area);
        let offset = slot.size.checked_next_multiple_of(align);
        let end = offset
            .and_then(|offset| offset.checked_add(size))
            .filter(|end| *end <= AREA_BYTES_MAX);
        let (Some(offset), Some(end)) = (offset, end) else {
            return Err(LayoutError::TooBig {
                section: name.into(),
                size,
                area,
                max: AREA_BYTES_MAX,
            });
        };
        *slot = Area {
            size: end,
            align: slot.align.max(align),
        };
        Ok(offset)
    }

    /// The memory that `area` needs.
    pub(crate) fn area(&self, area: AreaKind) -> Area {
        match area {
            AreaKind::Text => self.text,
            AreaKind::RoData => self.rodata,
            AreaKind::Data => self.data,
            AreaKind::PerCpu => self.per_cpu,
            AreaKind::Scratch => self.scratch,
        }
    }

    /// All areas, including the one that is not in the guest.
    pub(crate) fn areas(&self) -> [(AreaKind, Area); 5] {
        AreaKind::ALL.map(|kind| (kind, self.area(kind)))
    }

    fn area_mut(&mut self, area: AreaKind) -> &mut Area {
        match area {
            AreaKind::Text => &mut self.text,
            AreaKind::RoData => &mut self.rodata,
            AreaKind::Data => &mut self.data,
            AreaKind::PerCpu => &mut self.per_cpu,
            AreaKind::Scratch => &mut self.scratch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_follow_each_other_at_aligned_offsets() {
        let mut layout = Layout::default();
        assert_eq!(layout.reserve("a", AreaKind::Text, 5, 1), Ok(0));
        assert_eq!(layout.reserve("b", AreaKind::Text, 3, 16), Ok(16));
        assert_eq!(layout.reserve("c", AreaKind::Data, 1, 8), Ok(0));
        assert_eq!(layout.text, Area { size: 19, align: 16 });
        assert_eq!(layout.data, Area { size: 1, align: 8 });
    }

    #[test]
    fn a_huge_bss_is_refused_whatever_its_size() {
        for size in [AREA_BYTES_MAX + 1, u64::MAX] {
            let refused = Layout::default().reserve(".bss", AreaKind::Data, size, 1);
            assert!(matches!(refused, Err(LayoutError::TooBig { .. })), "{size}");
        }
    }

    #[test]
    fn an_alignment_that_is_no_power_of_two_or_more_than_a_page_is_refused() {
        for align in [0, 3, 8192, u64::MAX] {
            let refused = Layout::default().reserve(".data", AreaKind::Data, 1, align);
            assert!(matches!(refused, Err(LayoutError::Align { .. })), "{align}");
        }
    }
}
