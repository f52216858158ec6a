//! The table of RAM blocks: QMP `x-query-ramblock`, the same text as HMP `info ramblock`.
//!
//! Seen with QEMU 7.2.22 (no HVA column) and 10.0.2 (HVA and RO); QEMU's `system/physmem.c`, `ram_block_format`.

use crate::addr::Hva;
use crate::text::{TextError, hex};

const SOURCE: &str = "x-query-ramblock";

/// A block of memory that QEMU allocated for the guest: its RAM, a ROM, or a device's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RamBlock {
    /// Its name; a block of a device has the device's path in front.
    pub name: String,
    /// Bytes in use.
    pub used: u64,
    /// Where it lies in the QEMU process, where QEMU says so (7.2 does not).
    pub hva: Option<Hva>,
}

/// Reads the table. Errors: a heading or a line of unknown form.
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
    lines
        .map(|line| {
            parse_line(line, has_hva, has_mode).ok_or_else(|| TextError::new(SOURCE, "a line about a RAM block", line))
        })
        .collect()
}

/// A line, read from its right end: names may hold blanks.
fn parse_line(line: &str, has_hva: bool, has_mode: bool) -> Option<RamBlock> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let columns = 5 + usize::from(has_hva) + usize::from(has_mode);
    let (name, columns) = words.split_at_checked(words.len().checked_sub(columns)?)?;
    let [_page_size, "KiB" | "MiB" | "GiB", _offset, used, total, rest @ ..] = columns else {
        return None;
    };
    let hva = match rest {
        [] => None,
        [hva] | [hva, "rw" | "ro"] => Some(Hva(hex(hva)?)),
        _ => return None,
    };
    let (used, total) = (hex(used)?, hex(total)?);
    (used <= total && !name.is_empty()).then(|| RamBlock {
        name: name.join(" "),
        used,
        hva,
    })
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
                used: 64 << 20,
                hva: None
            }
        );
    }

    #[test]
    fn a_name_with_blanks_and_huge_pages_are_read() {
        let text =
            "Block Name PSize Offset Used Total HVA RO\n my ram 4  2 MiB  0x0 0x200000 0x200000 0x7f0000000000 rw\n";
        assert_eq!(parse(text).unwrap()[0].name, "my ram 4");
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
            "4 KiB 0x0 0x1 0x1 0x2 rw",
        ] {
            assert!(parse(&format!("{heading}{line}\n")).is_err(), "{line}");
        }
    }
}
