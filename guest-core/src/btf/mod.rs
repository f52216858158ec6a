//! The guest's own type information: where a member lies in a kernel struct, and how big things are.
//!
//! Every offset that vmpatch uses comes from here, none from a kernel version. Format: BTF version 1, the kernel's
//! include/uapi/linux/btf.h and Documentation/bpf/btf.rst (kinds 1 to 19, Linux 4.18 to 7.2).
//!
//! A kernel's BTF has some 100,000 types in 4 to 6 MB, so what is kept beside the bytes is small: one offset a type,
//! a sorted table of name hashes for structs, unions and typedefs, and a list of the enums.

mod error;
mod layout;
mod record;

#[cfg(test)]
pub(crate) mod builder;
#[cfg(test)]
mod tests;

pub use error::{BtfError, TypeId};
pub use layout::{Member, Struct};

use record::{Kind, NARROW_ELEMENT, RECORD, Record, WIDE_ELEMENT};
use std::ops::Range;

const MAGIC: u16 = 0xeb9f;
/// The header's fields that every version has: up to and including `str_len`.
const HEADER: usize = 24;
/// How many typedefs, qualifiers and array dimensions may stand before a type; the kernel allows 32.
const CHAIN_MAX: usize = 64;

/// A kernel's type information.
#[derive(Debug)]
pub struct Btf {
    bytes: Vec<u8>,
    types: Range<usize>,
    strings: Range<usize>,
    /// Offset in the type section of each type; index 0 is type 1.
    offsets: Vec<u32>,
    /// `(hash of the name, type id)` of each named struct, union and typedef, sorted.
    names: Vec<(u32, u32)>,
    /// The enums among the types, in ascending order.
    enums: Vec<TypeId>,
}

