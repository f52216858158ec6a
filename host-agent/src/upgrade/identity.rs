//! What must be the same in the new process: bytes of the guest's kernel and of its patches.

use crate::hypervisor::qemu;
use crate::hypervisor::ram::RamError;
use crate::session::Session;
use guest_core::change::{Change, ChangeError};
use guest_core::paging::PAGE_SIZE;
use guest_core::registry::State;
use guest_core::{Gpa, MemoryError, PhysMemory};
use qmp::RamMap;

/// Bytes compared at the start of the kernel's image.
const IMAGE_LEN: usize = 4096;
/// Bytes read at one time.
const CHUNK: usize = 64 << 10;

/// A range of guest memory, and its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    what: String,
    gpa: Gpa,
    bytes: Vec<u8>,
}

/// What identifies a guest before the move. None of these bytes changes while the domain is locked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    /// The kernel's banner.
    pub(super) banner: String,
    places: Vec<Place>,
    /// Changes of its patches, each with the patch's name. They are compared also if the guest has undone one since.
    changes: Vec<(String, Change)>,
}

/// Why a guest is not the one that was sent.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Its memory can't be reached.
    #[error("reaching the guest's memory in the new process")]
    Ram(#[from] RamError),
    /// Its memory can't be read.
    #[error("reading {what} in the new process")]
    Read {
        /// What is there.
        what: String,
        /// Why.
        source: MemoryError,
    },
    /// What a patch changed is not as it was.
    #[error("patch {id} is not in force in the new process")]
    Patch {
        /// The patch.
        id: String,
        /// Where.
        source: ChangeError,
    },
    /// Another kernel is there.
    #[error("the kernel in the new process is {new:?}, not {old:?}")]
    Banner {
        /// The banner before.
        old: String,
        /// The banner now.
        new: String,
    },
    /// The bytes are different.
    #[error("{what} at GPA {gpa:#x} is not the same in the new process")]
    Differs {
        /// What is there.
        what: String,
        /// Where.
        gpa: u64,
    },
}

impl Identity {
    /// Of the guest that a session has understood.
    pub(super) fn of(session: &Session) -> Result<Self, MemoryError> {
        let memory = session.memory();
        let (kernel, registry) = (session.kernel(), session.registry());
        let mut wanted: Vec<(String, Gpa, usize)> = Vec::new();
        if let Some(start) = kernel.image.physical(kernel.image.start()) {
            wanted.push(("the kernel's image".to_owned(), start, IMAGE_LEN));
        }
        if registry.exists {
            let page = usize::try_from(PAGE_SIZE).unwrap_or(IMAGE_LEN);
            wanted.push(("the registry of patches".to_owned(), registry.page(0), page));
        }
        let there = registry.entries.iter();
        let is_there = |state: State| state.is_in_force() || matches!(state, State::Kept | State::Replaced);
        let there = there.filter(|entry| is_there(entry.state));
        let records: Vec<_> = there.filter_map(|entry| entry.record.as_ref()).collect();
        for record in &records {
            // The arena is contiguous in both kinds of memory.
            let offset = record.text.start.wrapping_sub(registry.alias.0);
            let len = usize::try_from(record.text.len).unwrap_or(0);
            wanted.push((
                format!("the code of {}", record.id),
                registry.base.wrapping_add(offset),
                len,
            ));
        }
        let places = wanted
            .into_iter()
            .map(|(what, gpa, len)| {
                let mut bytes = vec![0; len];
                memory.read(gpa, &mut bytes)?;
                Ok(Place { what, gpa, bytes })
            })
            .collect::<Result<_, MemoryError>>()?;
        let changes = records.iter().flat_map(|record| {
            let own = record.changes.iter().map(|change| (record.id.clone(), change.clone()));
            own.collect::<Vec<_>>()
        });
        Ok(Self {
            changes: changes.filter(|(_, change)| change.verify(memory).is_ok()).collect(),
            banner: kernel.banner.clone(),
            places,
        })
    }

    /// Compares it with the guest of a session.
    pub(super) fn confirm(&self, session: &Session) -> Result<(), IdentityError> {
        if session.kernel().banner != self.banner {
            return Err(IdentityError::Banner {
                old: self.banner.clone(),
                new: session.kernel().banner.clone(),
            });
        }
        self.verify(session.memory())
    }

    /// How many places are compared.
    pub(super) fn len(&self) -> usize {
        self.places.len() + self.changes.len()
    }

    /// Compares it with the guest in a process's memory.
    pub(super) fn verify(&self, memory: &dyn PhysMemory) -> Result<(), IdentityError> {
        let mut found = vec![0; CHUNK];
        for Place { what, gpa, bytes } in &self.places {
            let mut at = *gpa;
            for expected in bytes.chunks(CHUNK) {
                let piece = found.get_mut(..expected.len()).unwrap_or_default();
                memory.read(at, piece).map_err(|source| IdentityError::Read {
                    what: what.clone(),
                    source,
                })?;
                if piece != expected {
                    return Err(IdentityError::Differs {
                        what: what.clone(),
                        gpa: at.0,
                    });
                }
                at = at.wrapping_add(CHUNK as u64);
            }
        }
        for (id, change) in &self.changes {
            change
                .verify(memory)
                .map_err(|source| IdentityError::Patch { id: id.clone(), source })?;
        }
        Ok(())
    }
}

/// The guest's memory in the new process.
pub(super) fn memory_of(map: &RamMap) -> Result<Box<dyn PhysMemory>, IdentityError> {
    Ok(Box::new(qemu::open_ram(map)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;
    use std::sync::Mutex;

    /// Memory from address 0.
    struct Bytes(Mutex<Vec<u8>>);

    impl PhysMemory for Bytes {
        fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
            let bytes = self.0.lock().unwrap();
            let start = usize::try_from(at.0).unwrap();
            let end = start + buf.len();
            let found = bytes
                .get(start..end)
                .ok_or(MemoryError::NotRam { at, len: buf.len() })?;
            buf.copy_from_slice(found);
            Ok(())
        }

        fn write(&self, _: Gpa, _: &[u8]) -> Result<(), MemoryError> {
            unreachable!("verifying writes nothing")
        }

        fn ram(&self) -> &[Range<Gpa>] {
            &[]
        }
    }

    #[test]
    fn one_byte_that_differs_is_found_and_named() {
        let bytes = Bytes(Mutex::new((0..=255).cycle().take(3 * CHUNK).collect()));
        let mut place = Place {
            what: "a jump".to_owned(),
            gpa: Gpa(7),
            bytes: vec![0; 2 * CHUNK],
        };
        bytes.read(place.gpa, &mut place.bytes).unwrap();
        let identity = Identity {
            banner: String::new(),
            places: vec![place],
            changes: Vec::new(),
        };
        identity.verify(&bytes).unwrap();
        bytes.0.lock().unwrap()[CHUNK + 9] ^= 1;
        let error = identity.verify(&bytes).unwrap_err();
        assert_eq!(
            error.to_string(),
            "a jump at GPA 0x10007 is not the same in the new process"
        );
    }
}
