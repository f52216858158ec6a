//! For tests: small module files made of literal parts, and a guest made of two maps.

use super::{AltLayout, Bases, GuestContext, JumpLayout, KlpLayout, PatchModule, ResolveError, ResolveSymbol};
use crate::addr::Gva;
use crate::memory::{MemoryError, VirtMemory};
use object::elf::{
    R_X86_64_32S, R_X86_64_64, R_X86_64_PLT32, RelocationType, SHF_ALLOC, SHF_EXECINSTR, SHF_WRITE, SHT_NOBITS,
    SHT_PROGBITS, SHT_RELA, SHT_STRTAB, SHT_SYMTAB,
};
use std::collections::BTreeMap;

/// Livepatch structures as Debian's 6.1.0-47-cloud-amd64 has them (its BTF).
pub(super) const KLP_6_1: KlpLayout = KlpLayout {
    patch_size: 200,
    patch_mod: 0,
    patch_objs: 8,
    patch_states: Some(16),
    patch_replace: Some(24),
    object_size: 168,
    object_name: 0,
    object_funcs: 8,
    object_callbacks: Some(16),
    callbacks_size: 40,
    func_size: 152,
    func_old_name: 0,
    func_new_func: 8,
    func_old_sympos: 16,
};

/// `struct alt_instr` of 6.1.
pub(super) const ALT_6_1: AltLayout = AltLayout {
    size: 12,
    instr_offset: 0,
    repl_offset: 4,
    cpuid: 8,
    flags: None,
    instrlen: 10,
    replacementlen: 11,
};

/// `struct alt_instr` of 6.12.
pub(super) const ALT_6_12: AltLayout = AltLayout {
    size: 14,
    instr_offset: 0,
    repl_offset: 4,
    cpuid: 8,
    flags: Some(10),
    instrlen: 12,
    replacementlen: 13,
};

/// Where tests put the areas.
pub(super) const BASES: Bases = Bases {
    text: Gva(0xffff_ffff_8100_0000),
    rodata: Gva(0xffff_ffff_8200_0000),
    data: Gva(0xffff_ffff_8300_0000),
    per_cpu: Gva(0x2_f000),
    module: Gva(0xffff_ffff_8300_0400),
};

const TEXT_FLAGS: u64 = SHF_ALLOC.0 | SHF_EXECINSTR.0;
const DATA_FLAGS: u64 = SHF_ALLOC.0 | SHF_WRITE.0;

/// A section header to be.
pub(super) struct TestSection {
    pub name: &'static str,
    kind: u32,
    pub flags: u64,
    pub align: u64,
    pub size: u64,
    pub data: Vec<u8>,
    /// Offset, type, symbol, addend.
    pub relocations: Vec<(u64, u32, usize, i64)>,
}

/// An ELF file in parts. Section 0 and symbol 0 are there already.
pub(super) struct TestElf {
    sections: Vec<TestSection>,
    /// Name, info, section index, value, size.
    symbols: Vec<(String, u8, u16, u64, u64)>,
    /// `e_machine`.
    pub machine: u16,
    /// `e_type`.
    pub file_type: u16,
}

impl TestElf {
    pub fn new() -> Self {
        let null = TestSection {
            name: "",
            kind: 0,
            flags: 0,
            align: 0,
            size: 0,
            data: Vec::new(),
            relocations: Vec::new(),
        };
        Self {
            sections: vec![null],
            symbols: vec![(String::new(), 0, 0, 0, 0)],
            machine: 62,
            file_type: 1,
        }
    }

