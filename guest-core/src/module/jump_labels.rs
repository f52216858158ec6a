//! Jump labels: branches that the kernel rewrites when it flips their static key (`__jump_table`).
//!
//! A row has the place of the branch, its target and its key: distances of 4, 4 and 8 bytes, each from itself (`struct jump_entry`,
//! include/linux/jump_label.h, since 4.19). Bit 0 of the last selects the form of the branch while the key is off. The branch is a NOP or a
//! jump of two or five bytes. The loader sorts the rows by their key, brings each branch into its key's state, and lets keys of the module
//! itself point to their rows (kernel/jump_label.c, `jump_label_add_module`; 5.10, 6.1, 6.12, 7.2). The lists of the guest's own keys are
//! changed by [`crate::guest_module`].

use super::LinkError;
use super::jump_table::{KEY, NODES_BYTES, ROW_BYTES, Row, TABLE, TARGET};
use super::layout::AreaKind;
use super::link::Linker;
use super::nops::nops;
use super::sections::SectionOffset;
use super::sites::{Pointer, TableError};
use crate::addr::Gva;

/// Bits of the key's distance: the branch is a jump while the key is off; objtool has made it a NOP (since 5.14). The loader uses the second bit
/// for rows of module init.
const BRANCH: u64 = 1;
const MARKED: u64 = 2;
/// Opcodes of the jumps that a branch can be.
const JMP8: u8 = 0xeb;
const JMP32: u8 = 0xe9;

/// Offsets in `struct static_key` in the guest's kernel, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JumpLayout {
    /// Offset of `static_key.enabled`.
    pub enabled: u64,
    /// Offset of `static_key.entries`, which is in a union with `type` and `next`.
    pub entries: u64,
}

/// The jump labels of linked code.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JumpLabels {
    /// Guest-virtual address of the sorted table, in the read-only area.
    pub table: Gva,
    /// Rows.
    pub count: u64,
    /// The keys outside the module that have branches in it.
    pub keys: Vec<UsedKey>,
}

/// A static key of the guest's kernel or of one of its modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UsedKey {
    /// Guest-virtual address of the `struct static_key`.
    pub at: Gva,
    /// The value of `static_key.enabled` that the branches were linked for.
    pub enabled: u32,
    /// Guest-virtual address of the first of the patch's rows for it.
    pub first: Gva,
    /// Guest-virtual address of [`NODES_BYTES`] of space for nodes, in the data area.
    pub nodes: Gva,
}

/// A row with addresses.
struct Label {
    site: SectionOffset,
    from: u64,
    to: u64,
    key: u64,
    is_jump_when_off: bool,
}

