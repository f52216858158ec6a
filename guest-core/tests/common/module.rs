//! Writes a small livepatch module: hand-written descriptors, one text section, relocations.

use super::guest::VERMAGIC;

/// A function to be replaced.
pub struct Function {
    /// The old one's name.
    pub old: &'static str,
    /// Its position among those of its name.
    pub sympos: u64,
    /// The new code.
    pub code: Vec<u8>,
    /// A symbol whose 32-bit distance is written into the code: where, and which.
    pub calls: Option<(u64, &'static str)>,
    /// Where the code has the address of its module's `struct module`, and how many bytes behind that start.
    pub this_module: Option<(u64, u64)>,
}

impl Function {
    /// A function that returns 1.
    pub fn returning_one(old: &'static str) -> Self {
        let code = vec![0xf3, 0x0f, 0x1e, 0xfa, 0xb8, 1, 0, 0, 0, 0xc3];
        Self {
            old,
            sympos: 0,
            code,
            calls: None,
            this_module: None,
        }
    }
}

const ALLOC: u64 = 2;
const WRITE: u64 = 1;
const EXEC: u64 = 4;
const R_64: u64 = 1;
const R_PC32: u64 = 2;
const R_PLT32: u64 = 4;
const R_32S: u64 = 11;
// Sizes of `struct klp_patch`, `klp_object` and `klp_func` as in `types.rs`.
const PATCH: u64 = 200;
const OBJECT: u64 = 168;
const FUNCTION: u64 = 152;

/// A module called `name` for the kernel of these tests.
pub fn livepatch(name: &str, functions: &[Function]) -> Vec<u8> {
    livepatch_for(name, VERMAGIC, functions)
}

/// The same for any kernel.
pub fn livepatch_for(name: &str, vermagic: &str, functions: &[Function]) -> Vec<u8> {
    make(name, vermagic, functions, &[])
}

/// A module called `name` with an ORC format of that digest.
pub fn livepatch_of_format(name: &str, digest: &[u8], functions: &[Function]) -> Vec<u8> {
    make(name, VERMAGIC, functions, &[(".orc_header", digest)])
}

/// A module called `name` that was compiled against an exported `symbol` whose type has that checksum.
pub fn livepatch_against(name: &str, (symbol, crc): (&str, u32), functions: &[Function]) -> Vec<u8> {
    let mut version = u64::from(crc).to_le_bytes().to_vec();
    version.extend_from_slice(symbol.as_bytes());
    version.resize(64, 0);
    make(name, VERMAGIC, functions, &[("__versions", &version)])
}

/// A module called `name` that was compiled with a struct of that name and size.
pub fn livepatch_with_type(name: &str, (tag, bytes): (&str, u32), functions: &[Function]) -> Vec<u8> {
    let strings = [b"\0", tag.as_bytes(), b"\0"].concat();
    // The header: magic, version, flags, its length; types and strings, each by offset and length.
    let mut btf = vec![0x9f, 0xeb, 1, 0];
    for word in [24, 0, 12, 12, u32::try_from(strings.len()).unwrap()] {
        btf.extend(word.to_le_bytes());
    }
    // BTF_KIND_STRUCT without members
    for word in [1, 4 << 24, bytes] {
        btf.extend(word.to_le_bytes());
    }
    btf.extend(strings);
    make(name, VERMAGIC, functions, &[(".BTF.base", &btf)])
}

/// A module called `name` with a note of what it was made for.
pub fn livepatch_made_for(name: &str, note: &[u8], functions: &[Function]) -> Vec<u8> {
    make(name, VERMAGIC, functions, &[(".note.vmpatch", note)])
}

/// A module called `name` whose new functions can be traced, and count in a variable on each CPU.
pub fn livepatch_with_sections(name: &str, functions: &[&'static str]) -> Vec<u8> {
    // endbr64; the NOP of the ftrace site; incq %gs:calls; ret
    let code = [
        &[0xf3, 0x0f, 0x1e, 0xfa][..],
        &[0x0f, 0x1f, 0x44, 0, 0],
        &COUNT,
        &[0xc3],
    ]
    .concat();
    let functions: Vec<_> = functions
        .iter()
        .map(|old| Function {
            code: code.clone(),
            ..Function::returning_one(old)
        })
        .collect();
    let sites = vec![0; 8 * functions.len()];
    make(name, VERMAGIC, &functions, &[(SITES, &sites), (PERCPU, &[7; 24])])
}

/// A module called `name` whose functions can be unwound.
pub fn livepatch_with_orc(name: &str, functions: &[Function]) -> Vec<u8> {
    let (ips, entries) = (vec![0; 4 * functions.len()], [8, 0, 0, 0, 5, 2].repeat(functions.len()));
    make(name, VERMAGIC, functions, &[(ORC_IPS, &ips), (".orc_unwind", &entries)])
}

/// The same with entries of that many bytes.
pub fn livepatch_with_orc_entries(name: &str, bytes: usize, functions: &[Function]) -> Vec<u8> {
    let (ips, entries) = (vec![0; 4 * functions.len()], vec![0; bytes * functions.len()]);
    make(name, VERMAGIC, functions, &[(ORC_IPS, &ips), (".orc_unwind", &entries)])
}

/// A module called `name` that replaces all other patches.
pub fn livepatch_that_replaces(name: &str, functions: &[Function]) -> Vec<u8> {
    make(name, VERMAGIC, functions, &[(REPLACE, &[1])])
}

/// In the place of a section: the byte `klp_patch.replace`, and where it is.
const REPLACE: &str = "replace";
const REPLACE_AT: usize = 24;
/// Tables of [`livepatch_with_sections`].
const SITES: &str = "__mcount_loc";
const PERCPU: &str = ".data..percpu";
/// Table of [`livepatch_with_orc`].
const ORC_IPS: &str = ".orc_unwind_ip";
/// `incq %gs:0`, and the offset of its address.
const COUNT: [u8; 9] = [0x65, 0x48, 0xff, 0x04, 0x25, 0, 0, 0, 0];
const COUNTED: u64 = 4 + 5 + 5;

/// `module.init` in a guest made by hand.
const INIT: u64 = 784;

fn make(name: &str, vermagic: &str, functions: &[Function], more: &[(&str, &[u8])]) -> Vec<u8> {
    let mut elf = Elf::default();
    let (mut text, mut names, mut starts) = (Vec::new(), Vec::new(), Vec::new());
    for function in functions {
        text.resize(text.len().next_multiple_of(16), 0x90);
        starts.push((text.len() as u64, names.len() as u64));
        text.extend_from_slice(&function.code);
        names.extend_from_slice(function.old.as_bytes());
        names.push(0);
    }
    let info = format!("license=GPL\0livepatch=Y\0name={name}\0vermagic={vermagic}\0");
    let funcs_at = PATCH + 2 * OBJECT;
    let mut descriptors = vec![0; (funcs_at + FUNCTION * (functions.len() as u64 + 1)) as usize];
    let (replace, more): (Vec<_>, Vec<_>) = more.iter().partition(|(name, _)| *name == REPLACE);
    for (_, byte) in replace {
        descriptors[REPLACE_AT] = byte[0];
    }
    elf.section(".text", ALLOC | EXEC, &text);
    elf.section(".rodata.str1.1", ALLOC, &names);
    elf.section(".data", ALLOC | WRITE, &descriptors);
    // mov $patch,%rdi; jmp klp_enable_patch
    elf.section(
        ".init.text",
        ALLOC | EXEC,
        &[0x48, 0xc7, 0xc7, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0],
    );
    elf.section(".gnu.linkonce.this_module", ALLOC | WRITE, &[0; 1024]);
    elf.section(".modinfo", ALLOC, info.as_bytes());
    for (name, data) in more.iter().copied() {
        let flags = match name {
            PERCPU => ALLOC | WRITE,
            ".BTF.base" => 0,
            _ => ALLOC,
        };
        elf.section(name, flags, data);
    }
    for section in 1..=5 {
        elf.symbol("", 3, section, 0, 0);
    }
    let this_module = elf.symbol("__this_module", 0x11, 5, 0, 1024);
    let enable = elf.symbol("klp_enable_patch", 0x10, 0, 0, 0);
    let has_duties = more.iter().any(|(name, _)| *name == SITES);
    let has_orc = more.iter().any(|(name, _)| *name == ORC_IPS);
    let calls = if has_duties { elf.symbol("calls", 1, 8, 8, 8) } else { 0 };
    elf.relocation(3, 0, R_64, this_module, 0);
    elf.relocation(3, 8, R_64, 3, PATCH);
    elf.relocation(3, PATCH + 8, R_64, 3, funcs_at);
    // struct module's pointer to init
    elf.relocation(5, INIT, R_64, 4, 0);
    elf.relocation(4, 3, R_32S, 3, 0);
    elf.relocation(4, 8, R_PLT32, enable, (-4_i64).cast_unsigned());
    for (index, (function, (start, name))) in functions.iter().zip(starts).enumerate() {
        let at = funcs_at + FUNCTION * index as u64;
        elf.symbol(
            &format!("new_{}", function.old),
            2,
            1,
            start,
            function.code.len() as u64,
        );
        elf.relocation(3, at, R_64, 2, name);
        elf.relocation(3, at + 8, R_64, 1, start);
        elf.sections[2].data[at as usize + 16..at as usize + 24].copy_from_slice(&function.sympos.to_le_bytes());
        if has_duties {
            elf.relocation(7, 8 * index as u64, R_64, 1, start + 4);
            elf.relocation(1, start + COUNTED, R_32S, calls, 0);
        }
        if has_orc {
            elf.relocation(7, 4 * index as u64, R_PC32, 1, start);
        }
        if let Some((offset, further)) = function.this_module {
            elf.relocation(1, start + offset, R_32S, this_module, further);
        }
        if let Some((offset, symbol)) = function.calls {
            let symbol = elf.symbol(symbol, 0x10, 0, 0, 0);
            elf.relocation(1, start + offset, R_PLT32, symbol, (-4_i64).cast_unsigned());
        }
    }
    elf.build()
}

struct Section {
    name: String,
    kind: u32,
    flags: u64,
    data: Vec<u8>,
    /// Linked section, and info.
    link: (u32, u32),
    entry: u64,
    /// Offset, type, symbol, addend.
    relocations: Vec<[u64; 4]>,
}

#[derive(Default)]
struct Elf {
    sections: Vec<Section>,
    symbols: Vec<u8>,
    strings: Vec<u8>,
    count: u64,
}

impl Elf {
    fn section(&mut self, name: &str, flags: u64, data: &[u8]) {
        self.add(name, 1, flags, data.to_vec(), (0, 0), 0);
    }

    fn add(&mut self, name: &str, kind: u32, flags: u64, data: Vec<u8>, link: (u32, u32), entry: u64) {
        let name = name.to_owned();
        self.sections.push(Section {
            name,
            kind,
            flags,
            data,
            link,
            entry,
            relocations: Vec::new(),
        });
    }

    fn symbol(&mut self, name: &str, info: u8, section: u16, value: u64, size: u64) -> u64 {
        if self.symbols.is_empty() {
            self.symbols.resize(24, 0);
            self.strings.push(0);
        }
        let at = if name.is_empty() { 0 } else { self.strings.len() as u32 };
        if at != 0 {
            self.strings.extend_from_slice(name.as_bytes());
            self.strings.push(0);
        }
        self.symbols.extend_from_slice(&at.to_le_bytes());
        self.symbols.extend_from_slice(&[info, 0]);
        self.symbols.extend_from_slice(&section.to_le_bytes());
        self.symbols.extend_from_slice(&value.to_le_bytes());
        self.symbols.extend_from_slice(&size.to_le_bytes());
        self.count += 1;
        self.count
    }

    fn relocation(&mut self, section: usize, offset: u64, kind: u64, symbol: u64, addend: u64) {
        self.sections[section - 1]
            .relocations
            .push([offset, kind, symbol, addend]);
    }

    /// Header, contents, section headers.
    fn build(mut self) -> Vec<u8> {
        let symtab = self.sections.len() as u32 + 1;
        let (symbols, strings) = (std::mem::take(&mut self.symbols), std::mem::take(&mut self.strings));
        self.add(".symtab", 2, 0, symbols, (symtab + 1, 1), 24);
        self.add(".strtab", 3, 0, strings, (0, 0), 0);
        for index in 0..symtab as usize - 1 {
            let words = self.sections[index]
                .relocations
                .iter()
                .flat_map(|r| [r[0], r[2] << 32 | r[1], r[3]]);
            let data: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            if !data.is_empty() {
                let name = format!(".rela{}", self.sections[index].name);
                self.add(&name, 4, 0x40, data, (symtab, index as u32 + 1), 24);
            }
        }
        self.add(".shstrtab", 3, 0, Vec::new(), (0, 0), 0);
        let mut names = vec![0];
        let offsets: Vec<u32> = self
            .sections
            .iter()
            .map(|section| push(&mut names, &section.name))
            .collect();
        self.sections.last_mut().unwrap().data = names;
        let mut file = vec![0; 64];
        let mut table = vec![0; 64];
        for (name, section) in offsets.iter().zip(&self.sections) {
            file.resize(file.len().next_multiple_of(8), 0);
            table.extend_from_slice(&name.to_le_bytes());
            table.extend_from_slice(&section.kind.to_le_bytes());
            for word in [section.flags, 0, file.len() as u64, section.data.len() as u64] {
                table.extend_from_slice(&word.to_le_bytes());
            }
            table.extend_from_slice(&section.link.0.to_le_bytes());
            table.extend_from_slice(&section.link.1.to_le_bytes());
            table.extend_from_slice(&1_u64.to_le_bytes());
            table.extend_from_slice(&section.entry.to_le_bytes());
            file.extend_from_slice(&section.data);
        }
        file.resize(file.len().next_multiple_of(8), 0);
        let table_at = file.len() as u64;
        file.extend_from_slice(&table);
        let count = self.sections.len() as u16 + 1;
        file[..18].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x01\0");
        file[18..20].copy_from_slice(&62_u16.to_le_bytes());
        file[20..24].copy_from_slice(&1_u32.to_le_bytes());
        file[40..48].copy_from_slice(&table_at.to_le_bytes());
        for (at, value) in [(52, 64), (58, 64), (60, count), (62, count - 1)] {
            file[at..at + 2].copy_from_slice(&u16::to_le_bytes(value));
        }
        file
    }
}

fn push(table: &mut Vec<u8>, text: &str) -> u32 {
    let at = table.len() as u32;
    table.extend_from_slice(text.as_bytes());
    table.push(0);
    at
}