    /// A module with one patched function, `old_f`, whose new code is `text`: section 1 is `.text`, 2 `.rodata.str`, 3
    /// `.data` with the descriptors, 4 `.init.text`, 5 `.gnu.linkonce.this_module`. Symbols 1 to 5 stand for those sections.
    pub fn livepatch(text: &[u8]) -> Self {
        let mut elf = Self::new();
        elf.section(".text", TEXT_FLAGS, text);
        elf.section(".rodata.str1.1", SHF_ALLOC.0, b"old_f\0");
        elf.section(".data", DATA_FLAGS, &[0; 200 + 2 * 168 + 2 * 152]);
        // mov $patch,%rdi; jmp klp_enable_patch
        elf.section(
            ".init.text",
            TEXT_FLAGS,
            &[0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0],
        );
        elf.section(".gnu.linkonce.this_module", DATA_FLAGS, &[0; 64]);
        elf.section(
            ".modinfo",
            SHF_ALLOC.0,
            b"license=GPL\0livepatch=Y\0name=lp_test\0vermagic=6.1.0-47-cloud-amd64 SMP\0",
        );
        for section in 1..=5 {
            elf.symbol("", 3, section, 0, 0);
        }
        elf.symbol("new_f", 2, 1, 0, text.len() as u64);
        let this_module = elf.symbol("__this_module", 0x11, 5, 0, 64);
        let init = elf.symbol("init_module", 0x12, 4, 0, 12);
        elf.relocation(5, 8, R_X86_64_64, init, 0);
        let enable = elf.undefined("klp_enable_patch");
        elf.relocation(3, 0, R_X86_64_64, this_module, 0);
        elf.relocation(3, 8, R_X86_64_64, 3, 200);
        elf.relocation(3, 200 + 8, R_X86_64_64, 3, 200 + 2 * 168);
        elf.relocation(3, 536, R_X86_64_64, 2, 0);
        elf.relocation(3, 536 + 8, R_X86_64_64, 1, 0);
        elf.relocation(4, 3, R_X86_64_32S, 3, 0);
        elf.relocation(4, 8, R_X86_64_PLT32, enable, -4);
        elf
    }

    /// Adds a section, aligned to 1; returns its index.
    pub fn section(&mut self, name: &'static str, flags: u64, data: &[u8]) -> u16 {
        let section = TestSection {
            name,
            kind: SHT_PROGBITS.0,
            flags,
            align: 1,
            size: data.len() as u64,
            data: data.to_vec(),
            relocations: Vec::new(),
        };
        self.sections.push(section);
        u16::try_from(self.sections.len() - 1).unwrap()
    }

    /// Adds a section without bytes in the file.
    pub fn nobits(&mut self, name: &'static str, size: u64) -> u16 {
        let index = self.section(name, DATA_FLAGS, &[]);
        let section = self.sections.last_mut().unwrap();
        (section.kind, section.size) = (SHT_NOBITS.0, size);
        index
    }

    /// Adds a symbol; returns its index.
    pub fn symbol(&mut self, name: &str, info: u8, section: u16, value: u64, size: u64) -> usize {
        self.symbols.push((name.into(), info, section, value, size));
        self.symbols.len() - 1
    }

    /// Adds a symbol that is defined elsewhere.
    pub fn undefined(&mut self, name: &str) -> usize {
        self.symbol(name, 0x10, 0, 0, 0)
    }

    /// Adds a section symbol.
    pub fn section_symbol(&mut self, section: u16) -> usize {
        self.symbol("", 3, section, 0, 0)
    }

    pub fn relocation(&mut self, section: u16, offset: u64, kind: RelocationType, symbol: usize, addend: i64) {
        self.sections[usize::from(section)]
            .relocations
            .push((offset, kind.0, symbol, addend));
    }

    /// Replaces bytes of a section.
    pub fn patch_bytes(&mut self, section: u16, offset: usize, bytes: &[u8]) {
        self.sections[usize::from(section)].data[offset..offset + bytes.len()].copy_from_slice(bytes);
    }

    /// Takes away the relocation at `offset`.
    pub fn drop_relocation(&mut self, section: u16, offset: u64) {
        self.sections[usize::from(section)]
            .relocations
            .retain(|(at, ..)| *at != offset);
    }

