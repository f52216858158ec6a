//! The kernel image, or one of its modules, as the distribution shipped it.

use std::collections::BTreeSet;

use guest_core::addr::Gva;
use object::elf::{R_X86_64_32, R_X86_64_32S, R_X86_64_64, R_X86_64_PC32, R_X86_64_PLT32, RelocationType, STB_WEAK};
use object::{Object as _, ObjectSection as _};

use crate::compare::is_of_boot;
use crate::elf::{At, ElfError, Object, Place, Relocation};
use crate::facts::{KernelFacts, ModuleError};

/// Lists the entries that the kernel takes `endbr64` away from, as nobody keeps their addresses; only kernels that check where indirect
/// calls lead (`CONFIG_X86_KERNEL_IBT`) have it (tools/objtool/check.c, `create_ibt_endbr_seal_sections`, of 6.12).
const SEALS: &str = ".ibt_endbr_seal";
/// The instruction that an indirect call must lead to there.
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];

/// Bits of a place in a module that hold the offset in its section.
const OFFSET_BITS: u32 = 32;

/// What was shipped could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ShippedError {
    /// There is no such module.
    #[error(transparent)]
    Module(#[from] ModuleError),
    /// The module is no object file.
    #[error("module {name}: {source}")]
    Elf {
        /// The module.
        name: String,
        /// What is wrong with it.
        source: ElfError,
    },
    /// The kernel image is no ELF file.
    #[error("the kernel image: {0}")]
    Image(#[from] object::Error),
}

/// The kernel image, or a module: its symbols in the order that livepatch counts, and its bytes.
#[derive(Debug)]
pub enum Shipped<'k> {
    /// The image.
    Kernel {
        /// What is known of it.
        facts: &'k KernelFacts,
        /// Addresses and bytes of its sections.
        sections: Vec<(u64, &'k [u8])>,
        /// Addresses of the entries that it seals.
        sealed: BTreeSet<u64>,
    },
    /// A module.
    Module {
        /// Its name, as `/proc/modules` has it.
        name: String,
        /// Its file.
        object: Object,
    },
}

impl<'k> Shipped<'k> {
    /// The kernel image.
    ///
    /// Errors: [`ShippedError::Image`].
    pub fn kernel(facts: &'k KernelFacts) -> Result<Self, ShippedError> {
        let image = object::File::parse(facts.vmlinux.as_slice())?;
        let sections = image
            .sections()
            .filter(|section| section.address() != 0)
            .filter_map(|section| Some((section.address(), section.data().ok()?)));
        let seals = image.section_by_name(SEALS);
        let seals = seals.and_then(|seals| Some((seals.address(), seals.data().ok()?)));
        let (start, seals) = seals.unwrap_or_default();
        // Each is counted from where it stands.
        let sealed = (start..).step_by(4).zip(seals.chunks_exact(4));
        let sealed = sealed.filter_map(|(at, entry)| decoded(entry, R_X86_64_PC32.0, at));
        Ok(Self::Kernel {
            facts,
            sections: sections.collect(),
            sealed: sealed.collect(),
        })
    }

    /// The module of that name.
    ///
    /// Errors: [`ShippedError::Module`], [`ShippedError::Elf`].
    pub fn module(facts: &'k KernelFacts, name: &str) -> Result<Self, ShippedError> {
        let bytes = facts.modules.read(name)?;
        let object = Object::parse(&bytes).map_err(|source| ShippedError::Elf {
            name: name.to_owned(),
            source,
        })?;
        Ok(Self::Module {
            name: name.to_owned(),
            object,
        })
    }

    /// The module's name; none for the kernel image.
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Kernel { .. } => None,
            Self::Module { name, .. } => Some(name),
        }
    }

    /// The addresses of all symbols of that name: the n-th has sympos n. In a module, which has no address yet, section
    /// and offset stand for it.
    pub fn named(&self, name: &str) -> Vec<u64> {
        match self {
            Self::Kernel { facts, .. } => facts.symbols.named(name).map(|symbol| symbol.address.0).collect(),
            Self::Module { object, .. } => {
                let named = object.symbols.iter().filter(|symbol| symbol.name == name);
                named.filter_map(|symbol| address(symbol.place)).collect()
            }
        }
    }

    /// As [`Shipped::named`], for the one that other files see too; none where there is none, or more than one.
    pub fn global(&self, name: &str) -> Option<u64> {
        let found: Vec<u64> = match self {
            Self::Kernel { facts, .. } => facts
                .symbols
                .named(name)
                .filter(|symbol| !symbol.kind.is_ascii_lowercase())
                .map(|symbol| symbol.address.0)
                .collect(),
            Self::Module { object, .. } => object
                .symbols
                .iter()
                .filter(|symbol| symbol.name == name && !symbol.is_local())
                .filter_map(|symbol| address(symbol.place))
                .collect(),
        };
        match found.as_slice() {
            [only] => Some(*only),
            _ => None,
        }
    }

    /// True where the symbol of that name there is weak: no other file has what the linker would have taken instead. The linker leaves
    /// that in the kernel's own table as `W` or `V` (nm(1)).
    pub fn is_weak(&self, name: &str, address: u64) -> bool {
        match self {
            Self::Kernel { facts, .. } => facts
                .symbols
                .named(name)
                .any(|symbol| symbol.address.0 == address && matches!(symbol.kind, 'W' | 'V')),
            Self::Module { object, .. } => object.symbols.iter().any(|symbol| {
                symbol.name == name && symbol.binding == STB_WEAK.0 && self::address(symbol.place) == Some(address)
            }),
        }
    }

    /// True for the entry of a function that no indirect call may lead to any more, as the kernel seals it.
    pub fn is_sealed(&self, at: u64) -> bool {
        match self {
            Self::Kernel { sealed, .. } => sealed.contains(&at),
            Self::Module { object, .. } => {
                let seals = object.section_named(SEALS);
                seals.is_some_and(|(_, seals)| {
                    let entry = |seal: &Relocation| {
                        let symbol = address(object.symbol(seal)?.place)?;
                        Some(symbol.wrapping_add_signed(seal.addend))
                    };
                    seals.relocations.iter().any(|seal| entry(seal) == Some(at))
                })
            }
        }
    }

    /// True where code begins as that of a function does to which indirect calls may lead, where the processor checks that.
    pub fn is_entry(code: &[u8]) -> bool {
        code.starts_with(&ENDBR)
    }

    /// `len` bytes at an address.
    pub fn bytes(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        match self {
            Self::Kernel { sections, .. } => sections.iter().find_map(|(start, bytes)| {
                let from = usize::try_from(at.checked_sub(*start)?).ok()?;
                let to = from.checked_add(usize::try_from(len).ok()?)?;
                bytes.get(from..to).map(<[u8]>::to_vec)
            }),
            Self::Module { object, .. } => {
                let (section, offset) = place(at)?;
                object.section(section)?.bytes(offset, len)
            }
        }
    }

    /// Bytes from an address to the next symbol, where that is known.
    pub fn room(&self, at: u64) -> Option<u64> {
        match self {
            Self::Kernel { facts, .. } => facts
                .symbols
                .containing(Gva(at))
                .map(|(_, next)| next.0.saturating_sub(at)),
            Self::Module { .. } => None,
        }
    }

    /// Symbol plus addend of the relocation of that kind at an address: in the image what the linker stored there, in a module
    /// what its relocation says.
    pub fn stored(&self, at: u64, kind: u32) -> Option<u64> {
        let Self::Module { object, .. } = self else {
            let wide = RelocationType(kind) == R_X86_64_64;
            return decoded(&self.bytes(at, if wide { 8 } else { 4 })?, kind, at);
        };
        let (section, offset) = place(at)?;
        let relocations = object.section(section)?.relocations_in(offset, offset + 1);
        let relocation = relocations.first().filter(|relocation| relocation.kind == kind)?;
        let symbol = address(object.symbol(relocation)?.place)?;
        Some(symbol.wrapping_add_signed(relocation.addend))
    }

    /// The position of an address among all symbols of its name, from 1 on; 0 where it is the only one. None where some of them are
    /// gone once the module has started, and the rest then counted anew.
    pub fn sympos(&self, named: &[u64], address: u64) -> Option<u64> {
        let position = named.iter().position(|other| *other == address)?;
        match named {
            [_] => Some(0),
            _ if named.iter().any(|at| self.is_of_start(*at)) => None,
            _ => u64::try_from(position + 1).ok(),
        }
    }

    /// True for what a module needs only while it starts.
    fn is_of_start(&self, at: u64) -> bool {
        let Self::Module { object, .. } = self else {
            return false;
        };
        let section = place(at).and_then(|(section, _)| object.section(section));
        section.is_some_and(|section| is_of_boot(&section.name))
    }
}

/// Symbol plus addend of a linked relocation at `at`.
fn decoded(bytes: &[u8], kind: u32, at: u64) -> Option<u64> {
    let short = || Some(i64::from(i32::from_le_bytes(bytes.try_into().ok()?)));
    match RelocationType(kind) {
        R_X86_64_64 => Some(u64::from_le_bytes(bytes.try_into().ok()?)),
        R_X86_64_32 | R_X86_64_32S => Some(short()?.cast_unsigned()),
        R_X86_64_PC32 | R_X86_64_PLT32 => Some(at.wrapping_add_signed(short()?)),
        _ => None,
    }
}

/// Section and offset that stand for an address in a module.
fn place(at: u64) -> Option<(usize, u64)> {
    Some((usize::try_from(at >> OFFSET_BITS).ok()?, at & ((1 << OFFSET_BITS) - 1)))
}

fn address(place: Place) -> Option<u64> {
    match place {
        Place::In(At { section, offset }) => Some((u64::try_from(section).ok()? << OFFSET_BITS) | offset),
        _ => None,
    }
}
