//! A connection to the stub: stops the guest, reads registers, reads and writes guest-physical memory, and resumes.

use super::error::StubError;
use super::exchange::Exchange;
use super::layout::{self, Layout};
use super::packet;
use guest_core::Gpa;
use guest_core::Registers;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes of guest memory in one `M` or `m` packet. With two digits each, and the address, they are below QEMU's limit.
const MEMORY_BYTES_PER_PACKET: usize = (packet::PACKET_BYTES_MAX - 64) / 2;

/// Bytes of a description file in one request: the most that QEMU 7.2 and 10.0 give.
const FEATURE_CHUNK_BYTES: usize = (packet::PACKET_BYTES_MAX - 5) / 2;

/// Most chunks of a description file. QEMU's has four.
const FEATURE_CHUNKS_MAX: usize = 64;

/// The file that `target.xml` of QEMU 7.2 and 10.0 includes. It is requested together with `target.xml`.
const USUAL_FEATURE: &str = "i386-64bit.xml";

/// Number of its chunks in QEMU 7.2 and 10.0.
const USUAL_FEATURE_CHUNKS: usize = 4;

/// The registers of a stopped guest.
#[derive(Debug)]
pub struct Stopped {
    /// Registers of each vCPU, in the order of the request.
    pub vcpus: Vec<Registers>,
    /// Time of the stub's first reply. The guest had stopped by then.
    pub stopped_at: Instant,
}

/// A connection to a stub, in physical memory mode once [`Connection::stop`] succeeded.
#[derive(Debug)]
pub struct Connection {
    exchange: Exchange,
}

impl Connection {
    /// Connects. The guest stops as soon as QEMU accepts; [`Connection::stop`] waits for that. Each later exchange may take `reply_timeout`.
    pub fn open(path: &Path, reply_timeout: Duration) -> io::Result<Self> {
        Ok(Self {
            exchange: Exchange::open(path, reply_timeout)?,
        })
    }

    /// False after a failed exchange: the connection cannot be used any more.
    pub fn is_in_step(&self) -> bool {
        self.exchange.is_in_step()
    }

    /// Waits until the guest has stopped, and reads the registers of all vCPUs, given by their thread numbers (index
    /// plus one). Fetches the register layout in the same exchange if it is not known yet.
    pub fn stop(&mut self, threads: &[u64], known: &mut Option<Layout>) -> Result<Stopped, StubError> {
        let mut bodies = vec![String::from("Qqemu.PhyMemMode:1"), String::from("qfThreadInfo")];
        bodies.extend(threads.iter().map(|_| String::from("qsThreadInfo")));
        for thread in threads {
            bodies.extend([format!("Hg{thread:x}"), String::from("g")]);
        }
        if known.is_none() {
            bodies.push(feature_request("target.xml", 0));
            bodies.extend((0..USUAL_FEATURE_CHUNKS).map(|chunk| feature_request(USUAL_FEATURE, chunk)));
        }
        let replies = self.exchange.send(&bodies)?;
        let stopped_at = replies.first_at;
        let mut replies = replies.bodies.into_iter();
        let mut next = || replies.next().unwrap_or_default();
        expect_ok(&next())?;
        let listed: Vec<Vec<u8>> = std::iter::repeat_with(&mut next).take(threads.len() + 1).collect();
        check_threads(threads, &listed)?;
        let mut dumps = Vec::new();
        for _ in threads {
            expect_ok(&next())?;
            let dump = next();
            dumps.push(packet::from_hex(&dump).ok_or_else(|| StubError::bad_reply("registers", &dump))?);
        }
        let layout = match known {
            Some(layout) => layout,
            None => {
                let target = next();
                let usual: Vec<Vec<u8>> = std::iter::repeat_with(next).take(USUAL_FEATURE_CHUNKS).collect();
                known.insert(self.layout(&target, &usual)?)
            }
        };
        let vcpus = dumps.iter().map(|dump| layout.decode(dump)).collect::<Result<_, _>>()?;
        Ok(Stopped { vcpus, stopped_at })
    }