impl Btf {
    /// Reads the blob between `__start_BTF` and `__stop_BTF`.
    ///
    /// Errors: a header that is no BTF, sections outside the blob, a type that is cut off or of an unknown kind.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, BtfError> {
        let (types, strings) = sections(&bytes)?;
        let mut btf = Self {
            bytes,
            types,
            strings,
            offsets: Vec::new(),
            names: Vec::new(),
            enums: Vec::new(),
        };
        btf.index()?;
        Ok(btf)
    }

    /// Number of types, `void` not counted.
    pub fn type_count(&self) -> usize {
        self.offsets.len()
    }

    /// The struct or union called `name`, by its tag or by a typedef.
    ///
    /// Errors: there is none; or there are several, which differ in size.
    pub fn structure(&self, name: &str) -> Result<Struct<'_>, BtfError> {
        Struct::by_name(self, name)
    }

    /// The struct or union of that number, seen through typedefs and qualifiers; for example a [`Member::type_id`].
    ///
    /// Error: the type is neither.
    pub fn structure_of(&self, id: TypeId) -> Result<Struct<'_>, BtfError> {
        Struct::by_id(self, id)
    }

    /// The structs and unions that have a name: that, and bytes.
    pub fn named_sizes(&self) -> impl Iterator<Item = (&[u8], u64)> {
        let named = self.names.iter().filter_map(|(_, id)| self.record(TypeId(*id)));
        let composite = named.filter(|record| matches!(record.kind, Kind::Struct | Kind::Union));
        composite.map(|record| (self.name(record.name_off), record.size_or_type.into()))
    }

    /// The sizes, in bytes, of all structs and unions of that name: none where there is none.
    pub fn sizes_of(&self, name: &str) -> Vec<u64> {
        let named = self.named(name).map(|(_, record)| record);
        let composite = named.filter(|record| matches!(record.kind, Kind::Struct | Kind::Union));
        composite.map(|record| record.size_or_type.into()).collect()
    }

    /// Size in bytes of a type.
    ///
    /// Error: it has none (a function, a forward declaration, `void`), or its chain of typedefs does not end.
    pub fn size_of(&self, id: TypeId) -> Result<u64, BtfError> {
        let none = BtfError::NoSize { id: id.0 };
        let (mut at, mut count) = (id, 1u64);
        for _ in 0..CHAIN_MAX {
            let record = self.record(at).ok_or_else(|| none.clone())?;
            let one = match record.kind {
                Kind::Alias { .. } | Kind::Var => {
                    at = TypeId(record.size_or_type);
                    continue;
                }
                Kind::Array => {
                    let (element, number) = self.array(at).ok_or_else(|| none.clone())?;
                    count = count.checked_mul(number).ok_or_else(|| none.clone())?;
                    at = element;
                    continue;
                }
                Kind::Ptr => 8,
                Kind::Other => return Err(none),
                _ => u64::from(record.size_or_type),
            };
            return count.checked_mul(one).ok_or(none);
        }
        Err(none)
    }

    /// The type that a pointer points to, seen through typedefs and qualifiers; `None` where the type is no pointer.
    pub fn pointee(&self, id: TypeId) -> Option<TypeId> {
        let (_, record) = self.resolve(id)?;
        (record.kind == Kind::Ptr).then_some(TypeId(record.size_or_type))
    }

    /// The value of the enumerator called `name`, sign-extended where its enum is signed.
    ///
    /// Error: there is none; or there are several with different values.
    pub fn enumerator(&self, name: &str) -> Result<i64, BtfError> {
        let mut found: Option<i64> = None;
        for &id in &self.enums {
            let Some(record) = self.record(id) else { continue };
            let wide = match record.kind {
                Kind::Enum => false,
                Kind::Enum64 => true,
                _ => continue,
            };
            for value in self.enumerators_called(id, &record, wide, name) {
                if found.is_some_and(|other| other != value) {
                    let what = "its value".to_owned();
                    return Err(BtfError::Ambiguous {
                        name: name.to_owned(),
                        count: 2,
                        what,
                    });
                }
                found = Some(value);
            }
        }
        found.ok_or_else(|| BtfError::NoEnumerator { name: name.to_owned() })
    }

    fn enumerators_called<'a>(
        &'a self,
        id: TypeId,
        record: &Record,
        wide: bool,
        name: &'a str,
    ) -> impl Iterator<Item = i64> + 'a {
        let signed = record.kind_flag;
        let step = if wide { WIDE_ELEMENT } else { NARROW_ELEMENT };
        self.extra(id, record)
            .unwrap_or_default()
            .chunks_exact(step)
            .filter_map(move |element| {
                if !self.is_named(word(element, 0)?, name) {
                    return None;
                }
                let low = word(element, 4)?;
                Some(match (wide, signed) {
                    (true, _) => (i64::from(word(element, 8)?) << 32) | i64::from(low),
                    (false, true) => i64::from(low.cast_signed()),
                    (false, false) => i64::from(low),
                })
            })
    }

    /// Walks over all types once and fills the tables.
    fn index(&mut self) -> Result<(), BtfError> {
        let section = self.types.len();
        let (mut offset, mut id) = (0usize, 1u32);
        let (mut names, mut enums) = (Vec::new(), Vec::new());
        // a kernel's records are some 24 bytes on average
        let mut offsets = Vec::with_capacity(section / 24);
        while offset < section {
            let truncated = BtfError::Truncated { id, offset, section };
            let Some(decoded) = self.decode(offset) else {
                return Err(truncated);
            };
            let record = decoded.map_err(|kind| BtfError::UnknownKind { id, kind })?;
            let next = offset + RECORD + record.extra;
            if next > section {
                return Err(truncated);
            }
            offsets.push(u32::try_from(offset).map_err(|_| truncated)?);
            if record.is_named_type() && record.name_off != 0 {
                names.push((hash(self.name(record.name_off)), id));
            }
            if matches!(record.kind, Kind::Enum | Kind::Enum64) {
                enums.push(TypeId(id));
            }
            offset = next;
            id += 1;
        }
        names.sort_unstable();
        self.offsets = offsets;
        self.names = names;
        self.enums = enums;
        Ok(())
    }

    /// All structs, unions and typedefs of that name.
    fn named(&self, name: &str) -> impl Iterator<Item = (TypeId, Record)> {
        let wanted = hash(name.as_bytes());
        let from = self.names.partition_point(|&(hash, _)| hash < wanted);
        let candidates = self.names.get(from..).unwrap_or_default();
        candidates
            .iter()
            .take_while(move |&&(hash, _)| hash == wanted)
            .filter_map(move |&(_, id)| {
                let record = self.record(TypeId(id))?;
                self.is_named(record.name_off, name).then_some((TypeId(id), record))
            })
    }

    /// The record at `offset` of the type section; `None` where it is cut off.
    fn decode(&self, offset: usize) -> Option<Result<Record, u32>> {
        let types = self.bytes.get(self.types.clone())?;
        let bytes = types.get(offset..)?.get(..RECORD)?;
        Some(Record::decode(word(bytes, 0)?, word(bytes, 4)?, word(bytes, 8)?))
    }

    fn offset(&self, id: TypeId) -> Option<usize> {
        let index = usize::try_from(id.0.checked_sub(1)?).ok()?;
        usize::try_from(*self.offsets.get(index)?).ok()
    }

    fn record(&self, id: TypeId) -> Option<Record> {
        self.decode(self.offset(id)?)?.ok()
    }

    /// The bytes behind a record that belong to it.
    fn extra(&self, id: TypeId, record: &Record) -> Option<&[u8]> {
        let start = self.offset(id)?.checked_add(RECORD)?;
        self.bytes.get(self.types.clone())?.get(start..)?.get(..record.extra)
    }

    /// Element type and number of elements of an array.
    fn array(&self, id: TypeId) -> Option<(TypeId, u64)> {
        let record = self.record(id)?;
        if record.kind != Kind::Array {
            return None;
        }
        let extra = self.extra(id, &record)?;
        Some((TypeId(word(extra, 0)?), u64::from(word(extra, 8)?)))
    }

    /// The type behind typedefs and qualifiers; `None` where the chain does not end.
    fn resolve(&self, id: TypeId) -> Option<(TypeId, Record)> {
        let mut at = id;
        for _ in 0..CHAIN_MAX {
            let record = self.record(at)?;
            if !matches!(record.kind, Kind::Alias { .. } | Kind::Var) {
                return Some((at, record));
            }
            at = TypeId(record.size_or_type);
        }
        None
    }

    /// The string at an offset of the string section, without its final NUL; empty where there is none.
    fn name(&self, offset: u32) -> &[u8] {
        let strings = self.bytes.get(self.strings.clone()).unwrap_or_default();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| strings.get(offset..))
            .unwrap_or_default();
        rest.split(|&byte| byte == 0).next().unwrap_or_default()
    }

    fn is_named(&self, offset: u32, name: &str) -> bool {
        let strings = self.bytes.get(self.strings.clone()).unwrap_or_default();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| strings.get(offset..))
            .unwrap_or_default();
        // One byte tells most names from another.
        rest.get(name.len()) == Some(&0) && rest.starts_with(name.as_bytes())
    }
}

