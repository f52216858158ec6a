//! The offset of each register in the reply to `g`, from the target description (`qXfer:features:read`).
//!
//! The description is XML (GDB manual, "Target Description Format"): `target.xml` includes feature files, these list
//! registers in the order of `g`, each with its size. QEMU 7.2 and 10.0 include one file, `i386-64bit.xml`. Only the
//! needed elements are searched for. Comments, which hold disabled registers, are removed first.

use crate::text::TextError;
use guest_core::Registers;

const SOURCE: &str = "qXfer:features:read";

/// Most registers of a description. QEMU's has some 60.
const REGISTERS_MAX: usize = 1024;

/// General registers in the order of [`Registers::general`].
const GENERAL: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15",
];

/// Why registers cannot be read with the stub's description.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// The description is not understood.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A needed register is missing in the description, or has another size than expected.
    #[error("the GDB stub's description has no register {name} of {bytes} bytes")]
    NoRegister {
        /// Name of the register.
        name: &'static str,
        /// Expected size, in bytes.
        bytes: usize,
    },
    /// The reply to `g` is shorter than the described registers.
    #[error("the GDB stub sent {found} bytes of registers, {expected} were described")]
    ShortReply {
        /// Bytes sent.
        found: usize,
        /// Bytes needed.
        expected: usize,
    },
}

/// Offsets of the needed registers in the reply to `g`, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    general: [usize; 16],
    rip: usize,
    eflags: usize,
    cs: usize,
    cr0: usize,
    cr3: usize,
    cr4: usize,
    efer: usize,
    gs_base: usize,
    k_gs_base: usize,
}

/// A register in a description.
struct Described<'a> {
    name: &'a str,
    offset: usize,
    bytes: usize,
}

impl Layout {
    /// Reads the feature files, in the order in which `target.xml` includes them.
    pub fn parse(features: &[String]) -> Result<Self, LayoutError> {
        let features = features
            .iter()
            .map(|text| without_comments(text))
            .collect::<Result<Vec<_>, _>>()?;
        let registers = registers(&features)?;
        let find = |name: &'static str, bytes: usize| {
            let found = registers
                .iter()
                .find(|register| register.name == name && register.bytes == bytes);
            found
                .map(|register| register.offset)
                .ok_or(LayoutError::NoRegister { name, bytes })
        };
        let mut general = [0; 16];
        for (slot, name) in general.iter_mut().zip(GENERAL) {
            *slot = find(name, 8)?;
        }
        Ok(Self {
            general,
            rip: find("rip", 8)?,
            eflags: find("eflags", 4)?,
            cs: find("cs", 4)?,
            cr0: find("cr0", 8)?,
            cr3: find("cr3", 8)?,
            cr4: find("cr4", 8)?,
            efer: find("efer", 8)?,
            gs_base: find("gs_base", 8)?,
            k_gs_base: find("k_gs_base", 8)?,
        })
    }

    /// Decodes the registers from a reply to `g`.
    pub fn decode(&self, bytes: &[u8]) -> Result<Registers, LayoutError> {
        let quad = |at| field(bytes, at).map(u64::from_le_bytes);
        let word = |at| field(bytes, at).map(u32::from_le_bytes);
        let mut general = [0; 16];
        for (slot, &at) in general.iter_mut().zip(&self.general) {
            *slot = quad(at)?;
        }
        // A selector has 16 bits. The description gives it 32, and QEMU sends the upper ones as zero.
        let [low, high, ..] = word(self.cs)?.to_le_bytes();
        Ok(Registers {
            general,
            rip: quad(self.rip)?,
            rflags: word(self.eflags)?.into(),
            cs: u16::from_le_bytes([low, high]),
            cr0: quad(self.cr0)?,
            cr3: quad(self.cr3)?,
            cr4: quad(self.cr4)?,
            efer: quad(self.efer)?,
            gs_base: quad(self.gs_base)?,
            kernel_gs_base: Some(quad(self.k_gs_base)?),
            idt_base: None,
        })
    }
}

/// The files that `target.xml` includes, in order.
pub fn includes(target: &str) -> Result<Vec<String>, LayoutError> {
    let target = without_comments(target)?;
    let files: Option<Vec<String>> = elements(&target, "xi:include")
        .map(|element| attribute(element, "href").map(str::to_owned))
        .collect();
    files
        .filter(|files| !files.is_empty())
        .ok_or_else(|| TextError::new(SOURCE, "files included by target.xml", &target).into())
}

fn registers(features: &[String]) -> Result<Vec<Described<'_>>, TextError> {
    let mut found = Vec::new();
    let mut offset = 0_usize;
    for element in features
        .iter()
        .flat_map(|text| elements(text, "reg"))
        .take(REGISTERS_MAX)
    {
        let error = || TextError::new(SOURCE, "a register, without a gap before it", element);
        let name = attribute(element, "name").ok_or_else(error)?;
        let bits: usize = attribute(element, "bitsize")
            .and_then(|bits| bits.parse().ok())
            .ok_or_else(error)?;
        // `regnum` may renumber registers. If it does not simply count on, the place in `g` is unknown.
        let number = attribute(element, "regnum").map(|number| number.parse().ok());
        if number.is_some_and(|number: Option<usize>| number != Some(found.len())) || !bits.is_multiple_of(8) {
            return Err(error());
        }
        found.push(Described {
            name,
            offset,
            bytes: bits / 8,
        });
        offset = offset.checked_add(bits / 8).ok_or_else(error)?;
    }
    Ok(found)
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], LayoutError> {
    let expected = at.saturating_add(N);
    let short = LayoutError::ShortReply {
        found: bytes.len(),
        expected,
    };
    bytes
        .get(at..expected)
        .and_then(|field| field.try_into().ok())
        .ok_or(short)
}

