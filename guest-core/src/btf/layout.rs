//! Structs and unions: their size, and where their members lie.

use super::record::{Kind, Record, WIDE_ELEMENT};
use super::{Btf, BtfError, TypeId, word};
use crate::text::plain;

/// How many members one look-up may visit. The kernel's biggest struct has some 300 members with all that is
/// anonymous inside; BTF made to nest the same anonymous struct again and again must not keep us busy.
const VISITS_MAX: usize = 20_000;
/// How many copies of one struct there may be. The kernel's build merges equal ones; those that remain differ in what a
/// member points at. Each look-up goes through all of them.
const COPIES_MAX: usize = 64;
/// How many dots and brackets a path may have.
const PATH_MAX: usize = 16;

/// A struct or union.
#[derive(Debug, Clone)]
pub struct Struct<'a> {
    btf: &'a Btf,
    name: String,
    /// All definitions of this name; nearly always one. Where the compilers' type information could not be merged,
    /// the kernel's BTF holds copies, which must agree on what is asked.
    ids: Vec<TypeId>,
    size: u64,
}

/// Where a member lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Distance from the start of the outermost struct, in bits.
    pub bit_offset: u64,
    /// Width in bits of a bit field; `None` for an ordinary member.
    pub bit_field: Option<u32>,
    /// The member's type, as declared.
    pub type_id: TypeId,
    /// Size of its type, in bytes (of the declared type, where it is a bit field; 0 for a flexible array).
    pub size: u64,
    /// Number of elements of its outermost dimension, where it is an array.
    pub elements: Option<u64>,
}

impl Member {
    /// Distance from the start of the outermost struct to the first byte that holds a bit of the member, in bytes.
    pub fn offset(&self) -> u64 {
        self.bit_offset / 8
    }

    /// The first byte behind the member, in bytes from the start of the outermost struct.
    pub fn end(&self) -> u64 {
        match self.bit_field {
            Some(bits) => self.bit_offset.saturating_add(bits.into()).div_ceil(8),
            None => self.offset().saturating_add(self.size),
        }
    }

    /// The member's value, not sign-extended, from the bytes of the outermost struct.
    ///
    /// `None`: the member is not within `bytes`, or has more than 64 bits.
    pub fn value_in(&self, bytes: &[u8]) -> Option<u64> {
        let bits = self.bit_field.map_or(self.size.checked_mul(8)?, u64::from);
        if bits == 0 || bits > 64 {
            return None;
        }
        let (start, end) = (usize::try_from(self.offset()).ok()?, usize::try_from(self.end()).ok()?);
        // 64 bits that do not start at a byte touch nine bytes
        let value = bytes
            .get(start..end)?
            .iter()
            .rev()
            .fold(0u128, |value, &byte| (value << 8) | u128::from(byte));
        u64::try_from((value >> (self.bit_offset % 8)) & ((1u128 << bits) - 1)).ok()
    }
}

impl<'a> Struct<'a> {
    pub(super) fn by_name(btf: &'a Btf, name: &str) -> Result<Self, BtfError> {
        let missing = || BtfError::NoStruct { name: name.to_owned() };
        let is_struct = |record: &Record| matches!(record.kind, Kind::Struct | Kind::Union);
        let mut ids: Vec<_> = btf
            .named(name)
            .filter(|(_, record)| is_struct(record))
            .map(|(id, _)| id)
            .collect();
        if ids.is_empty() {
            let typedefs = btf.named(name).filter_map(|(id, _)| btf.resolve(id));
            ids = typedefs
                .filter(|(_, record)| is_struct(record))
                .map(|(id, _)| id)
                .collect();
        }
        let first = *ids.first().ok_or_else(missing)?;
        if ids.len() > COPIES_MAX {
            return Err(BtfError::Ambiguous {
                name: name.to_owned(),
                count: ids.len(),
                what: "more ways than are looked at".to_owned(),
            });
        }
        let size = btf.size_of(first)?;
        if ids.iter().any(|&id| btf.size_of(id) != Ok(size)) {
            let what = "size".to_owned();
            return Err(BtfError::Ambiguous {
                name: name.to_owned(),
                count: ids.len(),
                what,
            });
        }
        Ok(Self {
            btf,
            name: name.to_owned(),
            ids,
            size,
        })
    }

