//! The broker: does what the worker asks, where that is in order.

use super::channel::Channel;
use super::message::{MachineTold, ReachTold, Request, Told, Write};
use crate::chain::chain;
use crate::hypervisor::{GuardedMachine, Hypervisor};
use crate::lock::{DomainLock, LockError};
use crate::supervisor::Supervisor;
use guest_core::commit::Effect;
use guest_core::machine::{Journal, Machine, MachineError, Paused};
use guest_core::{Gpa, PhysMemory};
use serde::Serialize;
use std::convert::Infallible;
use std::io;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::time::Duration;

/// How long the worker may be silent in a pause: far longer than a pause that is not given up.
const SILENT_IN_PAUSE_MAX: Duration = Duration::from_secs(30);

/// A VM, and what a change of its guest needs.
pub(super) struct Served<'a> {
    pub(super) vm: &'a dyn Hypervisor,
    pub(super) lock: Option<&'a DomainLock>,
    /// The guest was opened to be changed.
    pub(super) may_change: bool,
    pub(super) supervisor: &'a Path,
}

/// The worker's requests have ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Ended {
    /// A supervisor has a journal.
    pub(super) in_commit: bool,
    /// There was a commit.
    pub(super) has_changed: bool,
    /// Why the worker is not answered any more, though it lives.
    pub(super) cut_off: Option<String>,
}

/// The worker asked for what was not its turn, asked no more, or asked for what it may not.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("it has ended")]
    Gone,
    #[error("reading its requests")]
    Channel(#[from] io::Error),
    #[error("it asked for {0}, which was not its turn")]
    Turn(&'static str),
}

/// Answers the worker until it ends. Nothing that has to do with its last request has been dropped then, where a commit is under way: the
/// process must end for the supervisor to take over.
pub(super) fn serve(served: &Served<'_>, channel: &mut Channel) -> Ended {
    let mut ended = Ended {
        in_commit: false,
        has_changed: false,
        cut_off: None,
    };
    let Err(error) = requests(served, channel, &mut ended);
    if !matches!(error, Broken::Gone) {
        ended.cut_off = Some(chain(&error).join(": "));
    }
    ended
}

fn requests(served: &Served<'_>, channel: &mut Channel, ended: &mut Ended) -> Result<Infallible, Broken> {
    let vm = served.vm;
    loop {
        match receive(channel)? {
            Request::Registers => answer(channel, vm.registers_running().map_err(ReachTold::from))?,
            Request::Activity => answer(channel, vm.activity().map_err(ReachTold::from))?,
            Request::RemoveLeftovers => answer(channel, vm.remove_leftovers().map_err(ReachTold::from))?,
            Request::WriteOver { old, write } => {
                let written = match served.may_change {
                    true => write_over(vm.memory(), &old, &write),
                    false => Err(Told::text(ONLY_TO_READ)),
                };
                answer(channel, written)?;
            }
            Request::Begin => {
                let supervisor = match start(served) {
                    Ok(supervisor) => supervisor,
                    Err(told) => {
                        answer::<(), _>(channel, Err(told))?;
                        continue;
                    }
                };
                answer::<_, Told>(channel, Ok(()))?;
                ended.has_changed = true;
                let mut commit = Commit {
                    memory: vm.memory(),
                    journal: None,
                };
                // Not dropped where the worker ends within the commit.
                let mut machine = ManuallyDrop::new(GuardedMachine::new(vm, supervisor));
                let done = commit.requests(&mut machine, channel);
                ended.in_commit = commit.journal.is_some();
                let machine = ManuallyDrop::into_inner(machine);
                match done {
                    Ok(Done::End) => {
                        drop(machine);
                        ended.in_commit = false;
                        answer::<_, Told>(channel, Ok(()))?;
                    }
                    Ok(Done::TakeOver) => {
                        let supervisor = machine.into_guard();
                        vm.disconnect();
                        let effect: Option<Effect> = supervisor.take_over();
                        ended.in_commit = false;
                        answer::<_, Told>(channel, Ok(effect))?;
                    }
                    Err(error) => {
                        if ended.in_commit {
                            std::mem::forget(machine);
                        }
                        return Err(error);
                    }
                }
            }
            _ => return Err(Broken::Turn("what belongs to a commit")),
        }
    }
}

fn start(served: &Served<'_>) -> Result<Supervisor, Told> {
    let pid = served.vm.identity().pid;
    let lock = served.lock.filter(|_| served.may_change);
    let lock = lock.ok_or_else(|| Told::of(&LockError::NotTaken { pid }))?;
    Supervisor::start(served.supervisor, &served.vm.route(), lock).map_err(|error| Told::of(&error))
}

/// Outside of a commit: what is left of an earlier one is wiped while the guest runs.
fn write_over(memory: &dyn PhysMemory, old: &[u8], write: &Write) -> Result<(), Told> {
    let at = Gpa(write.at);
    let mut now = vec![0; write.bytes.len()];
    memory.read(at, &mut now).map_err(|error| Told::of(&error))?;
    if now != old {
        return Err(Told::text("the guest's memory has changed meanwhile"));
    }
    memory.write(at, &write.bytes).map_err(|error| Told::of(&error))
}

fn receive(channel: &mut Channel) -> Result<Request, Broken> {
    channel.receive()?.ok_or(Broken::Gone)
}

fn answer<T: Serialize, E: Serialize>(channel: &mut Channel, result: Result<T, E>) -> Result<(), Broken> {
    Ok(channel.send(&result)?)
}

/// How a commit ended.
enum Done {
    End,
    TakeOver,
}

/// A commit: what may be written is what its journal names.
struct Commit<'a> {
    memory: &'a dyn PhysMemory,
    /// What the supervisor has.
    journal: Option<Journal>,
}