/// The text of each `<name …>`, without its brackets.
fn elements<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    text.split('<').skip(1).filter_map(move |rest| {
        let inside = rest.split('>').next()?;
        inside
            .strip_prefix(name)?
            .starts_with(char::is_whitespace)
            .then_some(inside)
    })
}

/// The value of `name="…"` in an element.
fn attribute<'a>(element: &'a str, name: &str) -> Option<&'a str> {
    element.match_indices(name).find_map(|(at, _)| {
        let starts = element.get(..at)?.ends_with(char::is_whitespace);
        let value = element.get(at..)?.strip_prefix(name)?.strip_prefix("=\"")?;
        value.split_once('"').map(|(value, _)| value).filter(|_| starts)
    })
}

fn without_comments(text: &str) -> Result<String, TextError> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, comment)) = rest.split_once("<!--") {
        out.push_str(before);
        let end = comment.split_once("-->");
        rest = end
            .ok_or_else(|| TextError::new(SOURCE, "an end of comment", comment))?
            .1;
    }
    out.push_str(rest);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TARGET: &str = r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target><architecture>i386:x86-64</architecture><xi:include href="i386-64bit.xml"/></target>"#;

    /// Like QEMU 10.0.2's file in form and order, without the registers behind those needed.
    fn feature() -> String {
        let mut text = String::from(
            "<?xml version=\"1.0\"?>\n<!-- x86_64 64bit -->\n<feature name=\"org.gnu.gdb.i386.core\">\n\
             <flags id=\"x64_eflags\" size=\"4\">\n\t<field name=\"CF\" start=\"0\" end=\"0\"/>\n</flags>\n\
             <reg name=\"rax\" bitsize=\"64\" type=\"int64\" regnum=\"0\"/>\n",
        );
        let quads = |names: &[&str]| -> String {
            names
                .iter()
                .map(|name| format!("  <reg name=\"{name}\" bitsize=\"64\" type=\"int64\"/>\n"))
                .collect()
        };
        text += &quads(&["rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"]);
        text += &quads(&["r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip"]);
        for name in ["eflags", "cs", "ss", "ds", "es", "fs", "gs"] {
            text += &format!("  <reg name=\"{name}\" bitsize=\"32\" type=\"int32\"/>\n");
        }
        text += "  <!--reg name=\"cs_base\" bitsize=\"64\" type=\"int64\"/>\n  <reg name=\"x\" bitsize=\"64\"/-->\n";
        text + &quads(&[
            "fs_base",
            "gs_base",
            "k_gs_base",
            "cr0",
            "cr2",
            "cr3",
            "cr4",
            "cr8",
            "efer",
        ]) + "</feature>"
    }

    #[test]
    fn offsets_follow_the_order_and_the_sizes_and_skip_comments() {
        let layout = Layout::parse(&[feature()]).unwrap();
        assert_eq!(
            layout.general,
            [0, 16, 24, 8, 56, 48, 32, 40, 64, 72, 80, 88, 96, 104, 112, 120]
        );
        assert_eq!((layout.rip, layout.eflags, layout.cs), (128, 136, 140));
        assert_eq!(
            (layout.gs_base, layout.k_gs_base, layout.cr0, layout.efer),
            (172, 180, 188, 228)
        );
        assert_eq!(includes(TARGET).unwrap(), ["i386-64bit.xml"]);
    }

    #[test]
    fn registers_are_decoded_little_endian() {
        let layout = Layout::parse(&[feature()]).unwrap();
        let mut bytes = [0; 236];
        bytes[8..10].copy_from_slice(&[0x34, 0x12]); // rbx
        bytes[140] = 0x10; // cs
        bytes[228..230].copy_from_slice(&[0x01, 0x0d]); // efer
        let state = layout.decode(&bytes).unwrap();
        assert_eq!((state.general[3], state.cs, state.efer), (0x1234, 0x10, 0xd01));
        assert_eq!((state.kernel_gs_base, state.idt_base), (Some(0), None));
    }

    #[test]
    fn a_short_reply_is_refused() {
        let layout = Layout::parse(&[feature()]).unwrap();
        let expected = LayoutError::ShortReply {
            found: 235,
            expected: 236,
        };
        assert_eq!(layout.decode(&[0; 235]), Err(expected));
    }

    #[test]
    fn a_description_without_a_register_or_of_strange_form_is_refused() {
        let parse = |from: &str, to: &str| Layout::parse(&[feature().replace(from, to)]);
        let expected = Err(LayoutError::NoRegister {
            name: "k_gs_base",
            bytes: 8,
        });
        assert_eq!(parse("name=\"k_gs_base\"", "name=\"other\""), expected);
        assert!(parse("bitsize=\"64\"", "bitsize=\"63\"").is_err());
        assert!(parse("regnum=\"0\"", "regnum=\"4\"").is_err());
        assert!(parse("/-->", "/>").is_err());
        assert!(Layout::parse(&[]).is_err());
        assert!(includes("<target></target>").is_err());
    }
}