    /// Builds the layout from the first chunk of `target.xml`, and from the usual file's chunks if `target.xml` includes that file.
    fn layout(&mut self, target: &[u8], usual: &[Vec<u8>]) -> Result<Layout, StubError> {
        let target = match join_chunks(&[target.to_vec()]) {
            Some(whole) => whole,
            None => self.feature("target.xml")?,
        };
        let files = layout::includes(&target)?;
        let mut features = Vec::new();
        for file in &files {
            let usual = if file == USUAL_FEATURE {
                join_chunks(usual)
            } else {
                None
            };
            features.push(match usual {
                Some(whole) => whole,
                None => self.feature(file)?,
            });
        }
        Ok(Layout::parse(&features)?)
    }

    /// Fetches a description file chunk by chunk.
    fn feature(&mut self, file: &str) -> Result<String, StubError> {
        let mut chunks = Vec::new();
        for chunk in 0..FEATURE_CHUNKS_MAX {
            chunks.extend(self.exchange.send(&[feature_request(file, chunk)])?.bodies);
            if let Some(whole) = join_chunks(&chunks) {
                return Ok(whole);
            }
        }
        Err(StubError::bad_reply(
            "an end of its register description",
            chunks.last().map_or(&[], Vec::as_slice),
        ))
    }

    /// Writes guest-physical memory. The caller has checked that all of it is RAM.
    ///
    /// # Errors
    ///
    /// The exchange failed. Some of the bytes may be written.
    pub fn write(&mut self, writes: &[(Gpa, &[u8])]) -> Result<(), StubError> {
        let mut bodies = Vec::new();
        for (at, bytes) in writes {
            for (gpa, chunk) in chunks(*at, bytes.chunks(MEMORY_BYTES_PER_PACKET)) {
                let mut body = format!("M{gpa:x},{:x}:", chunk.len());
                packet::to_hex(chunk, &mut body);
                bodies.push(body);
            }
        }
        let replies = self.exchange.send(&bodies)?;
        replies.bodies.iter().try_for_each(|reply| expect_ok(reply))
    }

    /// Reads guest-physical memory.
    pub fn read(&mut self, at: Gpa, buf: &mut [u8]) -> Result<(), StubError> {
        let sizes = chunks(at, buf.chunks(MEMORY_BYTES_PER_PACKET));
        let bodies: Vec<String> = sizes
            .map(|(gpa, chunk)| format!("m{gpa:x},{:x}", chunk.len()))
            .collect();
        let replies = self.exchange.send(&bodies)?.bodies;
        for (chunk, reply) in buf.chunks_mut(MEMORY_BYTES_PER_PACKET).zip(replies) {
            let bytes = packet::from_hex(&reply).filter(|bytes| bytes.len() == chunk.len());
            chunk.copy_from_slice(&bytes.ok_or_else(|| StubError::bad_reply("memory", &reply))?);
        }
        Ok(())
    }

    /// Leaves physical memory mode and detaches, which resumes the guest: it runs when the reply comes. Anything sent afterwards would stop the guest
    /// again.
    pub fn resume(&mut self) -> Result<(), StubError> {
        // All vCPUs of a PC have this process number. It is required after any debugger has asked for process numbers.
        let bodies = [String::from("Qqemu.PhyMemMode:0"), String::from("D;1")];
        let replies = self.exchange.send(&bodies)?;
        replies.bodies.iter().try_for_each(|reply| expect_ok(reply))
    }

    /// Leaves physical memory mode. The guest stays stopped.
    pub fn leave_stopped(&mut self) -> Result<(), StubError> {
        self.exchange.send(&[String::from("Qqemu.PhyMemMode:0")]).map(drop)
    }
}

/// Addresses of consecutive fragments. They saturate at the end of the address space, where there is no RAM.
fn chunks<'a>(at: Gpa, pieces: impl Iterator<Item = &'a [u8]>) -> impl Iterator<Item = (u64, &'a [u8])> {
    pieces.scan(at.0, |next, piece| {
        let gpa = *next;
        *next = gpa.saturating_add(u64::try_from(piece.len()).unwrap_or(u64::MAX));
        Some((gpa, piece))
    })
}

