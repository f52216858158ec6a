//! A process's memory, read and written by system calls, whether the process is stopped or not.

use nix::errno::Errno;
use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;
use std::io::{IoSlice, IoSliceMut};

/// A process's memory. A missing page is an error, not a signal.
#[derive(Debug, Clone, Copy)]
pub struct Memory(Pid);

/// A range of a process's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Its first byte, an address of that process.
    pub at: u64,
    /// Bytes.
    pub len: usize,
}

impl Memory {
    /// Ranges that one system call takes: `UIO_MAXIOV` (include/uapi/linux/uio.h).
    pub const SPANS_MAX: usize = 1024;

    /// The memory of process `pid`. It need not exist.
    pub fn of(pid: i32) -> Self {
        Self(Pid::from_raw(pid))
    }

    /// Fills the buffer from `at` on.
    ///
    /// # Errors
    ///
    /// `EFAULT`: some of it is not there. `ESRCH`: the process ended. `EPERM`: the host forbids it.
    pub fn read(self, at: u64, buf: &mut [u8]) -> nix::Result<()> {
        let span = Span { at, len: buf.len() };
        self.read_all([span], buf)
    }

    /// Reads at most [`Memory::SPANS_MAX`] ranges into consecutive parts of the buffer, with one system call.
    ///
    /// # Errors
    ///
    /// As for [`Memory::read`].
    pub fn read_all(self, spans: impl IntoIterator<Item = Span>, buf: &mut [u8]) -> nix::Result<()> {
        let remote = spans.into_iter().map(remote).collect::<nix::Result<Vec<_>>>()?;
        let len = buf.len();
        all(process_vm_readv(self.0, &mut [IoSliceMut::new(buf)], &remote)?, len)
    }

    /// Writes the bytes from `at` on. Pages that the process itself may not write are an error.
    ///
    /// # Errors
    ///
    /// As for [`Memory::read`]; the first of them may have been written.
    pub fn write(self, at: u64, bytes: &[u8]) -> nix::Result<()> {
        self.write_all(&[(at, bytes)])
    }

    /// Writes at most [`Memory::SPANS_MAX`] ranges, by their first address, in this order and with one system call. Should this process be
    /// killed meanwhile, the first of them are written, and none in part (`process_vm_rw_core()`, mm/process_vm_access.c, Linux 6.12: the
    /// kernel looks for a signal where it begins with a range, or with a page of one).
    ///
    /// # Errors
    ///
    /// As for [`Memory::read`]; the first of them may have been written.
    pub fn write_all(self, writes: &[(u64, &[u8])]) -> nix::Result<()> {
        let spans = writes.iter().map(|(at, bytes)| Span {
            at: *at,
            len: bytes.len(),
        });
        let remote = spans.map(remote).collect::<nix::Result<Vec<_>>>()?;
        let local: Vec<_> = writes.iter().map(|(_, bytes)| IoSlice::new(bytes)).collect();
        let len = writes.iter().map(|(_, bytes)| bytes.len()).sum();
        all(process_vm_writev(self.0, &local, &remote)?, len)
    }
}

fn remote(span: Span) -> nix::Result<RemoteIoVec> {
    let base = usize::try_from(span.at).map_err(|_| Errno::EFAULT)?;
    Ok(RemoteIoVec { base, len: span.len })
}

/// A transfer ends early at the first missing page (`process_vm_readv(2)`).
fn all(done: usize, len: usize) -> nix::Result<()> {
    if done == len { Ok(()) } else { Err(Errno::EFAULT) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> Memory {
        Memory(Pid::this())
    }

    #[test]
    fn ranges_are_read_in_their_order_and_a_range_is_written() {
        let mut bytes = [1u8, 2, 3, 4, 5, 6, 7, 8];
        let at = bytes.as_mut_ptr() as u64;
        own().write(at + 6, &[9, 10]).unwrap();
        let mut read = [0; 3];
        let spans = [Span { at: at + 5, len: 2 }, Span { at, len: 1 }];
        own().read_all(spans, &mut read).unwrap();
        assert_eq!(read, [6, 9, 1]);
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 9, 10]);
    }

    #[test]
    fn several_ranges_are_written_up_to_one_that_is_missing() {
        let mut bytes = [1u8, 2, 3, 4];
        let at = bytes.as_mut_ptr() as u64;
        own().write_all(&[(at + 3, &[7]), (at, &[8, 9])]).unwrap();
        assert_eq!(bytes, [8, 9, 3, 7]);
        let partly: [(u64, &[u8]); 3] = [(at, &[1]), (0x1000, &[2]), (at + 1, &[3])];
        assert_eq!(own().write_all(&partly), Err(Errno::EFAULT));
        assert_eq!(bytes, [1, 9, 3, 7]);
    }

    #[test]
    fn a_page_that_is_missing_is_an_error() {
        assert_eq!(own().read(0x1000, &mut [0]), Err(Errno::EFAULT));
        assert_eq!(own().write(0x1000, &[0]), Err(Errno::EFAULT));
    }
}
