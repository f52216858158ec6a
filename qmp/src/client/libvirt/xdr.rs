//! The External Data Representation (RFC 4506), as far as libvirt's RPC needs it: big-endian words, and bytes filled up to whole words.

/// Bytes of a word.
const WORD: usize = 4;

/// Builds a message.
#[derive(Debug, Default)]
pub struct Encoder(Vec<u8>);

impl Encoder {
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// Bytes whose number both sides know.
    pub fn fixed(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self.0.resize(self.0.len().next_multiple_of(WORD), 0);
        self
    }

    /// A text with its length. One that is longer than a word can tell does not exist.
    pub fn text(self, text: &str) -> Self {
        let len = u32::try_from(text.len()).unwrap_or(u32::MAX);
        self.u32(len).fixed(text.as_bytes())
    }

    pub fn bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Reads a message. Each method is `None` where the message is too short.
#[derive(Debug, Clone, Copy)]
pub struct Decoder<'a>(&'a [u8]);

impl<'a> Decoder<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u32::from_be_bytes(*word))
    }

    /// Bytes whose number both sides know.
    pub fn fixed(&mut self, len: usize) -> Option<&'a [u8]> {
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest.get(len.next_multiple_of(WORD) - len..)?;
        Some(bytes)
    }

    /// A text with its length.
    pub fn text(&mut self) -> Option<&'a str> {
        let len = usize::try_from(self.u32()?).ok()?;
        // Padding must not overflow.
        let bytes = self.0.get(..len).and(self.fixed(len))?;
        std::str::from_utf8(bytes).ok()
    }

    /// A text that may be absent, which the inner `None` means.
    pub fn optional_text(&mut self) -> Option<Option<&'a str>> {
        match self.u32()? {
            0 => Some(None),
            1 => self.text().map(Some),
            _ => None,
        }
    }

    pub fn rest(self) -> &'a [u8] {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_filled_up_to_whole_words() {
        let bytes = Encoder::default().text("vm42x").u32(7).bytes();
        assert_eq!(bytes, b"\0\0\0\x05vm42x\0\0\0\0\0\0\x07");
        let mut decoder = Decoder::new(&bytes);
        assert_eq!(
            (decoder.text(), decoder.u32(), decoder.u32()),
            (Some("vm42x"), Some(7), None)
        );
        assert_eq!(Encoder::default().text("vm42").bytes(), b"\0\0\0\x04vm42");
    }

    #[test]
    fn what_is_cut_off_or_too_long_is_nothing() {
        assert_eq!(Decoder::new(b"\0\0\0\x05vm42x\0\0").text(), None);
        assert_eq!(Decoder::new(b"\xff\xff\xff\xffvm42").text(), None);
        assert_eq!(Decoder::new(b"\0\0\0\x04\xff\xff\xff\xff").text(), None);
        assert_eq!(Decoder::new(b"\0\0\0").u32(), None);
        assert_eq!(Decoder::new(b"\0\0\0\0").optional_text(), Some(None));
        assert_eq!(Decoder::new(b"\0\0\0\x02\0\0\0\0").optional_text(), None);
    }
}