/// The type and the string section, as ranges of the blob.
fn sections(bytes: &[u8]) -> Result<(Range<usize>, Range<usize>), BtfError> {
    let field = |what, at| {
        let found = bytes.len() as u64;
        word(bytes, at).ok_or(BtfError::Header {
            what,
            found,
            expected: HEADER as u64,
        })
    };
    let first = field("length of the blob", 0)?;
    let magic = first & 0xffff;
    if magic != u32::from(MAGIC) {
        return Err(BtfError::Header {
            what: "magic",
            found: magic.into(),
            expected: MAGIC.into(),
        });
    }
    let version = (first >> 16) & 0xff;
    if version != 1 {
        return Err(BtfError::Header {
            what: "version",
            found: version.into(),
            expected: 1,
        });
    }
    let header = field("length of the blob", 4)?;
    if (header as usize) < HEADER {
        return Err(BtfError::Header {
            what: "hdr_len",
            found: header.into(),
            expected: HEADER as u64,
        });
    }
    let section = |what, offset: u32, len: u32| {
        let start = u64::from(header) + u64::from(offset);
        let end = start + u64::from(len);
        let outside = BtfError::Header {
            what,
            found: end,
            expected: bytes.len() as u64,
        };
        match (usize::try_from(start), usize::try_from(end)) {
            (Ok(start), Ok(end)) if end <= bytes.len() => Ok(start..end),
            _ => Err(outside),
        }
    };
    let types = section("end of the types", field("type_off", 8)?, field("type_len", 12)?)?;
    let strings = section("end of the strings", field("str_off", 16)?, field("str_len", 20)?)?;
    Ok((types, strings))
}

/// The little-endian u32 at `at`.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let end = at.checked_add(4)?;
    Some(u32::from_le_bytes(bytes.get(at..end)?.try_into().ok()?))
}

/// FNV-1a, 32 bits: names are short, and a collision only costs one more comparison.
fn hash(name: &[u8]) -> u32 {
    name.iter().fold(0x811c_9dc5, |hash, &byte| {
        (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193)
    })
}