fn feature_request(file: &str, chunk: usize) -> String {
    format!(
        "qXfer:features:read:{file}:{:x},{FEATURE_CHUNK_BYTES:x}",
        chunk.saturating_mul(FEATURE_CHUNK_BYTES)
    )
}

/// Joins the chunks of a file (`m` before each chunk but the last, `l` before the last); `None` if some are missing.
fn join_chunks(chunks: &[Vec<u8>]) -> Option<String> {
    let mut whole = Vec::new();
    for chunk in chunks {
        match chunk.split_first()? {
            (b'l', last) => {
                whole.extend_from_slice(last);
                return String::from_utf8(whole).ok();
            }
            (b'm', more) if more.len() == FEATURE_CHUNK_BYTES => whole.extend_from_slice(more),
            _ => return None,
        }
    }
    None
}

fn expect_ok(reply: &[u8]) -> Result<(), StubError> {
    if reply == b"OK" {
        Ok(())
    } else {
        Err(StubError::bad_reply("OK", reply))
    }
}

/// The vCPUs in the replies to `qfThreadInfo` and `qsThreadInfo`. Each reply names one vCPU (`m01`, or `mp01.01` after a debugger has asked for
/// process numbers); the last one is `l`.
fn check_threads(expected: &[u64], replies: &[Vec<u8>]) -> Result<(), StubError> {
    let number = |reply: &Vec<u8>| {
        let text = std::str::from_utf8(reply).ok()?.strip_prefix('m')?;
        let thread = text.rsplit_once('.').map_or(text, |(_, thread)| thread);
        u64::from_str_radix(thread, 16).ok()
    };
    let mut found: Vec<u64> = replies.iter().filter_map(number).collect();
    let mut wanted = expected.to_vec();
    found.sort_unstable();
    wanted.sort_unstable();
    let ended = replies.last().is_some_and(|reply| reply == b"l");
    if ended && found == wanted {
        Ok(())
    } else {
        Err(StubError::Vcpus {
            expected: wanted,
            found,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thread_lists_with_and_without_process_numbers_are_compared() {
        let replies = |list: &[&str]| list.iter().map(|reply| reply.as_bytes().to_vec()).collect::<Vec<_>>();
        assert!(check_threads(&[1, 16], &replies(&["m01", "m10", "l"])).is_ok());
        assert!(check_threads(&[2, 1], &replies(&["mp01.01", "mp01.02", "l"])).is_ok());
        for other in [
            &["m01", "m02", "m03"][..],
            &["m01", "l", "E22"],
            &["m01", "m03", "l"],
            &[],
        ] {
            assert!(
                matches!(check_threads(&[1, 2], &replies(other)), Err(StubError::Vcpus { .. })),
                "{other:?}"
            );
        }
    }

    #[test]
    fn a_file_is_whole_only_with_its_last_chunk_and_none_missing() {
        let full = [b"m".to_vec(), vec![b'x'; FEATURE_CHUNK_BYTES]].concat();
        assert_eq!(
            join_chunks(&[full.clone(), b"lyz".to_vec()]).unwrap().len(),
            FEATURE_CHUNK_BYTES + 2
        );
        assert_eq!(join_chunks(&[b"l<a/>".to_vec(), b"E00".to_vec()]).unwrap(), "<a/>");
        assert_eq!(join_chunks(&[full]), None);
        assert_eq!(join_chunks(&[b"mshort".to_vec(), b"l".to_vec()]), None);
        assert_eq!(join_chunks(&[b"E00".to_vec()]), None);
    }

    #[test]
    fn long_writes_are_cut_at_consecutive_addresses() {
        let pieces: Vec<_> = chunks(Gpa(0x1000), [0_u8; 5].chunks(2))
            .map(|(gpa, piece)| (gpa, piece.len()))
            .collect();
        assert_eq!(pieces, [(0x1000, 2), (0x1002, 2), (0x1004, 1)]);
    }
}