    /// Replaces all that a section has.
    pub fn set_bytes(&mut self, section: u16, data: &[u8]) {
        let section = &mut self.sections[usize::from(section)];
        (section.data, section.size) = (data.to_vec(), data.len() as u64);
    }

    /// Adds bytes to the end of a section.
    pub fn append_bytes(&mut self, section: u16, bytes: &[u8]) {
        let section = &mut self.sections[usize::from(section)];
        section.data.extend(bytes);
        section.size = section.data.len() as u64;
    }

    /// Gives the module an init that enables a patch which it has made.
    pub fn enable(&mut self) {
        self.enable_after(&[]);
    }

    /// The same behind `code`.
    pub fn enable_after(&mut self, code: &[u8]) {
        let init = self.section(".init.text", TEXT_FLAGS, &[code, &[0xe9, 0, 0, 0, 0]].concat());
        let (entry, enable) = (self.section_symbol(init), self.undefined("klp_enable_patch"));
        self.relocation(init, code.len() as u64 + 1, R_X86_64_PLT32, enable, -4);
        let this = self.section(".gnu.linkonce.this_module", DATA_FLAGS, &[0; 64]);
        self.relocation(this, 8, R_X86_64_64, entry, 0);
    }

    /// A section, to be altered.
    pub fn named(&mut self, name: &str) -> &mut TestSection {
        self.sections.iter_mut().find(|section| section.name == name).unwrap()
    }

    /// Gives a symbol another name.
    pub fn rename(&mut self, name: &str, other: &str) {
        self.symbols.iter_mut().find(|symbol| symbol.0 == name).unwrap().0 = other.into();
    }

    /// Says that a symbol is in another section.
    pub fn symbol_in(&mut self, name: &str, section: u16) {
        self.symbols.iter_mut().find(|symbol| symbol.0 == name).unwrap().2 = section;
    }

    pub fn set_align(&mut self, section: u16, align: u64) {
        self.sections[usize::from(section)].align = align;
    }

    /// The file's bytes: header, section contents, section headers.
    pub fn build(&self) -> Vec<u8> {
        let mut symtab = Vec::new();
        let mut strtab = vec![0];
        for (name, info, section, value, size) in &self.symbols {
            symtab.extend((string(&mut strtab, name)).to_le_bytes());
            symtab.extend([*info, 0]);
            symtab.extend(section.to_le_bytes());
            symtab.extend(value.to_le_bytes());
            symtab.extend(size.to_le_bytes());
        }
        // Name, type, flags, contents, size, link, info, align, entry size.
        let mut headers = Vec::new();
        for s in &self.sections {
            headers.push((
                s.name.to_owned(),
                s.kind,
                s.flags,
                s.data.clone(),
                s.size,
                0,
                0,
                s.align,
                0,
            ));
        }
        let symtab_index = u32::try_from(headers.len()).unwrap();
        let len = symtab.len() as u64;
        headers.push((
            ".symtab".into(),
            SHT_SYMTAB.0,
            0,
            symtab,
            len,
            symtab_index + 1,
            1,
            8,
            24,
        ));
        let len = strtab.len() as u64;
        headers.push((".strtab".into(), SHT_STRTAB.0, 0, strtab, len, 0, 0, 1, 0));
        for (target, s) in (0_u32..).zip(&self.sections) {
            let mut rela = Vec::new();
            for (offset, kind, symbol, addend) in &s.relocations {
                rela.extend(offset.to_le_bytes());
                rela.extend(((*symbol as u64) << 32 | u64::from(*kind)).to_le_bytes());
                rela.extend(addend.to_le_bytes());
            }
            if !rela.is_empty() {
                let len = rela.len() as u64;
                headers.push((
                    format!(".rela{}", s.name),
                    SHT_RELA.0,
                    0x40,
                    rela,
                    len,
                    symtab_index,
                    target,
                    8,
                    24,
                ));
            }
        }
        let mut names = vec![0];
        let mut name_offsets: Vec<u32> = headers.iter().map(|h| string(&mut names, &h.0)).collect();
        name_offsets.push(string(&mut names, ".shstrtab"));
        let len = names.len() as u64;
        headers.push((".shstrtab".into(), SHT_STRTAB.0, 0, names, len, 0, 0, 1, 0));

        let mut file = vec![0; 64];
        let mut table = Vec::new();
        for (name, (_, kind, flags, data, size, link, info, align, entry)) in name_offsets.iter().zip(&headers) {
            file.resize(file.len().next_multiple_of(8), 0);
            table.extend(name.to_le_bytes());
            table.extend(kind.to_le_bytes());
            for field in [*flags, 0, file.len() as u64, *size] {
                table.extend(field.to_le_bytes());
            }
            table.extend(link.to_le_bytes());
            table.extend(info.to_le_bytes());
            table.extend(align.to_le_bytes());
            table.extend((*entry as u64).to_le_bytes());
            file.extend(data);
        }
        file.resize(file.len().next_multiple_of(8), 0);
        let shoff = file.len() as u64;
        file.extend(table);
        let count = u16::try_from(headers.len()).unwrap();
        let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        header.extend(self.file_type.to_le_bytes());
        header.extend(self.machine.to_le_bytes());
        header.extend(1_u32.to_le_bytes());
        for field in [0, 0, shoff] {
            header.extend(field.to_le_bytes());
        }
        header.extend(0_u32.to_le_bytes());
        for field in [64, 0, 0, 64, count, count - 1] {
            header.extend(field.to_le_bytes());
        }
        file[..64].copy_from_slice(&header);
        file
    }
}

