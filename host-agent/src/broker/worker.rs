//! The worker's side: a VM of which it has the RAM, and a broker for all else.

use super::channel::Channel;
use super::message::{MachineTold, ReachTold, Request, Told, Write};
use crate::hypervisor::ram::GuestRam;
use crate::hypervisor::stops::{HeldBack, StopsHeldBack};
use crate::hypervisor::{Activity, Identity, Meaning, ReachError};
use guest_core::commit::Effect;
use guest_core::guest::Supervised;
use guest_core::machine::{Journal, Machine, MachineError, PauseTimes, Paused, WriteCode};
use guest_core::{Gpa, MemoryError, PhysMemory, Registers};
use serde::de::DeserializeOwned;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The broker has ended.
#[derive(Debug, thiserror::Error)]
#[error("the vmpatch that has the guest's monitor and lock does not answer")]
struct Gone(#[source] io::Error);

/// A VM by its broker.
pub(crate) struct BrokeredVm {
    identity: Identity,
    memory: BrokeredMemory,
}

/// The guest's RAM: read here, and written here where it is mapped.
struct BrokeredMemory {
    ram: GuestRam,
    channel: Mutex<Channel>,
    /// A commit has begun, and not ended.
    in_commit: AtomicBool,
}

impl BrokeredMemory {
    fn ask<T: DeserializeOwned, E: DeserializeOwned>(&self, request: &Request) -> Result<Result<T, E>, Gone> {
        let mut channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        let answered = channel.send(request).and_then(|()| channel.receive());
        let ended = || io::ErrorKind::UnexpectedEof.into();
        answered.and_then(|answer| answer.ok_or_else(ended)).map_err(Gone)
    }

    fn ask_to_write(&self, request: &Request, at: Gpa, len: usize) -> Result<(), MemoryError> {
        let cause = match self.ask::<(), Told>(request) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(told)) => told.to_string(),
            Err(gone) => gone.to_string(),
        };
        Err(MemoryError::Host { at, len, cause })
    }
}

impl PhysMemory for BrokeredMemory {
    fn read(&self, at: Gpa, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.ram.read(at, buf)
    }

    fn read_ranges(&self, ranges: &[(Gpa, usize)], buf: &mut [u8]) -> Result<(), MemoryError> {
        self.ram.read_ranges(ranges, buf)
    }

    fn write(&self, at: Gpa, bytes: &[u8]) -> Result<(), MemoryError> {
        if self.ram.is_mapped(at, bytes.len()) {
            return self.ram.write(at, bytes);
        }
        let write = Write::new(at, bytes);
        let request = match self.in_commit.load(Ordering::Relaxed) {
            true => Request::Write(vec![write]),
            false => {
                let mut old = vec![0; bytes.len()];
                self.ram.read(at, &mut old)?;
                Request::WriteOver { old, write }
            }
        };
        self.ask_to_write(&request, at, bytes.len())
    }

    fn write_all(&self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MemoryError> {
        let are_mapped = writes.iter().all(|(at, bytes)| self.ram.is_mapped(*at, bytes.len()));
        match (writes, self.in_commit.load(Ordering::Relaxed)) {
            ([(first, _), ..], true) if !are_mapped => {
                let len = writes.iter().map(|(_, bytes)| bytes.len()).sum();
                let writes = writes.iter().map(|(at, bytes)| Write::new(*at, bytes));
                self.ask_to_write(&Request::Write(writes.collect()), *first, len)
            }
            _ => writes.iter().try_for_each(|(at, bytes)| self.write(*at, bytes)),
        }
    }

    fn ram(&self) -> &[Range<Gpa>] {
        self.ram.ram()
    }
}

impl BrokeredVm {
    pub(super) fn new(identity: Identity, ram: GuestRam, channel: Channel) -> Self {
        let memory = BrokeredMemory {
            ram,
            channel: Mutex::new(channel),
            in_commit: AtomicBool::new(false),
        };
        Self { identity, memory }
    }

    /// Who it is.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// The guest's RAM.
    pub(crate) fn memory(&self) -> &dyn PhysMemory {
        &self.memory
    }

    /// As [`Hypervisor::registers_running`](crate::hypervisor::Hypervisor::registers_running).
    pub(crate) fn registers_running(&self) -> Result<Vec<Registers>, ReachError> {
        self.reach(&Request::Registers)
    }

    /// As [`Hypervisor::activity`](crate::hypervisor::Hypervisor::activity).
    pub(crate) fn activity(&self) -> Result<Activity, ReachError> {
        self.reach(&Request::Activity)
    }

