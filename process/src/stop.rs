//! Threads that ptrace holds.

use crate::ptrace::{self, Event, ThreadRegisters};
use crate::thread::{self, Thread, ThreadError};
use nix::errno::Errno;
use nix::libc::c_int;
use std::marker::PhantomData;
use std::time::{Duration, Instant};

/// How long a thread is asked without pause whether it is stopped: what a thread on another processor needs that has nothing else to do.
const SPIN: Duration = Duration::from_micros(15);
/// The pauses after that: short, since others wait; growing, since the thread may need this very processor. [ns]
const WAIT_NS: (u64, u64) = (5_000, 100_000);
/// Pause between two looks at a thread that did not stop in time.
const LATE_WAIT: Duration = Duration::from_millis(1);
/// How long a thread that is being killed may take to end before it is left to the kernel.
const END_TIME_MAX: Duration = Duration::from_secs(1);

/// Why threads could not be stopped. All of them run as before.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// It has ended, or another thread has its number now.
    #[error("thread {} of process {} has ended", .0.tid, .0.pid)]
    Gone(Thread),
    /// A debugger, or another vmpatch, is at it.
    #[error("thread {} of process {} is traced by {tracer} already", .thread.tid, .thread.pid)]
    Traced {
        /// The thread.
        thread: Thread,
        /// Who traces it.
        tracer: i32,
    },
    /// The host forbids it: another user's process without `CAP_SYS_PTRACE`, the `ptrace_scope` of yama, or a security policy.
    #[error("the host forbids to trace thread {} of process {}", .0.tid, .0.pid)]
    Forbidden(Thread),
    /// Its whole process is stopped by a signal (SIGSTOP), and stays so.
    #[error("process {} is stopped by signal {signal}", .thread.pid)]
    GroupStopped {
        /// The thread.
        thread: Thread,
        /// The signal.
        signal: i32,
    },
    /// It did not stop in time. The others ran on at once; it was waited for, so that it is not left traced.
    #[error("thread {} of process {} did not stop within {within_us} µs", .thread.tid, .thread.pid)]
    Late {
        /// The thread.
        thread: Thread,
        /// The time that it had, in microseconds.
        within_us: u128,
    },
    /// The host does not tell what is needed of it.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// Something else.
    #[error("{doing} thread {} of process {}", .thread.tid, .thread.pid)]
    Os {
        /// What was being done.
        doing: &'static str,
        /// The thread.
        thread: Thread,
        /// Why it failed.
        source: Errno,
    },
}

/// Threads that are stopped. Dropped, they run, and nobody traces them. Should this process be killed, the kernel does the same.
///
/// Signals for a stopped thread are kept for it. A stop is one of these threads alone, and between two stops none of them is traced: a
/// traced thread stops at each signal until its tracer has seen it.
#[derive(Debug)]
pub struct Stopped {
    held: Vec<Held>,
    began: Instant,
    slack_before: Option<i64>,
    /// The tracer is this thread.
    _not_send: PhantomData<*const ()>,
}

#[derive(Debug)]
struct Held {
    thread: Thread,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Traced, and not asked to stop.
    Seized,
    /// Asked to stop.
    Asked,
    /// Stopped, with the signal that it is to go on with, or 0.
    Stopped(c_int),
    /// Not traced.
    Free,
}

impl Stopped {
    /// Stops threads, all of which have `within` for it. Nothing but them is stopped.
    ///
    /// # Errors
    ///
    /// They run as before. Returns late, where a thread did not stop in time, until it did: only then can it be let go.
    pub fn stop(threads: &[Thread], within: Duration) -> Result<Self, StopError> {
        let mut stopped = Self {
            held: Vec::with_capacity(threads.len()),
            began: Instant::now(),
            slack_before: ptrace::set_timer_slack(1),
            _not_send: PhantomData,
        };
        for thread in threads {
            seize(*thread)?;
            let state = State::Seized;
            stopped.held.push(Held { thread: *thread, state });
            // Its number is its own from here on. Another thread may have got it before.
            check(*thread)?;
        }
        stopped.began = Instant::now();
        stopped.held.iter_mut().try_for_each(Held::ask)?;
        let deadline = stopped.began + within;
        let waited = stopped.held.iter_mut().try_for_each(|held| held.wait(deadline, within));
        waited.map(|()| stopped)
    }

    /// The threads, in the order in which they were given.
    pub fn threads(&self) -> impl Iterator<Item = Thread> {
        self.held.iter().map(|held| held.thread)
    }

    /// Time since the first of them was asked to stop.
    pub fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// The registers of each thread, in the order of [`Stopped::threads`].
    ///
    /// # Errors
    ///
    /// One has been killed.
    pub fn registers(&self) -> Result<Vec<ThreadRegisters>, StopError> {
        let registers = self.held.iter().map(|held| {
            ptrace::registers(held.thread.tid).map_err(|errno| held.thread.failed("reading the registers of", errno))
        });
        registers.collect()
    }

    /// Lets all of them go on.
    ///
    /// # Errors
    ///
    /// One was killed meanwhile. The others go on.
    pub fn resume(mut self) -> Result<(), StopError> {
        self.release()
    }