/// Adds a string to a string table; returns its offset.
fn string(table: &mut Vec<u8>, text: &str) -> u32 {
    if text.is_empty() {
        return 0;
    }
    let offset = u32::try_from(table.len()).unwrap();
    table.extend(text.as_bytes());
    table.push(0);
    offset
}

/// A guest with the given symbols, exported or not, and bytes.
#[derive(Default)]
pub(super) struct TestGuest {
    pub exported: BTreeMap<&'static str, u64>,
    pub internal: BTreeMap<&'static str, u64>,
    pub memory: BTreeMap<u64, Vec<u8>>,
    pub capabilities: Vec<u32>,
}

impl TestGuest {
    pub fn context(&self) -> GuestContext<'_> {
        GuestContext {
            symbols: self,
            memory: self,
            pending: &[],
            jump_labels: JumpLayout { enabled: 0, entries: 8 },
            capabilities: &self.capabilities,
        }
    }

    /// Parses, selects and links `file` for this guest; the text that comes out.
    pub fn link_text(&self, file: &[u8], alt: &AltLayout) -> Vec<u8> {
        let module = PatchModule::parse(file).unwrap();
        let patch = module.patch(&KLP_6_1).unwrap();
        module
            .image(&patch, alt)
            .unwrap()
            .link(&BASES, &self.context())
            .unwrap()
            .text
    }
}

impl ResolveSymbol for TestGuest {
    fn exported(&self, name: &str) -> Result<Gva, ResolveError> {
        let found = self.exported.get(name).copied().map(Gva);
        found.ok_or_else(|| ResolveError::NotFound {
            object: "vmlinux".into(),
        })
    }

    fn any(&self, object: Option<&str>, name: &str, _: u64) -> Result<Gva, ResolveError> {
        let found = self.internal.get(name).or(self.exported.get(name)).copied().map(Gva);
        found.ok_or_else(|| ResolveError::NotFound {
            object: object.unwrap_or("vmlinux").into(),
        })
    }
}

impl VirtMemory for TestGuest {
    fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError> {
        let missing = MemoryError::NotMapped { at, level: 1, entry: 0 };
        let (start, bytes) = self.memory.range(..=at.0).next_back().ok_or_else(|| missing.clone())?;
        let offset = usize::try_from(at.0 - start).unwrap();
        buf.copy_from_slice(bytes.get(offset..offset + buf.len()).ok_or(missing)?);
        Ok(())
    }
}
