//! Packets: `$body#checksum`.

use super::error::StubError;

/// Longest packet that QEMU accepts, in bytes of body and framing (`MAX_PACKET_LENGTH`; 7.2 and 10.0). It drops longer ones.
pub const PACKET_BYTES_MAX: usize = 4096;

/// Longest reply that is accepted, in bytes. QEMU's own limit is twice its packet length, for escapes.
const REPLY_BYTES_MAX: usize = 4 * PACKET_BYTES_MAX;

/// Appends a packet to `out`. `body` must not need escapes: ours are letters, digits and `,:;.-`.
pub fn frame(body: &str, out: &mut Vec<u8>) {
    let sum = body.bytes().fold(0_u8, u8::wrapping_add);
    out.extend_from_slice(format!("${body}#{sum:02x}").as_bytes());
}

/// Splits received bytes into packets.
#[derive(Debug, Default)]
pub struct Receiver {
    bytes: Vec<u8>,
}

impl Receiver {
    /// Adds received bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The body of the next complete packet, without escapes; `None` if more bytes are needed. Acknowledgements and other bytes between packets are
    /// skipped.
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, StubError> {
        let Some(start) = self.bytes.iter().position(|&byte| byte == b'$') else {
            self.bytes.clear();
            return Ok(None);
        };
        self.bytes.drain(..start);
        let end = self.bytes.iter().position(|&byte| byte == b'#');
        let Some((body, sum)) = end.and_then(|end| Some((self.bytes.get(1..end)?, self.bytes.get(end + 1..end + 3)?)))
        else {
            let too_long = self.bytes.len() > REPLY_BYTES_MAX;
            return if too_long {
                Err(StubError::bad_reply("an end of packet", &self.bytes))
            } else {
                Ok(None)
            };
        };
        let expected = body.iter().copied().fold(0_u8, u8::wrapping_add);
        let found = std::str::from_utf8(sum)
            .ok()
            .and_then(|sum| u8::from_str_radix(sum, 16).ok());
        if found != Some(expected) {
            return Err(StubError::bad_reply("a packet with a right checksum", &self.bytes));
        }
        let packet_bytes = body.len() + 4;
        let body = unescape(body);
        self.bytes.drain(..packet_bytes);
        Ok(Some(body))
    }
}

/// Resolves escapes: `}x` means `x ^ 0x20`.
fn unescape(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(body.len());
    let mut bytes = body.iter();
    while let Some(&byte) = bytes.next() {
        if byte == b'}' {
            out.extend(bytes.next().map(|escaped| escaped ^ 0x20));
        } else {
            out.push(byte);
        }
    }
    out
}

/// Appends `bytes` in hexadecimal.
pub fn to_hex(bytes: &[u8], out: &mut String) {
    const DIGITS: [char; 16] = [
        '0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f',
    ];
    let digit = |nibble: u8| DIGITS.get(usize::from(nibble)).copied().unwrap_or('0');
    for byte in bytes {
        out.push(digit(byte >> 4));
        out.push(digit(byte & 15));
    }
}

/// Decodes hexadecimal bytes; `None` for any other text, as a refusal (`E14`).
pub fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let nibble = |digit: &u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let pairs = text.chunks(2).map(|pair| match pair {
        [high, low] => Some(nibble(high)? << 4 | nibble(low)?),
        _ => None,
    });
    pairs.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(bytes: &[u8]) -> Receiver {
        let mut receiver = Receiver::default();
        receiver.push(bytes);
        receiver
    }

    #[test]
    fn a_packet_carries_its_checksum() {
        let mut out = Vec::new();
        frame("M1000,4:deadbeef", &mut out);
        frame("c", &mut out);
        assert_eq!(out, b"$M1000,4:deadbeef#c8$c#63");
    }

    #[test]
    fn replies_are_cut_out_of_acknowledgements_wherever_the_reads_fall() {
        let mut receiver = received(b"+$T02thread:01;#04+$OK#9a+$m0");
        assert_eq!(receiver.next().unwrap().unwrap(), b"T02thread:01;");
        assert_eq!(receiver.next().unwrap().unwrap(), b"OK");
        assert_eq!(receiver.next().unwrap(), None);
        receiver.push(b"1#c");
        assert_eq!(receiver.next().unwrap(), None);
        receiver.push(b"e+");
        assert_eq!(receiver.next().unwrap().unwrap(), b"m01");
        assert_eq!(receiver.next().unwrap(), None);
    }

    #[test]
    fn escapes_are_resolved() {
        assert_eq!(unescape(b"a}\x03b}\x5d"), b"a#b}");
        assert_eq!(unescape(b"a}"), b"a");
    }

    #[test]
    fn a_wrong_checksum_and_a_reply_without_end_are_refused() {
        assert!(received(b"$OK#9b").next().is_err());
        assert!(received(b"$OK#zz").next().is_err());
        let mut endless = received(b"$");
        endless.push(&[b'a'; REPLY_BYTES_MAX]);
        assert!(endless.next().is_err());
    }

    #[test]
    fn hex_goes_both_ways_and_a_refusal_is_no_hex() {
        let mut text = String::new();
        to_hex(&[0x00, 0xcc, 0x5a], &mut text);
        assert_eq!(text, "00cc5a");
        assert_eq!(from_hex(b"00cc5a").unwrap(), [0x00, 0xcc, 0x5a]);
        for bad in [&b"E14"[..], b"0", b"+1", b"0G"] {
            assert_eq!(from_hex(bad), None);
        }
    }
}
