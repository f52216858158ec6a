//! The guest-physical address space: HMP `info mtree -f`.
//!
//! Seen with QEMU 7.2.22 and 10.0.2, under TCG and KVM; QEMU's `system/memory.c`, `mtree_print_flatview`:
//!
//! ```text
//! FlatView #1
//!  AS "memory", root: system
//!  AS "cpu-memory-0", root: system
//!  Root memory region: system
//!   0000000000000000-00000000000c2fff (prio 0, ram): pc.ram
//!   00000000000c3000-00000000000e3fff (prio 0, rom): pc.ram @00000000000c3000 KVM
//! ```
//!
//! The last word is the accelerator's name, if it uses the range. Names may contain blanks. There are several views (system management mode has its
//! own); devices and vCPUs use that of the space "memory".

use crate::text::{TextError, hex};
use guest_core::Gpa;

const SOURCE: &str = "info mtree -f";

/// The line that identifies the view.
const SYSTEM_SPACE: &str = " AS \"memory\", root: system";

/// Names of accelerators that QEMU prints behind the ranges that they use.
const ACCELERATORS: [&str; 4] = [" KVM", " HVF", " NVMM", " WHPX"];

/// QEMU's words for RAM. The second is for NVDIMMs, which a guest's kernel can also use as RAM (`dax_kmem`).
const RAM: [&str; 2] = ["ram", "nv-ram"];

/// A guest-physical range of plain RAM: readable and writable, without a device's registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamRange {
    /// Guest-physical address of the first byte.
    pub gpa: Gpa,
    /// Bytes.
    pub len: u64,
    /// Name of its memory region. For the guest's own RAM it is the name of the RAM block.
    pub name: String,
    /// Offset in that region, in bytes.
    pub offset: u64,
}

/// Parses the ranges of plain RAM in the guest's physical address space, ascending. RAM of devices is included, under the devices' names. ROM, and RAM
/// that the chipset write-protects at the moment (the firmware's shadow below 1 MiB), are not.
///
/// # Errors
///
/// There is no such view, or it has a line of unknown form.
pub fn ram_ranges(text: &str) -> Result<Vec<RamRange>, TextError> {
    let view = text
        .split("FlatView #")
        .find(|view| view.lines().any(|line| line == SYSTEM_SPACE))
        .ok_or_else(|| TextError::new(SOURCE, "a view of the address space \"memory\"", text))?;
    let lines = view.lines().filter(|line| line.starts_with("  "));
    let mut ranges = Vec::new();
    let mut free_from = Some(0);
    for line in lines {
        let error = || TextError::new(SOURCE, "an ascending range", line);
        let Line {
            first,
            last,
            kind,
            name,
            offset,
        } = parse_line(line).ok_or_else(error)?;
        if free_from.is_none_or(|free| first < free) || last < first {
            return Err(error());
        }
        free_from = last.checked_add(1);
        if RAM.contains(&kind) {
            let len = (last - first).checked_add(1).ok_or_else(error)?;
            ranges.push(RamRange {
                gpa: Gpa(first),
                len,
                name: name.to_owned(),
                offset,
            });
        }
    }
    Ok(ranges)
}

struct Line<'a> {
    first: u64,
    last: u64,
    kind: &'a str,
    name: &'a str,
    offset: u64,
}

fn parse_line(line: &str) -> Option<Line<'_>> {
    let (range, rest) = line.trim_start().split_once(" (prio ")?;
    let (first, last) = range.split_once('-')?;
    let (priority, rest) = rest.split_once(", ")?;
    priority.parse::<i32>().ok()?;
    let (kind, rest) = rest.split_once("): ")?;
    let rest = ACCELERATORS
        .iter()
        .find_map(|name| rest.strip_suffix(name))
        .unwrap_or(rest);
    let (name, offset) = match rest
        .rsplit_once(" @")
        .and_then(|(name, offset)| Some((name, hex(offset)?)))
    {
        Some(found) => found,
        None => (rest, 0),
    };
    Some(Line {
        first: hex(first)?,
        last: hex(last)?,
        kind,
        name,
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(gpa: u64, end: u64, name: &str, offset: u64) -> RamRange {
        RamRange {
            gpa: Gpa(gpa),
            len: end - gpa,
            name: name.into(),
            offset,
        }
    }

    #[test]
    fn only_plain_ram_of_the_system_space_counts() {
        for (text, name) in [
            (include_str!("../testdata/mtree-10.0.2.txt"), "m0"),
            (include_str!("../testdata/mtree-7.2.22.txt"), "pc.ram"),
        ] {
            let expected = [
                range(0, 0xc3000, name, 0),
                range(0xe4000, 0xf0000, name, 0xe4000),
                range(0x10_0000, 0x400_0000, name, 0x10_0000),
            ];
            assert_eq!(ram_ranges(text).unwrap(), expected);
        }
    }

    #[test]
    fn the_accelerators_name_is_not_the_regions() {
        let text = include_str!("../testdata/mtree-10.0.2-kvm.txt");
        assert_eq!(ram_ranges(text).unwrap(), [range(0, 0x400_0000, "pc.ram", 0)]);
    }

    #[test]
    fn ram_above_the_pci_hole_keeps_its_offset() {
        let text = "FlatView #2\n AS \"memory\", root: system\n Root memory region: system\n  \
            0000000000100000-000000007fffffff (prio 0, ram): pc.ram @0000000000100000\n  \
            00000000febf0400-00000000febf041f (prio 0, i/o): vga ioports remapped\n  \
            0000000100000000-00000001bfffffff (prio 0, ram): pc.ram @0000000080000000 KVM\n";
        let expected = [
            range(0x10_0000, 0x8000_0000, "pc.ram", 0x10_0000),
            range(0x1_0000_0000, 0x1_c000_0000, "pc.ram", 0x8000_0000),
        ];
        assert_eq!(ram_ranges(text).unwrap(), expected);
    }

    #[test]
    fn memory_of_nvdimms_is_ram() {
        let text = "FlatView #0\n AS \"memory\", root: system\n  \
            0000000108000000-000000010bffffff (prio 0, nv-ram): n0\n  \
            000000010c000000-000000010cffffff (prio 0, nv-rom): n1\n  \
            000000010d000000-000000010dffffff (prio 0, ramd): 0000:00:02.0 BAR 1\n";
        let expected = [range(0x1_0800_0000, 0x1_0c00_0000, "n0", 0)];
        assert_eq!(ram_ranges(text).unwrap(), expected);
    }

    #[test]
    fn a_missing_view_and_strange_lines_are_refused() {
        assert!(ram_ranges("").is_err());
        assert!(ram_ranges("FlatView #0\n AS \"I/O\", root: io\n").is_err());
        let head = "FlatView #0\n AS \"memory\", root: system\n";
        for line in [
            "  nonsense",
            "  0000000000000000-zz (prio 0, ram): a",
            "  0000000000000001-0000000000000000 (prio 0, ram): a",
            "  0000000000000000-ffffffffffffffff (prio 0, ram): a",
            "  0000000000002000-0000000000002fff (prio 0, ram): a\n  0000000000001000-0000000000001fff (prio 0, ram): b",
        ] {
            assert!(ram_ranges(&format!("{head}{line}\n")).is_err(), "{line}");
        }
    }
}