impl Linker<'_, '_, '_> {
    /// Brings each branch into its key's state, and writes the sorted table.
    pub(super) fn link_jump_labels(&mut self) -> Result<JumpLabels, LinkError> {
        let rows = &self.image.jump_rows;
        let guest = self.guest.jump_labels;
        let mut labels = Vec::with_capacity(rows.rows.len());
        for row in &rows.rows {
            labels.push(self.label(row)?);
        }
        labels.sort_by_key(|label| label.from);
        if let Some([_, second]) = labels.array_windows().find(|[first, second]| first.from == second.from) {
            let found = format!("a second row for {}", self.image.module.place(second.site));
            return Err(TableError::named(TABLE, 0, found, "one row for each branch").into());
        }
        labels.sort_by_key(|label| (label.key, label.from));
        let table = self.base(AreaKind::RoData).wrapping_add(rows.table);
        let mut nodes = self.base(AreaKind::Data).wrapping_add(rows.nodes);
        let mut keys: Vec<UsedKey> = Vec::new();
        let mut last = None;
        for (index, label) in (0_u64..).zip(&labels) {
            let at = table.wrapping_add(index * ROW_BYTES);
            let enabled = self.enabled(label, guest.enabled)?;
            self.write_branch(label, enabled != 0)?;
            self.write_row(rows.table + index * ROW_BYTES, at, label)?;
            if last.replace(label.key) == Some(label.key) {
                continue;
            }
            if self.own_word(label.key, 0).is_some() {
                let entries = label.key.wrapping_add(guest.entries);
                // The pointer is combined with the bits that the compiler put there: the key's initial value.
                let bits = self.own_word(entries, 0).unwrap_or(0);
                self.own_word(entries, at.0 | bits);
            } else {
                keys.push(UsedKey {
                    at: Gva(label.key),
                    enabled,
                    first: at,
                    nodes,
                });
                nodes = nodes.wrapping_add(NODES_BYTES);
            }
        }
        Ok(JumpLabels {
            table,
            count: labels.len() as u64,
            keys,
        })
    }

    fn label(&mut self, row: &Row) -> Result<Label, LinkError> {
        let module = self.image.module;
        let section = module.section(row.at.section);
        let error = |offset, found: &str, expected| {
            TableError::named(TABLE, row.at.plus(offset).offset, found.to_owned(), expected)
        };
        let key = section.and_then(|section| section.relocation_at(row.at.plus(KEY).offset));
        let key = key.ok_or_else(|| error(KEY, "none", "a distance to a key"))?;
        let value = self
            .symbol_address(row.at.plus(KEY), key)?
            .wrapping_add_signed(key.addend);
        let table = section.ok_or_else(|| error(0, "no table", "one"))?;
        let target = module.site(table, row.at.plus(TARGET).offset, Pointer::Relative)?;
        Ok(Label {
            site: row.site,
            from: self.address(row.site)?,
            to: self.address(target)?,
            key: value & !(BRANCH | MARKED),
            is_jump_when_off: value & BRANCH != 0,
        })
    }

    /// The value of `static_key.enabled` now, in the module itself or in the guest.
    fn enabled(&mut self, label: &Label, offset: u64) -> Result<u32, LinkError> {
        let at = label.key.wrapping_add(offset);
        if let Some(word) = self.own_word(at, 0) {
            return Ok(u32::try_from(word & 0xffff_ffff).unwrap_or(0));
        }
        self.guest.memory.read_u32(Gva(at)).map_err(|cause| LinkError::Memory {
            what: format!("the static key at {}", Gva(label.key)),
            cause,
        })
    }

    /// The bytes of a branch, a jump or a NOP, with the length of the present one.
    fn write_branch(&mut self, label: &Label, is_on: bool) -> Result<(), LinkError> {
        let jumps = is_on ^ label.is_jump_when_off;
        let found = self.bytes(label.site, 5).or_else(|_| self.bytes(label.site, 2))?;
        let len = match found {
            [JMP8, ..] => 2,
            [JMP32, ..] => 5,
            other if other.starts_with(&nops(5)) => 5,
            other if other.starts_with(&nops(2)) => 2,
            _ => return Err(self.site_error(TABLE, label.site, 5, "a jump or a NOP of 2 or 5 bytes".into())),
        };
        if !jumps {
            // If the kernel finds another NOP than its own when it flips a key, it stops with a BUG.
            let nop = match len {
                5 => self.site_nop()?.to_vec(),
                _ => nops(len),
            };
            return self.write(label.site, &nop);
        }
        let next = label.from.wrapping_add(len as u64);
        let distance = label.to.wrapping_sub(next).cast_signed();
        let overflow = |_| LinkError::Overflow {
            at: self.image.module.place(label.site),
            place: label.from,
            kind: "a jump label's jump",
            symbol: TABLE.into(),
            target: label.to,
        };
        let bytes = if len == 2 {
            let distance = i8::try_from(distance).map_err(overflow)?;
            [&[JMP8][..], &distance.to_le_bytes()].concat()
        } else {
            let distance = i32::try_from(distance).map_err(overflow)?;
            [&[JMP32][..], &distance.to_le_bytes()].concat()
        };
        self.write(label.site, &bytes)
    }

    fn write_row(&mut self, offset: u64, at: Gva, label: &Label) -> Result<(), LinkError> {
        let near = |place: Gva, to: u64| {
            i32::try_from(to.wrapping_sub(place.0).cast_signed()).map_err(|_| LinkError::Overflow {
                at: format!("{TABLE}+{offset:#x}"),
                place: place.0,
                kind: "a jump label's distance",
                symbol: "the code".into(),
                target: to,
            })
        };
        let from = near(at, label.from)?;
        let to = near(at.wrapping_add(TARGET), label.to)?;
        let key = label.key.wrapping_sub(at.wrapping_add(KEY).0) | u64::from(label.is_jump_when_off);
        let row = [&from.to_le_bytes()[..], &to.to_le_bytes(), &key.to_le_bytes()].concat();
        self.write_area(AreaKind::RoData, offset, &row);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::module::testing::{ALT_6_1, BASES, KLP_6_1, TestElf, TestGuest};
    use crate::module::{ImageError, Linked, PatchModule};
    use object::elf::{R_X86_64_PC32, R_X86_64_PC64, SHF_ALLOC, SHF_WRITE};

    const KEY_AT: u64 = 0xffff_ffff_8250_0000;

    /// jmp +7; nopl 0(%rax,%rax,1); xchg %ax,%ax; ret — the first hangs on the guest's key and is a jump while it is off, the
    /// second on that key, the third on one of the module's own, both a jump while it is on; all lead to the ret.
    fn module() -> (TestElf, u16) {
        let mut elf = TestElf::livepatch(&[0xeb, 7, 0x0f, 0x1f, 0x44, 0, 0, 0x66, 0x90, 0xc3]);
        // Off, but says that it starts on: its branches are to be as if it were off.
        let own = elf.section(
            ".data.own_key",
            SHF_ALLOC.0 | SHF_WRITE.0,
            &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
        );
        let own = elf.section_symbol(own);
        let key = elf.undefined("key");
        let table = elf.section(TABLE, SHF_ALLOC.0 | SHF_WRITE.0, &[0; 48]);
        // Not in the order of their keys and places.
        for (row, (site, symbol, bits)) in (0_u64..).zip([(2, key, 2), (7, own, 0), (0, key, 1)]) {
            elf.relocation(table, row * 16, R_X86_64_PC32, 1, site);
            elf.relocation(table, row * 16 + 4, R_X86_64_PC32, 1, 9);
            elf.relocation(table, row * 16 + 8, R_X86_64_PC64, symbol, bits);
        }
        (elf, table)
    }

    fn link(elf: &TestElf, enabled: u32) -> Result<Linked, LinkError> {
        let guest = TestGuest {
            exported: [("key", KEY_AT)].into(),
            memory: [(KEY_AT, [enabled.to_le_bytes(), [0; 4]].concat())].into(),
            ..Default::default()
        };
        let file = elf.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        module.image(&patch, &ALT_6_1).unwrap().link(&BASES, &guest.context())
    }

    #[test]
    fn branches_are_brought_into_the_state_of_their_keys() {
        let off = link(&module().0, 0).unwrap();
        assert_eq!(off.text, [0xeb, 7, 0x0f, 0x1f, 0x44, 0, 0, 0x66, 0x90, 0xc3]);
        let on = link(&module().0, 3).unwrap();
        assert_eq!(on.text, [0x66, 0x90, 0xe9, 2, 0, 0, 0, 0x66, 0x90, 0xc3]);
        assert_eq!(on.jump_labels.keys[0].enabled, 3);
    }

    #[test]
    fn a_branch_that_is_no_jump_holds_the_kernels_own_nop() {
        const NOPS_AT: u64 = 0xffff_ffff_8260_0000;
        let k8 = [0x66, 0x66, 0x66, 0x66, 0x90];
        let word = |value: u64| value.to_le_bytes().to_vec();
        let guest = TestGuest {
            exported: [("key", KEY_AT), ("ideal_nops", NOPS_AT)].into(),
            // The symbol, the array with its entry 9, and the NOP itself.
            memory: [
                (KEY_AT, word(0)),
                (NOPS_AT, word(NOPS_AT + 8)),
                (NOPS_AT + 8 + 72, word(NOPS_AT + 0x100)),
                (NOPS_AT + 0x100, k8.to_vec()),
            ]
            .into(),
            ..Default::default()
        };
        let file = module().0.build();
        let module = PatchModule::parse(&file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        let linked = module
            .image(&patch, &ALT_6_1)
            .unwrap()
            .link(&BASES, &guest.context())
            .unwrap();
        assert_eq!(linked.text, [&[0xeb, 7][..], &k8, &[0x66, 0x90, 0xc3]].concat());
    }

    #[test]
    fn rows_are_sorted_by_key_and_place_and_keys_find_them() {
        let linked = link(&module().0, 0).unwrap();
        let labels = &linked.jump_labels;
        assert_eq!((labels.table, labels.count), (BASES.rodata, 3));
        let rows: Vec<_> = (0_u64..)
            .zip(linked.rodata.chunks_exact(16))
            .map(|(index, row)| {
                let at = BASES.rodata.wrapping_add(index * 16);
                let near = |at: Gva, bytes: &[u8]| {
                    let distance = i32::from_le_bytes(bytes.try_into().unwrap());
                    at.wrapping_offset(distance.into()).0 - BASES.text.0
                };
                let key = u64::from_le_bytes(row[8..].try_into().unwrap());
                (
                    near(at, &row[..4]),
                    near(at.wrapping_add(4), &row[4..8]),
                    at.wrapping_add(8).wrapping_add(key).0,
                )
            })
            .collect();
        let own = BASES.data.0;
        assert_eq!(rows, [(0, 9, KEY_AT | 1), (2, 9, KEY_AT), (7, 9, own)]);
        let key = labels.keys[0];
        assert_eq!((labels.keys.len(), key.at, key.first), (1, Gva(KEY_AT), BASES.rodata));
        // The own key's rows, and the bit that says how it starts.
        assert_eq!(linked.data[8..16], ((BASES.rodata.0 + 32) | 1).to_le_bytes());
        assert_eq!(key.nodes.0 % 8, 0);
        assert!(linked.data.len() as u64 >= key.nodes.0 - BASES.data.0 + NODES_BYTES);
    }

    #[test]
    fn a_table_of_the_wrong_size_or_that_points_outside_of_code_is_refused() {
        let image = |elf: &TestElf| {
            let file = elf.build();
            let module = PatchModule::parse(&file).unwrap();
            let patch = module.patch(&KLP_6_1).unwrap();
            module.image(&patch, &ALT_6_1).map(|_| ()).unwrap_err()
        };
        let (mut elf, table) = module();
        elf.set_bytes(table, &[0; 40]);
        assert!(matches!(image(&elf), ImageError::Table(error) if error.found == "40 bytes"));
        for offset in [0, 4] {
            let (mut elf, table) = module();
            elf.drop_relocation(table, offset);
            elf.relocation(table, offset, R_X86_64_PC32, 3, 0);
            assert!(matches!(image(&elf), ImageError::Table(error) if error.found == ".data+0x0"));
        }
        let (mut elf, table) = module();
        elf.drop_relocation(table, 8);
        assert!(matches!(image(&elf), ImageError::Table(error) if error.expected == "a distance to a key"));
    }

    #[test]
    fn a_branch_that_is_neither_jump_nor_nop_is_refused() {
        let (mut elf, _) = module();
        elf.patch_bytes(1, 0, &[0x90, 0x90]);
        let error = link(&elf, 0).unwrap_err();
        assert!(
            matches!(&error, LinkError::Site { table: TABLE, at, .. } if at == ".text+0x0"),
            "{error}"
        );
    }
}
