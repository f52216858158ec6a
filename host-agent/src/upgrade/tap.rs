//! Tap devices that two processes hold. A QEMU that begins sets the length of the header before each packet to what it needs at
//! first (`net/tap.c`, `net_tap_fd_init`, QEMU 7.2 to 10.0): on the device that the old process still uses, where the guest's driver
//! has chosen another one, and which understands no packet from then on. So it is set back, as often as it takes.

use super::descriptor;
use nix::libc::c_int;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Between two looks while the new process begins: a packet or two are lost at the most.
const POLL: Duration = Duration::from_micros(500);

// `include/uapi/linux/if_tun.h`, Linux 2.6.32.
nix::ioctl_read!(get_header_len, b'T', 215, c_int);
nix::ioctl_write_ptr!(set_header_len, b'T', 216, c_int);

/// The old process's tap devices, and how it uses them.
#[derive(Debug, Default)]
pub(super) struct Taps(Vec<Tap>);

#[derive(Debug)]
struct Tap {
    /// The old process's number for it.
    number: RawFd,
    device: OwnedFd,
    header_len: c_int,
}

impl Taps {
    /// Of the process `pid`, as they are now, among those descriptors.
    pub(super) fn of(pid: i32, descriptors: &[RawFd]) -> io::Result<Self> {
        let copies = descriptor::copies(pid, descriptors)?;
        let taps = copies.into_iter().filter_map(|(number, device)| {
            // What has no such header is no tap device.
            let header_len = header_len(&device).ok()?;
            Some(Tap {
                number,
                device,
                header_len,
            })
        });
        Ok(Self(taps.collect()))
    }

    /// Of the process `pid`, as [`Taps::spell`] told them.
    pub(super) fn spelled(pid: i32, text: &str) -> io::Result<Self> {
        let known = parse(text);
        let numbers: Vec<RawFd> = known.iter().map(|(number, _)| *number).collect();
        let copies = descriptor::copies(pid, &numbers)?;
        let taps = copies.into_iter().zip(known);
        let tap = |((number, device), (_, header_len))| Tap {
            number,
            device,
            header_len,
        };
        Ok(Self(taps.map(tap).collect()))
    }

    /// For another vmpatch: `31=12,32=12`.
    pub(super) fn spell(&self) -> String {
        let taps = self.0.iter().map(|tap| format!("{}={}", tap.number, tap.header_len));
        taps.collect::<Vec<_>>().join(",")
    }

    /// Sets them to what the old process needs, where they are not.
    pub(super) fn set_back(&self) {
        for tap in &self.0 {
            if header_len(&tap.device).is_ok_and(|found| found != tap.header_len) {
                // SAFETY: the call reads one number, and the device is open.
                let _ = unsafe { set_header_len(tap.device.as_raw_fd(), &raw const tap.header_len) };
            }
        }
    }

    /// Does `work` while a process begins, and keeps them so.
    pub(super) fn kept<T>(&self, work: impl FnOnce() -> T) -> T {
        if self.0.is_empty() {
            return work();
        }
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    self.set_back();
                    thread::sleep(POLL);
                }
            });
            // also where `work` panics: the scope waits for its thread
            let over = Over(&over);
            let result = work();
            drop(over);
            self.set_back();
            result
        })
    }
}

/// Sets what it holds when it is dropped.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn header_len(device: &OwnedFd) -> io::Result<c_int> {
    let mut len = 0;
    // SAFETY: the call writes one number, to where there is room for it, and the device is open.
    unsafe { get_header_len(device.as_raw_fd(), &raw mut len) }?;
    Ok(len)
}

fn parse(text: &str) -> Vec<(RawFd, c_int)> {
    let pair = |pair: &str| {
        let (number, len) = pair.split_once('=')?;
        Some((number.parse().ok()?, len.parse().ok()?))
    };
    text.split(',').filter_map(pair).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_to_another_vmpatch_is_understood() {
        assert_eq!(parse("31=12,32=10"), [(31, 12), (32, 10)]);
        assert_eq!(parse(""), []);
        assert_eq!(parse("x=1,7"), []);
    }

    #[test]
    fn a_descriptor_that_is_no_tap_device_is_left_alone() {
        let taps = Taps::of(i32::try_from(std::process::id()).unwrap(), &[0]).unwrap();
        assert_eq!(taps.spell(), "");
        assert_eq!(taps.kept(|| 7), 7);
    }
}