    /// First those that are known to be stopped; then the others, as they stop.
    fn release(&mut self) -> Result<(), StopError> {
        let mut result = Ok(());
        for held in &mut self.held {
            let detached = held.detach();
            result = result.and(detached);
        }
        self.held.retain(|held| held.state != State::Free);
        for held in &mut self.held {
            if held.state == State::Seized {
                // Where it can't be asked, it is ending.
                let _ = held.ask();
            }
        }
        let began = Instant::now();
        while !self.held.is_empty() {
            self.held.retain_mut(|held| !held.is_free_at_last(began));
            if !self.held.is_empty() {
                std::thread::sleep(LATE_WAIT);
            }
        }
        if let Some(slack) = self.slack_before.take() {
            ptrace::set_timer_slack(slack);
        }
        result
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Whoever was killed is no loss here.
        let _ = self.release();
    }
}

impl Held {
    fn ask(&mut self) -> Result<(), StopError> {
        ptrace::interrupt(self.thread.tid).map_err(|errno| self.thread.failed("interrupting", errno))?;
        self.state = State::Asked;
        Ok(())
    }

    /// Waits until it is stopped.
    fn wait(&mut self, deadline: Instant, within: Duration) -> Result<(), StopError> {
        let began = Instant::now();
        let (mut wait, longest) = WAIT_NS;
        loop {
            match self.look()? {
                Some(Event::GroupStopped(signal)) => {
                    let thread = self.thread;
                    return Err(StopError::GroupStopped { thread, signal });
                }
                Some(Event::Ended) => return Err(StopError::Gone(self.thread)),
                Some(Event::Interrupted | Event::Signal(_)) => return Ok(()),
                None => {}
            }
            let now = Instant::now();
            if now >= deadline {
                let (thread, within_us) = (self.thread, within.as_micros());
                return Err(StopError::Late { thread, within_us });
            }
            if now.duration_since(began) < SPIN {
                std::hint::spin_loop();
            } else {
                std::thread::sleep(Duration::from_nanos(wait));
                wait = (wait * 2).min(longest);
            }
        }
    }

    /// What it tells; takes note of it.
    fn look(&mut self) -> Result<Option<Event>, StopError> {
        let event = match ptrace::look(self.thread.tid) {
            Ok(event) => event,
            // Not this tracer's, or no more: it ended as another thread of its process ran a new program.
            Err(Errno::ECHILD) => {
                self.state = State::Free;
                return Ok(Some(Event::Ended));
            }
            Err(errno) => return Err(self.thread.failed("waiting for", errno)),
        };
        match event {
            Some(Event::Interrupted | Event::GroupStopped(_)) => self.state = State::Stopped(0),
            Some(Event::Signal(signal)) => self.state = State::Stopped(signal),
            Some(Event::Ended) => {
                ptrace::reap(self.thread.tid);
                self.state = State::Free;
            }
            None => {}
        }
        Ok(event)
    }

    /// Lets it go on where it is stopped.
    fn detach(&mut self) -> Result<(), StopError> {
        let State::Stopped(signal) = self.state else {
            return Ok(());
        };
        match ptrace::detach(self.thread.tid, signal) {
            Ok(()) => {
                self.state = State::Free;
                Ok(())
            }
            Err(errno) => Err(self.thread.failed("letting go", errno)),
        }
    }

    /// Lets it go on if it is stopped by now. True where nothing is left to do, and false where it is to be tried again: a thread can be
    /// let go only where it is stopped. It is tried since `began`.
    fn is_free_at_last(&mut self, began: Instant) -> bool {
        if self.look().is_err() {
            return true;
        }
        // One that is being killed can't be let go though it was stopped, and soon tells of its end.
        let is_ending = self.detach().is_err();
        if self.state == State::Free || (is_ending && began.elapsed() > END_TIME_MAX) {
            return true;
        }
        // The leader of a process has nothing to tell of its end until all other threads have ended.
        let has_ended = self.thread.stat().is_ok_and(|stat| stat.has_ended());
        if has_ended {
            let _ = self.look();
        }
        has_ended
    }
}

impl Thread {
    /// Why a request failed on a thread that this one traces.
    fn failed(self, doing: &'static str, errno: Errno) -> StopError {
        match errno {
            Errno::ESRCH => StopError::Gone(self),
            source => StopError::Os {
                doing,
                thread: self,
                source,
            },
        }
    }
}

fn seize(thread: Thread) -> Result<(), StopError> {
    let Err(errno) = ptrace::seize(thread.tid) else {
        return Ok(());
    };
    // A thread that has ended is refused as one that the host forbids is.
    check(thread)?;
    Err(match (errno, thread.tracer()) {
        (Errno::EPERM, Some(tracer)) => StopError::Traced { thread, tracer },
        (Errno::EPERM | Errno::EACCES, None) => StopError::Forbidden(thread),
        _ => thread.failed("seizing", errno),
    })
}

/// Makes sure that a thread is the one that was found, and one of the program.
fn check(thread: Thread) -> Result<(), StopError> {
    let stat = match thread::stat(thread.pid, thread.tid) {
        Err(ThreadError::Proc { source, .. }) if thread::is_gone(&source) => return Err(StopError::Gone(thread)),
        stat => stat?,
    };
    if stat.has_ended() || stat.start_time != thread.start_time {
        return Err(StopError::Gone(thread));
    }
    Ok(())
}
