//! An object file in the making.

use std::collections::BTreeMap;

use object::elf;

use crate::elf::{At, Object, Place, Relocation, Section, Symbol};
use crate::select::OutSymbol;

/// How livepatch names the kernel image.
const KERNEL: &str = "vmlinux";

/// An object file that grows by pieces of sections.
#[derive(Debug, Default)]
pub(crate) struct Output {
    pub object: Object,
    /// By name.
    sections: BTreeMap<String, usize>,
    /// Symbols of sections, by section.
    section_symbols: BTreeMap<usize, usize>,
    /// Symbols that the guest resolves.
    out_symbols: BTreeMap<(OutSymbol, Option<String>), usize>,
    /// Text constants, by contents, with their offset.
    texts: BTreeMap<Vec<u8>, At>,
}

/// What a section is like.
#[derive(Clone, Debug)]
pub(crate) struct Kind {
    pub name: String,
    pub kind: u32,
    pub flags: u64,
    pub entry_size: u64,
}

impl Output {
    pub fn new() -> Self {
        let mut object = Object::default();
        object.sections.push(Section::default());
        object.symbols.push(symbol("", Place::Undefined));
        Self {
            object,
            ..Self::default()
        }
    }

    /// The section of that kind, made if need be.
    pub fn section(&mut self, kind: &Kind) -> usize {
        if let Some(index) = self.sections.get(&kind.name) {
            return *index;
        }
        let index = self.object.sections.len();
        self.object.sections.push(Section {
            name: kind.name.clone(),
            kind: kind.kind,
            flags: kind.flags,
            align: 1,
            entry_size: kind.entry_size,
            ..Section::default()
        });
        self.sections.insert(kind.name.clone(), index);
        index
    }

    /// Puts bytes behind what a section has, `gap` bytes or more behind; returns where they are.
    pub fn append(&mut self, section: usize, bytes: &[u8], align: u64, gap: u64) -> At {
        let Some(to) = self.object.sections.get_mut(section) else {
            return At { section, offset: 0 };
        };
        let align = align.max(1);
        let gap = if to.size == 0 { 0 } else { gap };
        let offset = (to.size + gap).next_multiple_of(align);
        let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        to.align = to.align.max(align);
        to.size = offset + len;
        if to.kind != elf::SHT_NOBITS.0 {
            let filler = if to.is_code() { 0xcc } else { 0 };
            to.data.resize(usize::try_from(offset).unwrap_or(usize::MAX), filler);
            to.data.extend(bytes);
        }
        At { section, offset }
    }

    /// A text constant; each is there once.
    pub fn text(&mut self, text: &[u8]) -> At {
        if let Some(at) = self.texts.get(text) {
            return *at;
        }
        let section = self.section(&Kind {
            name: ".rodata.str1.1".to_owned(),
            kind: elf::SHT_PROGBITS.0,
            flags: (elf::SHF_ALLOC | elf::SHF_MERGE | elf::SHF_STRINGS).0,
            entry_size: 1,
        });
        let at = self.append(section, text, 1, 0);
        self.texts.insert(text.to_vec(), at);
        at
    }

    pub fn add_symbol(&mut self, symbol: Symbol) -> usize {
        let index = self.object.symbols.len();
        self.object.symbols.push(symbol);
        index
    }

    /// The symbol of a section itself.
    pub fn section_symbol(&mut self, section: usize) -> usize {
        if let Some(index) = self.section_symbols.get(&section) {
            return *index;
        }
        let place = Place::In(At { section, offset: 0 });
        let index = self.add_symbol(Symbol {
            kind: elf::STT_SECTION.0,
            binding: elf::STB_LOCAL.0,
            ..symbol("", place)
        });
        self.section_symbols.insert(section, index);
        index
    }

    /// A symbol that the guest resolves, for a part of the patch of module `by`: what another module has is there when that one is.
    pub fn out_symbol(&mut self, of: &OutSymbol, by: Option<&str>) -> usize {
        let is_others =
            matches!(of, OutSymbol::Livepatch { object, .. } if object != KERNEL && Some(object.as_str()) != by);
        let by = by.filter(|_| is_others).map(str::to_owned);
        if let Some(index) = self.out_symbols.get(&(of.clone(), by.clone())) {
            return *index;
        }
        let made = match of {
            OutSymbol::Exported(name) => symbol(name, Place::Undefined),
            OutSymbol::Weak(name) => Symbol {
                binding: elf::STB_WEAK.0,
                ..symbol(name, Place::Undefined)
            },
            OutSymbol::Livepatch { object, name, sympos } => {
                symbol(&format!(".klp.sym.{object}.{name},{sympos}"), Place::Livepatch)
            }
        };
        let index = self.add_symbol(made);
        if let Some(by) = &by {
            self.object.resolved_with.insert(index, by.clone());
        }
        self.out_symbols.insert((of.clone(), by), index);
        index
    }

    pub fn relocate(&mut self, section: usize, relocation: Relocation) {
        if let Some(section) = self.object.sections.get_mut(section) {
            section.relocations.push(relocation);
        }
    }

    /// The symbols that the guest resolves.
    pub fn out_symbols(&self) -> impl Iterator<Item = &OutSymbol> {
        self.out_symbols.keys().map(|(of, _)| of)
    }
}

fn symbol(name: &str, place: Place) -> Symbol {
    Symbol {
        name: name.to_owned(),
        place,
        size: 0,
        kind: elf::STT_NOTYPE.0,
        binding: elf::STB_GLOBAL.0,
    }
}
