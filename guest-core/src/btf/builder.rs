//! Builds small BTF blobs for tests.

/// BTF being put together; each method that adds a type returns its number.
pub(crate) struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

/// A member: name, type, offset in bits (with the width of a bit field in the high byte where the kind flag is set).
pub(crate) type MemberSpec<'a> = (&'a str, u32, u32);

pub(crate) const STRUCT: u32 = 4;
pub(crate) const UNION: u32 = 5;
pub(crate) const TYPEDEF: u32 = 8;
pub(crate) const VOLATILE: u32 = 9;
/// Set in a kind: the kind flag.
pub(crate) const KIND_FLAG: u32 = 0x80;

impl Builder {
    pub fn new() -> Self {
        Self {
            types: Vec::new(),
            strings: vec![0],
            count: 0,
        }
    }

    fn string(&mut self, text: &str) -> u32 {
        if text.is_empty() {
            return 0;
        }
        let at = self.strings.len();
        self.strings.extend_from_slice(text.as_bytes());
        self.strings.push(0);
        at as u32
    }

    /// A record of any kind with the words that follow it.
    pub fn raw(&mut self, name: &str, kind: u32, elements: u32, size_or_type: u32, extra: &[u32]) -> u32 {
        let name = self.string(name);
        for word in [name, (kind << 24) | elements, size_or_type].iter().chain(extra) {
            self.types.extend_from_slice(&word.to_le_bytes());
        }
        self.count += 1;
        self.count
    }

    pub fn int(&mut self, name: &str, bytes: u32) -> u32 {
        self.raw(name, 1, 0, bytes, &[bytes * 8])
    }

    pub fn pointer(&mut self, to: u32) -> u32 {
        self.raw("", 2, 0, to, &[])
    }

    pub fn array(&mut self, element: u32, number: u32) -> u32 {
        self.raw("", 3, 0, 0, &[element, 1, number])
    }

    pub fn alias(&mut self, name: &str, kind: u32, of: u32) -> u32 {
        self.raw(name, kind, 0, of, &[])
    }

    /// A struct or union of `bytes` bytes.
    pub fn composite(&mut self, name: &str, kind: u32, bytes: u32, members: &[MemberSpec<'_>]) -> u32 {
        let mut extra = Vec::new();
        for &(name, id, offset) in members {
            extra.extend([self.string(name), id, offset]);
        }
        self.raw(name, kind, members.len() as u32, bytes, &extra)
    }

    pub fn enumeration(&mut self, name: &str, signed: bool, values: &[(&str, u32)]) -> u32 {
        let mut extra = Vec::new();
        for &(name, value) in values {
            extra.extend([self.string(name), value]);
        }
        let kind = if signed { 6 | KIND_FLAG } else { 6 };
        self.raw(name, kind, values.len() as u32, 4, &extra)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let (types, strings) = (self.types.len() as u32, self.strings.len() as u32);
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        for word in [24, 0, types, types, strings] {
            blob.extend_from_slice(&u32::to_le_bytes(word));
        }
        blob.extend_from_slice(&self.types);
        blob.extend_from_slice(&self.strings);
        blob
    }
}