    pub(super) fn by_id(btf: &'a Btf, id: TypeId) -> Result<Self, BtfError> {
        let missing = || BtfError::NoStruct {
            name: format!("type {}", id.0),
        };
        let (id, record) = btf.resolve(id).ok_or_else(missing)?;
        if !matches!(record.kind, Kind::Struct | Kind::Union) {
            return Err(missing());
        }
        let name = plain(btf.name(record.name_off));
        let name = if name.is_empty() {
            "(anonymous)".to_owned()
        } else {
            name
        };
        Ok(Self {
            btf,
            name,
            ids: vec![id],
            size: record.size_or_type.into(),
        })
    }

    /// The name it was looked up by, or its tag.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Where the member at `path` lies: names joined with dots through nested structs and unions, `[n]` after an
    /// array (`"thread.sp"`, `"mem[0].base"`). Members of anonymous structs and unions are found by their name alone.
    ///
    /// Errors: a part is not there; the path goes through something that is no struct or no array; copies of the
    /// struct disagree.
    pub fn member(&self, path: &str) -> Result<Member, BtfError> {
        let mut found = None;
        for &id in &self.ids {
            let member = self.resolve(id, path)?;
            let place = (member.bit_offset, member.bit_field, member.size);
            if found.is_some_and(|other: Member| (other.bit_offset, other.bit_field, other.size) != place) {
                let (name, count) = (self.name.clone(), self.ids.len());
                return Err(BtfError::Ambiguous {
                    name,
                    count,
                    what: format!("member `{path}`"),
                });
            }
            found = found.or(Some(member));
        }
        found.ok_or_else(|| BtfError::NoStruct {
            name: self.name.clone(),
        })
    }

    /// Like [`Self::member`], for probing which form of a struct this kernel has.
    pub fn try_member(&self, path: &str) -> Option<Member> {
        self.member(path).ok()
    }

    /// The offset in bytes of an ordinary member (not a bit field). Errors: as [`Self::member`].
    pub fn offset(&self, path: &str) -> Result<u64, BtfError> {
        let member = self.member(path)?;
        match member.bit_field {
            None => Ok(member.offset()),
            Some(_) => Err(self.bad_path(path, path, "a bit field")),
        }
    }

    fn resolve(&self, id: TypeId, path: &str) -> Result<Member, BtfError> {
        let mut place = Place {
            id,
            bit_offset: 0,
            bit_field: None,
        };
        if path.matches(['.', '[']).count() > PATH_MAX {
            return Err(self.bad_path(path, path, "too many parts"));
        }
        for part in path.split('.') {
            let (name, indices) = part.split_at(part.find('[').unwrap_or(part.len()));
            place = self.step_into(place, path, name)?;
            for index in indices.split_terminator(']') {
                place = self.step_to_element(place, path, part, index)?;
            }
        }
        let elements = self
            .btf
            .resolve(place.id)
            .and_then(|(id, _)| self.btf.array(id))
            .map(|(_, number)| number);
        let size = self.btf.size_of(place.id)?;
        let Place {
            id: type_id,
            bit_offset,
            bit_field,
        } = place;
        Ok(Member {
            bit_offset,
            bit_field,
            type_id,
            size,
            elements,
        })
    }