impl Commit<'_> {
    fn requests(
        &mut self,
        machine: &mut GuardedMachine<'_, Supervisor>,
        channel: &mut Channel,
    ) -> Result<Done, Broken> {
        loop {
            match receive(channel)? {
                Request::Guard(journal) => {
                    let told = machine.guard(journal.as_ref());
                    if told.is_ok() || journal.is_none() {
                        self.journal = journal;
                    }
                    answer(channel, told.map_err(MachineTold::from))?;
                }
                Request::Write(writes) => answer(channel, self.write(&writes))?,
                // Without a journal nobody would let the guest run.
                Request::Pause if self.journal.is_none() => return Err(Broken::Turn("a pause without a journal")),
                Request::Pause => match machine.pause().and_then(|mut paused| Ok((paused.registers()?, paused))) {
                    Ok((registers, paused)) => {
                        let elapsed = paused.elapsed();
                        answer::<_, MachineTold>(channel, Ok((registers, elapsed)))?;
                        channel.set_patience(Some(SILENT_IN_PAUSE_MAX))?;
                        self.pause(paused, channel)?;
                        channel.set_patience(None)?;
                    }
                    Err(error) => answer::<(), _>(channel, Err(MachineTold::from(error)))?,
                },
                // A worker that panics ends without a word: its commit is the supervisor's.
                Request::End if self.journal.is_some() => {
                    return Err(Broken::Turn("the end of a commit that is under way"));
                }
                Request::End => return Ok(Done::End),
                Request::TakeOver => return Ok(Done::TakeOver),
                _ => return Err(Broken::Turn("what belongs to a pause")),
            }
        }
    }

    /// Where the worker ends in the pause, the guest is left to the supervisor, as it is where a vmpatch dies.
    fn pause(&self, paused: Box<dyn Paused + '_>, channel: &mut Channel) -> Result<(), Broken> {
        let mut paused = ManuallyDrop::new(paused);
        loop {
            match receive(channel)? {
                Request::Write(writes) => answer(channel, self.write(&writes))?,
                Request::WriteCode(writes) => {
                    let written = self.write_code(&mut **paused, writes);
                    answer(channel, written.map_err(MachineTold::from))?;
                }
                Request::Drain => answer(channel, paused.drain().map_err(MachineTold::from))?,
                Request::Resume => {
                    let resumed = ManuallyDrop::into_inner(paused).resume();
                    return answer(channel, resumed.map_err(MachineTold::from));
                }
                Request::Abandon => {
                    drop(ManuallyDrop::into_inner(paused));
                    return answer::<_, Told>(channel, Ok(()));
                }
                _ => return Err(Broken::Turn("what does not belong to a pause")),
            }
        }
    }

    fn permits(&self, at: Gpa, bytes: &[u8]) -> bool {
        let journal = self.journal.as_ref();
        journal.is_some_and(|journal| journal.permits(self.memory, at, bytes))
    }

    /// None is made where one of them is not permitted.
    fn write(&self, writes: &[Write]) -> Result<(), Told> {
        if !writes.iter().all(|write| self.permits(Gpa(write.at), &write.bytes)) {
            return Err(Told::text(NOT_IN_JOURNAL));
        }
        let mut writes = writes.iter();
        let written = writes.try_for_each(|write| self.memory.write(Gpa(write.at), &write.bytes));
        written.map_err(|error| Told::of(&error))
    }

    fn write_code(&self, paused: &mut dyn Paused, writes: Vec<Write>) -> Result<(), MachineError> {
        let writes: Vec<_> = writes.into_iter().map(|write| (Gpa(write.at), write.bytes)).collect();
        match writes.iter().all(|(at, bytes)| self.permits(*at, bytes)) {
            true => paused.write(&writes),
            false => Err(MachineError::new("writing the guest's memory", NOT_IN_JOURNAL)),
        }
    }
}

