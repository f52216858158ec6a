//! The table of RAM blocks: QMP `x-query-ramblock`, the same text as HMP `info ramblock`.
//!
//! Seen with QEMU 7.2.22 (no HVA column) and 10.0.2 (HVA and RO); QEMU's `system/physmem.c`, `ram_block_format`.
//! The name may be missing; all other columns are always there.

use crate::text::{TextError, hex};
use guest_core::Hva;

const SOURCE: &str = "x-query-ramblock";

/// A block of memory that QEMU allocated for the guest: its RAM, a ROM, or a device's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Name of the block. For a block of a device, it begins with the device's path.
    pub name: String,
    /// Size of the host's pages that hold it, in bytes: 4 KiB, or a size of huge pages.
    pub page_size: u64,
    /// Length in use, in bytes.
    pub used: u64,
    /// Address in the QEMU process, if QEMU tells it (7.2 does not).
    pub hva: Option<Hva>,
}

/// Parses the table, without blocks that have no name: memory backends that no device uses yet, and the block of virtio-pmem, which does not name it
/// (`hw/virtio/virtio-pmem.c` never calls `vmstate_register_ram`).
///
/// # Errors
///
/// A heading or a line has an unknown form.
pub fn parse(text: &str) -> Result<Vec<RamBlock>, TextError> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let heading = lines.next().unwrap_or_default();
    let heading_error = || TextError::new(SOURCE, "the heading of the table of RAM blocks", heading);
    let columns: Vec<&str> = heading.split_whitespace().collect();
    let (has_hva, has_mode) = match columns.as_slice() {
        ["Block", "Name", "PSize", "Offset", "Used", "Total"] => (false, false),
        ["Block", "Name", "PSize", "Offset", "Used", "Total", "HVA"] => (true, false),
        ["Block", "Name", "PSize", "Offset", "Used", "Total", "HVA", "RO"] => (true, true),
        _ => return Err(heading_error()),
    };
    let parsed = lines.map(|line| {
        parse_line(line, has_hva, has_mode).ok_or_else(|| TextError::new(SOURCE, "a line about a RAM block", line))
    });
    parsed
        .filter(|block| !block.as_ref().is_ok_and(|block| block.name.is_empty()))
        .collect()
}

/// Parses a line from its right end, because names may contain blanks.
fn parse_line(line: &str, has_hva: bool, has_mode: bool) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let columns = 5 + usize::from(has_hva) + usize::from(has_mode);
    let (name, columns) = words.split_at_checked(words.len().checked_sub(columns)?)?;
    let [page_size, unit, _offset, used, total, rest @ ..] = columns else {
        return None;
    };
    let page_size = bytes_of(page_size, unit)?;
    let hva = match rest {
        [] => None,
        [hva] | [hva, "rw" | "ro"] => Some(Hva(hex(hva)?)),
        _ => return None,
    };
    let (used, total) = (hex(used)?, hex(total)?);
    (used <= total).then(|| RamBlock {
        name: name.join(" "),
        page_size,
        used,
        hva,
    })
}

/// A page size as QEMU prints it (`size_to_str`): a power of two.
fn bytes_of(count: &str, unit: &str) -> Option<u64> {
    let shift = match unit {
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    let bytes = count.parse::<u64>().ok()?.checked_mul(1 << shift)?;
    bytes.is_power_of_two().then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_qemu_10_has_host_addresses() {
        let blocks = parse(include_str!("../testdata/ramblock-10.0.2.txt")).unwrap();
        assert_eq!(blocks.len(), 6);
        let ram = RamBlock {
            name: "m0".into(),
            page_size: 4096,
            used: 64 << 20,
            hva: Some(Hva(0x7f56_e00f_d000)),
        };
        assert_eq!(blocks[0], ram);
        assert_eq!(blocks[1].name, "/rom@etc/acpi/tables");
        assert_eq!(blocks[1].used, 0x20000);
    }

    #[test]
    fn the_table_of_qemu_7_2_has_none() {
        let blocks = parse(include_str!("../testdata/ramblock-7.2.22.txt")).unwrap();
        assert_eq!(blocks.len(), 6);
        assert_eq!(
            blocks[0],
            RamBlock {
                name: "pc.ram".into(),
                page_size: 4096,
                used: 64 << 20,
                hva: None
            }
        );
    }

    #[test]
    fn a_name_with_blanks_and_huge_pages_are_read() {
        let text =
            "Block Name PSize Offset Used Total HVA RO\n my ram 4  2 MiB  0x0 0x200000 0x200000 0x7f0000000000 rw\n";
        let blocks = parse(text).unwrap();
        assert_eq!((blocks[0].name.as_str(), blocks[0].page_size), ("my ram 4", 2 << 20));
    }

    #[test]
    fn a_block_without_a_name_is_left_out() {
        let blocks = parse(include_str!("../testdata/ramblock-10.0.2-devices.txt")).unwrap();
        let names: Vec<&str> = blocks.iter().map(|block| block.name.as_str()).collect();
        assert_eq!(names[..4], ["0000:00:01.0/vm0", "d0", "pc.ram", "n0"]);
        assert_eq!(names[4], "0000:00:03.0/vga.vram");
        let old = "Block Name PSize Offset Used Total\n                            4 KiB  0x0 0x2000000 0x2000000\n";
        assert_eq!(parse(old).unwrap(), []);
    }

    #[test]
    fn an_unknown_heading_or_line_is_refused() {
        assert!(parse("").is_err());
        assert!(parse("Block Name PSize Offset Used Total HVA RO NEW\n").is_err());
        let heading = "Block Name PSize Offset Used Total HVA RO\n";
        for line in [
            "x",
            "a 4 KiB 0x0 0x1 0x1 0x2 xx",
            "a 4 KiB 0x0 0x2 0x1 0x2 rw",
            "a 3 KiB 0x0 0x1 0x1 0x2 rw",
            "a 4 kiB 0x0 0x1 0x1 0x2 rw",
            "KiB 0x0 0x1 0x1 0x2 rw",
        ] {
            assert!(parse(&format!("{heading}{line}\n")).is_err(), "{line}");
        }
    }
}