    /// From a struct to its member `name`, looking into what is anonymous.
    fn step_into(&self, place: Place, path: &str, name: &str) -> Result<Place, BtfError> {
        let btf = self.btf;
        let bad = |problem| self.bad_path(path, name, problem);
        let mut open = vec![place];
        let mut visits = 0usize;
        while let Some(outer) = open.pop() {
            let (id, record) = btf
                .resolve(outer.id)
                .ok_or_else(|| bad("a chain of types that does not end"))?;
            if !matches!(record.kind, Kind::Struct | Kind::Union) {
                return Err(bad("not a struct or union"));
            }
            for bytes in btf.extra(id, &record).unwrap_or_default().chunks_exact(WIDE_ELEMENT) {
                visits += 1;
                if visits > VISITS_MAX {
                    return Err(bad("too many members to look through"));
                }
                let (Some(name_off), Some(type_id), Some(offset)) = (word(bytes, 0), word(bytes, 4), word(bytes, 8))
                else {
                    continue;
                };
                let inner = self.inner(outer, &record, TypeId(type_id), offset);
                if btf.is_named(name_off, name) {
                    return Ok(inner);
                }
                if btf.name(name_off).is_empty() && self.is_struct(inner.id) {
                    open.push(inner);
                }
            }
        }
        let (structure, path, part) = (self.name.clone(), path.to_owned(), name.to_owned());
        Err(BtfError::NoMember { structure, path, part })
    }

    /// The place of one member. With the kind flag, its offset word holds a bit field's width in the high byte;
    /// without it a bit field shows in the integer type's own width and offset.
    fn inner(&self, outer: Place, record: &Record, id: TypeId, offset: u32) -> Place {
        if record.kind_flag {
            let width = offset >> 24;
            let bit_offset = outer.bit_offset.saturating_add(u64::from(offset & 0x00ff_ffff));
            return Place {
                id,
                bit_offset,
                bit_field: (width != 0).then_some(width),
            };
        }
        let bit_offset = outer.bit_offset.saturating_add(offset.into());
        match self.narrow_int(id) {
            Some((shift, width)) => {
                let bit_offset = bit_offset.saturating_add(shift.into());
                Place {
                    id,
                    bit_offset,
                    bit_field: Some(width),
                }
            }
            None => Place {
                id,
                bit_offset,
                bit_field: None,
            },
        }
    }

    /// Offset and width in bits of an integer type that does not fill its bytes.
    fn narrow_int(&self, id: TypeId) -> Option<(u32, u32)> {
        let (id, record) = self.btf.resolve(id)?;
        if record.kind != Kind::Int {
            return None;
        }
        let encoding = word(self.btf.extra(id, &record)?, 0)?;
        let (shift, width) = ((encoding >> 16) & 0xff, encoding & 0xff);
        (shift != 0 || width != record.size_or_type.checked_mul(8)?).then_some((shift, width))
    }

    fn is_struct(&self, id: TypeId) -> bool {
        self.btf
            .resolve(id)
            .is_some_and(|(_, record)| matches!(record.kind, Kind::Struct | Kind::Union))
    }

    /// From an array to its element `[index`.
    fn step_to_element(&self, place: Place, path: &str, part: &str, index: &str) -> Result<Place, BtfError> {
        let bad = |problem| self.bad_path(path, part, problem);
        let index: u64 = index
            .strip_prefix('[')
            .and_then(|digits| digits.parse().ok())
            .ok_or(bad("a bad index"))?;
        let (id, _) = self
            .btf
            .resolve(place.id)
            .ok_or(bad("a chain of types that does not end"))?;
        let (element, number) = self.btf.array(id).ok_or(bad("not an array"))?;
        if index >= number {
            return Err(bad("an index past the end"));
        }
        let bits = self
            .btf
            .size_of(element)?
            .checked_mul(8)
            .and_then(|bits| bits.checked_mul(index));
        let bit_offset = bits
            .and_then(|bits| place.bit_offset.checked_add(bits))
            .ok_or(bad("too big an array"))?;
        Ok(Place {
            id: element,
            bit_offset,
            bit_field: None,
        })
    }

    fn bad_path(&self, path: &str, part: &str, problem: &'static str) -> BtfError {
        let (structure, path, part) = (self.name.clone(), path.to_owned(), part.to_owned());
        BtfError::BadPath {
            structure,
            path,
            part,
            problem,
        }
    }
}

/// A type at a distance from the start of the outermost struct.
#[derive(Debug, Clone, Copy)]
struct Place {
    id: TypeId,
    bit_offset: u64,
    bit_field: Option<u32>,
}
