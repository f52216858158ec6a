//! Guest RAM that counts what is read, and that can be forked in no time: tests spoil a copy each.

use guest_core::{Gpa, MemoryError, PhysMemory};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

const PAGE: u64 = 4096;

/// What goes wrong with a write, so many writes from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// That one fails; those behind it succeed.
    Once(u64),
    /// That one and the next one fail.
    Twice(u64),
    /// That one and all behind it fail, as if the writer had died.
    Death(u64),
    /// The same, and half of that one is written.
    TornDeath(u64),
    /// Each fails with that chance in 256, some of them halfway; the first word is the seed.
    Random(u64, u64),
    /// The process that writes is killed there: see [`until_killed`].
    Kill(u64),
}

/// What unwinds from where a process is killed.
struct Killed;

/// Runs `process` up to its end or to a [`Fault::Kill`]. Gives none where it was killed.
pub fn until_killed<T>(process: impl FnOnce() -> T) -> Option<T> {
    match catch_unwind(AssertUnwindSafe(process)) {
        Ok(done) => Some(done),
        Err(payload) if payload.is::<Killed>() => None,
        Err(payload) => resume_unwind(payload),
    }
}

/// RAM from guest-physical 0 on. Copies share what neither has written.
#[derive(Clone)]
pub struct Ram {
    base: Arc<Vec<u8>>,
    written: RefCell<BTreeMap<u64, Box<[u8; PAGE as usize]>>>,
    ranges: Vec<Range<Gpa>>,
    reads: Cell<u64>,
    bytes_read: Cell<u64>,
    largest_read: Cell<usize>,
    fault: Cell<Option<Fault>>,
}

impl Ram {
    /// RAM that holds `bytes`; the length is rounded up to whole pages.
    pub fn new(mut bytes: Vec<u8>) -> Self {
        bytes.resize(bytes.len().next_multiple_of(PAGE as usize), 0);
        let ranges = vec![Gpa(0)..Gpa(bytes.len() as u64)];
        Self {
            base: Arc::new(bytes),
            written: RefCell::default(),
            ranges,
            reads: Cell::new(0),
            bytes_read: Cell::new(0),
            largest_read: Cell::new(0),
            fault: Cell::new(None),
        }
    }

    /// Reads so far, and the bytes that they gave.
    pub fn counted(&self) -> (u64, u64) {
        (self.reads.get(), self.bytes_read.get())
    }

    /// Bytes of the largest read: no buffer that memory was asked to fill was bigger.
    pub fn largest_read(&self) -> usize {
        self.largest_read.get()
    }

    /// Starts counting anew.
    pub fn count_from_here(&self) {
        self.reads.set(0);
        self.bytes_read.set(0);
        self.largest_read.set(0);
    }

    /// Takes what was written so far as the state that [`Ram::differences`] compares with.
    pub fn take_baseline(&mut self) {
        let mut bytes = self.base.as_ref().clone();
        for (page, copy) in std::mem::take(&mut *self.written.borrow_mut()) {
            bytes[span(page)].copy_from_slice(&copy[..]);
        }
        self.base = Arc::new(bytes);
    }