    /// As [`Hypervisor::remove_leftovers`](crate::hypervisor::Hypervisor::remove_leftovers).
    pub(crate) fn remove_leftovers(&self) -> Result<(), ReachError> {
        self.reach(&Request::RemoveLeftovers)
    }

    /// Begins a commit, with a supervisor.
    ///
    /// # Errors
    ///
    /// The supervisor was not started.
    pub(crate) fn begin(&self) -> Result<BrokeredMachine<'_>, io::Error> {
        match self.memory.ask::<(), Told>(&Request::Begin) {
            Ok(Ok(())) => {
                self.memory.in_commit.store(true, Ordering::Relaxed);
                Ok(BrokeredMachine {
                    memory: &self.memory,
                    is_open: true,
                })
            }
            Ok(Err(told)) => Err(io::Error::other(told)),
            Err(gone) => Err(io::Error::other(gone)),
        }
    }

    fn reach<T: DeserializeOwned>(&self, request: &Request) -> Result<T, ReachError> {
        match self.memory.ask::<T, ReachTold>(request) {
            Ok(result) => result.map_err(ReachError::from),
            Err(gone) => Err(ReachError::new(Meaning::MayPass, gone)),
        }
    }
}

/// The vCPUs for one commit.
pub(crate) struct BrokeredMachine<'a> {
    memory: &'a BrokeredMemory,
    /// The broker has not been told of the commit's end.
    is_open: bool,
}

impl BrokeredMemory {
    fn machine<T: DeserializeOwned>(&self, doing: &'static str, request: &Request) -> Result<T, MachineError> {
        match self.ask::<T, MachineTold>(request) {
            Ok(result) => result.map_err(MachineError::from),
            Err(gone) => Err(MachineError::new(doing, gone)),
        }
    }
}

impl Machine for BrokeredMachine<'_> {
    fn guard(&mut self, journal: Option<&Journal>) -> Result<(), MachineError> {
        let request = Request::Guard(journal.cloned());
        self.memory.machine("telling the supervisor", &request)
    }

    /// Both processes hold back a terminal's requests to stop: each is in the way of the guest.
    fn pause(&mut self) -> Result<Box<dyn Paused + '_>, MachineError> {
        let stops = StopsHeldBack::begin();
        let (registers, elapsed): (_, Duration) = self.memory.machine("pausing the guest", &Request::Pause)?;
        let now = Instant::now();
        let began = now.checked_sub(elapsed).unwrap_or(now);
        let guest = BrokeredPause {
            memory: self.memory,
            registers,
            began,
            is_open: true,
        };
        Ok(Box::new(HeldBack::new(Box::new(guest), stops)))
    }
}

impl Supervised for BrokeredMachine<'_> {
    fn take_over(mut self: Box<Self>) -> Option<Effect> {
        self.is_open = false;
        self.memory.in_commit.store(false, Ordering::Relaxed);
        self.memory.ask::<_, Told>(&Request::TakeOver).ok()?.ok()?
    }
}

impl Drop for BrokeredMachine<'_> {
    fn drop(&mut self) {
        if self.is_open && !std::thread::panicking() {
            self.memory.in_commit.store(false, Ordering::Relaxed);
            let _ = self.memory.ask::<(), Told>(&Request::End);
        }
    }
}

/// A paused guest.
struct BrokeredPause<'a> {
    memory: &'a BrokeredMemory,
    registers: Vec<Registers>,
    began: Instant,
    is_open: bool,
}

impl WriteCode for BrokeredPause<'_> {
    fn write(&mut self, writes: &[(Gpa, Vec<u8>)]) -> Result<(), MachineError> {
        let writes = writes.iter().map(|(at, bytes)| Write::new(*at, bytes));
        let request = Request::WriteCode(writes.collect());
        self.memory.machine("writing the guest's memory", &request)
    }

    fn drain(&mut self) -> Result<(), MachineError> {
        self.memory.machine("waiting for writes to the guest", &Request::Drain)
    }
}

impl Paused for BrokeredPause<'_> {
    fn registers(&mut self) -> Result<Vec<Registers>, MachineError> {
        Ok(self.registers.clone())
    }

    fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    fn resume(mut self: Box<Self>) -> Result<PauseTimes, MachineError> {
        self.is_open = false;
        self.memory.machine("resuming the guest", &Request::Resume)
    }
}

impl Drop for BrokeredPause<'_> {
    fn drop(&mut self) {
        if self.is_open && !std::thread::panicking() {
            let _ = self.memory.ask::<(), Told>(&Request::Abandon);
        }
    }
}
