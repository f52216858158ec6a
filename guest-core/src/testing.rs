//! Hand-made guest memory for unit tests.

use crate::addr::Gpa;
use crate::memory::{MemoryError, PhysMemory};
use std::cell::RefCell;
use std::ops::Range;

/// RAM from guest-physical 0 on, in a byte array.
pub struct Ram {
    bytes: RefCell<Vec<u8>>,
    ranges: Vec<Range<Gpa>>,
}

impl Ram {
    /// RAM of `size` zero bytes.
    pub fn new(size: usize) -> Self {
        Self {
            bytes: RefCell::new(vec![0; size]),
            ranges: vec![Gpa(0)..Gpa(size as u64)],
        }
    }

    /// Stores a little-endian u64 at guest-physical `at`; panics outside of RAM.
    pub fn put_u64(&self, at: u64, value: u64) {
        self.write(Gpa(at), &value.to_le_bytes()).unwrap();
    }

    fn span(&self, at: Gpa, len: usize) -> Result<Range<usize>, MemoryError> {
        let outside = MemoryError::NotRam { at, len };
        let start = usize::try_from(at.0).map_err(|_| outside.clone())?;
        let end = start
            .checked_add(len)
            .filter(|end| *end <= self.bytes.borrow().len())
            .ok_or(outside)?;
        Ok(start..end)
    }
}

impl PhysMemory for Ram {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        buf.copy_from_slice(&self.bytes.borrow()[self.span(at, buf.len())?]);
        Ok(())
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        let span = self.span(at, bytes.len())?;
        self.bytes.borrow_mut()[span].copy_from_slice(bytes);
        Ok(())
    }

    fn ram(&self) -> &[Range<Gpa>] {
        &self.ranges
    }
}