const ONLY_TO_READ: &str = "the guest was opened only to be read";
const NOT_IN_JOURNAL: &str = "the journal of the commit does not name that write";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::ram::{self, RegionInProcess};
    use guest_core::change::Change;

    /// RAM at guest-physical 0x1000, in this process.
    fn with_ram(work: impl FnOnce(&dyn PhysMemory)) {
        let mut bytes = vec![0_u8; 64];
        let pid = std::process::id().cast_signed();
        let region = RegionInProcess {
            gpa: 0x1000,
            len: 64,
            hva: bytes.as_mut_ptr().addr() as u64,
        };
        work(&ram::open(pid, &[region.into()]).unwrap());
    }

    fn write(at: u64, bytes: &[u8]) -> Write {
        let bytes = bytes.to_vec();
        Write { at, bytes }
    }

    #[test]
    fn within_a_commit_only_what_its_journal_names_is_written() {
        with_ram(|memory| {
            let change = Change::replace("site", Gpa(0x1008), vec![0; 4], vec![1, 2, 3, 4]);
            let journal = Journal {
                staged: vec![change],
                ..Journal::default()
            };
            let mut commit = Commit { memory, journal: None };
            assert!(
                commit.write(&[write(0x1008, &[1, 2, 3, 4])]).is_err(),
                "before there is one"
            );
            commit.journal = Some(journal);
            commit.write(&[write(0x1008, &[1, 2]), write(0x100a, &[3, 4])]).unwrap();
            for (at, bytes) in [(0x1008, &[9][..]), (0x1004, &[0; 8]), (0x100c, &[0]), (0x9000, &[1])] {
                assert!(
                    commit.write(&[write(0x1008, &[0]), write(at, bytes)]).is_err(),
                    "{at:#x}"
                );
            }
            let mut now = [0; 8];
            memory.read(Gpa(0x1008), &mut now).unwrap();
            assert_eq!(now, [1, 2, 3, 4, 0, 0, 0, 0]);
        });
    }

    #[test]
    fn outside_of_a_commit_a_write_names_the_bytes_that_it_replaces_in_the_guests_ram() {
        with_ram(|memory| {
            write_over(memory, &[0, 0], &write(0x1000, &[5, 6])).unwrap();
            assert!(write_over(memory, &[0, 0], &write(0x1000, &[7, 8])).is_err());
            assert!(write_over(memory, &[5], &write(0x1000, &[7, 8])).is_err());
            assert!(write_over(memory, &[0, 0], &write(0x103f, &[7, 8])).is_err());
            let mut now = [0; 2];
            memory.read(Gpa(0x1000), &mut now).unwrap();
            assert_eq!(now, [5, 6]);
        });
    }
}