    /// Lets so many more writes succeed before the fault; `None` takes it away.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.fault.set(fault);
    }

    /// The fault that is still to come.
    pub fn fault(&self) -> Option<Fault> {
        self.fault.get()
    }

    /// Counts a step that is no write. As a write, it may fail, or the process may be killed there.
    pub fn step(&self) -> Result<(), MemoryError> {
        match self.fault.get() {
            Some(Fault::Once(0)) => {
                self.fault.set(None);
                return Err(failed(Gpa(0), &[]));
            }
            Some(Fault::Twice(0)) => {
                self.fault.set(Some(Fault::Once(0)));
                return Err(failed(Gpa(0), &[]));
            }
            Some(Fault::Kill(0)) => resume_unwind(Box::new(Killed)),
            Some(Fault::Once(left)) => self.fault.set(Some(Fault::Once(left - 1))),
            Some(Fault::Twice(left)) => self.fault.set(Some(Fault::Twice(left - 1))),
            Some(Fault::Kill(left)) => self.fault.set(Some(Fault::Kill(left - 1))),
            _ => {}
        }
        Ok(())
    }

    /// All bytes as they are now, by page: only those that were written.
    pub fn differences(&self) -> Vec<(u64, Vec<u8>)> {
        let written = self.written.borrow();
        let pages = written
            .iter()
            .filter(|(page, bytes)| bytes[..] != self.base[span(**page)]);
        pages.map(|(page, bytes)| (*page * PAGE, bytes.to_vec())).collect()
    }

    /// Stores bytes at a guest-physical address; panics outside of RAM.
    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.each_page(Gpa(at), bytes.len(), |page, inside, part| {
            let mut written = self.written.borrow_mut();
            let copy = written
                .entry(page)
                .or_insert_with(|| Box::new(self.base[span(page)].try_into().unwrap()));
            copy[inside].copy_from_slice(&bytes[part]);
        })
        .unwrap();
    }

    /// Stores a little-endian u64.
    pub fn put_u64(&self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// The little-endian u64 there; not counted.
    pub fn u64_at(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.copy(Gpa(at), &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn copy(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        let written = self.written.borrow();
        self.each_page(at, buf.len(), |page, inside, part| {
            let source = written.get(&page).map_or(&self.base[span(page)], |copy| &copy[..]);
            buf[part].copy_from_slice(&source[inside]);
        })
    }

    /// Calls `f` with each page's number, the range in it, and the range in the buffer.
    fn each_page(
        &self,
        at: Gpa,
        len: usize,
        mut f: impl FnMut(u64, Range<usize>, Range<usize>),
    ) -> Result<(), MemoryError> {
        let end =
            at.0.checked_add(len as u64)
                .filter(|end| *end <= self.base.len() as u64);
        let end = end.ok_or(MemoryError::NotRam { at, len })?;
        let mut from = at.0;
        while from < end {
            let to = end.min((from / PAGE + 1) * PAGE);
            let inside = (from % PAGE) as usize;
            let done = (from - at.0) as usize;
            let part = (to - from) as usize;
            f(from / PAGE, inside..inside + part, done..done + part);
            from = to;
        }
        Ok(())
    }
}

/// The next number of a sequence (xorshift64).
fn next(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
}

fn failed(at: Gpa, bytes: &[u8]) -> MemoryError {
    let cause = "a fault of the test's".to_owned();
    MemoryError::Host {
        at,
        len: bytes.len(),
        cause,
    }
}

fn span(page: u64) -> Range<usize> {
    (page * PAGE) as usize..((page + 1) * PAGE) as usize
}

impl PhysMemory for Ram {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.reads.set(self.reads.get() + 1);
        self.bytes_read.set(self.bytes_read.get() + buf.len() as u64);
        self.largest_read.set(self.largest_read.get().max(buf.len()));
        self.copy(at, buf)
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        match self.fault.get() {
            Some(Fault::Once(_) | Fault::Twice(_) | Fault::Kill(_)) => self.step()?,
            Some(Fault::Death(0)) => return Err(failed(at, bytes)),
            Some(Fault::TornDeath(0)) => {
                self.fault.set(Some(Fault::Death(0)));
                self.put(at.0, &bytes[..bytes.len() / 2]);
                return Err(failed(at, bytes));
            }
            Some(Fault::Random(state, chance)) => {
                let state = next(state);
                self.fault.set(Some(Fault::Random(state, chance)));
                if state >> 8 & 0xff < chance {
                    let written = bytes.len() * (state >> 16 & 3) as usize / 4;
                    self.put(at.0, &bytes[..written]);
                    return Err(failed(at, bytes));
                }
            }
            Some(Fault::Death(left)) => self.fault.set(Some(Fault::Death(left - 1))),
            Some(Fault::TornDeath(left)) => self.fault.set(Some(Fault::TornDeath(left - 1))),
            None => {}
        }
        self.copy(at, &mut vec![0; bytes.len()])?;
        self.put(at.0, bytes);
        Ok(())
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &self.ranges
    }
}
