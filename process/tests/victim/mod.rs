//! A process that is stopped: this very test program, started anew as one of the ignored tests below, which talks by lines.

use nix::libc;
use process::{Stopped, Thread, threads};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

/// Threads that count as fast as they can.
const WORKERS: usize = 3;
/// What the lines begin with that are answers, and not the test harness's.
const ANSWER: &str = "answer ";
/// The environment variable with the threads that a tracer is to stop.
const CHOSEN: &str = "VICTIM_THREADS";

/// A process with some threads of each kind.
pub struct Victim {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// Threads that count.
    pub workers: Vec<Thread>,
    /// A thread that waits for events, which never come.
    pub waiter: Thread,
}

impl Victim {
    pub fn start() -> Self {
        let mut child = program("victim::a_process_to_be_stopped")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let tids = numbers(&answer(&mut output));
        let all = threads(child.id().cast_signed()).unwrap();
        let thread = |tid: &u64| {
            all.iter()
                .find(|(thread, _)| thread.tid.cast_unsigned() as u64 == *tid)
                .unwrap()
                .0
        };
        let (waiter, workers) = tids.split_last().unwrap();
        Self {
            workers: workers.iter().map(thread).collect(),
            waiter: thread(waiter),
            child,
            input,
            output,
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn ask(&mut self, question: &str) -> String {
        writeln!(self.input, "{question}").unwrap();
        answer(&mut self.output)
    }

    /// How far the workers have counted that have not ended.
    pub fn counts(&mut self) -> Vec<u64> {
        numbers(&self.ask("counts"))
    }

    /// How many SIGUSR1 and SIGRTMIN have arrived.
    pub fn signals(&mut self) -> Vec<u64> {
        numbers(&self.ask("signals"))
    }

    /// How often the waiter's wait has ended with EINTR.
    pub fn interrupted_waits(&mut self) -> u64 {
        numbers(&self.ask("waits"))[0]
    }

    pub fn end_worker(&mut self, worker: usize) {
        self.end_worker_after(worker, 0);
    }

    pub fn end_worker_after(&mut self, worker: usize, delay_us: u64) {
        self.ask(&format!("end {worker} {delay_us}"));
    }

    /// Starts a thread that waits, in `vfork`, for a child that sleeps.
    pub fn start_vfork(&mut self, sleep_ms: u64) -> Thread {
        let tid = numbers(&self.ask(&format!("vfork {sleep_ms}")))[0];
        let all = threads(self.pid()).unwrap();
        let found = all
            .iter()
            .find(|(thread, _)| thread.tid.cast_unsigned() as u64 == tid)
            .unwrap()
            .0;
        while found.stat().unwrap().state != 'D' {
            std::thread::sleep(Duration::from_millis(1));
        }
        found
    }

    /// Sends a worker a signal.
    pub fn signal(&self, worker: usize, signal: i32) {
        send(self.pid(), self.workers[worker].tid, signal);
    }

    /// Sends a worker SIGRTMIN again and again.
    pub fn start_sender(&self, worker: usize) -> Sender {
        let (pid, tid) = (self.pid(), self.workers[worker].tid);
        let ended = Arc::new(AtomicBool::new(false));
        let is_ended = Arc::clone(&ended);
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while !is_ended.load(SeqCst) {
                send(pid, tid, libc::SIGRTMIN());
                sent += 1;
                std::thread::sleep(Duration::from_micros(10));
            }
            sent
        });
        Sender { ended, thread }
    }

    /// Starts a process that stops the workers, and waits until it has.
    pub fn start_tracer(&self) -> Child {
        self.start_other("victim::a_process_that_stops_threads_and_sleeps")
    }

    /// Starts a process that stops the workers again and again.
    pub fn start_stopper(&self) -> Child {
        self.start_other("victim::a_process_that_stops_threads_again_and_again")
    }

    fn start_other(&self, test: &str) -> Child {
        let chosen: Vec<String> = self.workers.iter().map(|worker| worker.tid.to_string()).collect();
        let chosen = format!("{} {}", self.pid(), chosen.join(" "));
        let mut child = program(test).env(CHOSEN, chosen).stdin(Stdio::null()).spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        answer(&mut output);
        child.stdout = Some(output.into_inner());
        child
    }

    pub fn kill(&self) {
        send_all(self.pid(), libc::SIGKILL);
    }

    /// Waits for its end, and gives the signal that ended it.
    pub fn wait(&mut self) -> Option<i32> {
        self.child.wait().unwrap().signal()
    }
}

/// Somebody who sends signals.
pub struct Sender {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Sender {
    /// Ends it, and gives how many it has sent.
    pub fn stop(self) -> u64 {
        self.ended.store(true, SeqCst);
        self.thread.join().unwrap()
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn program(test: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    command.stdout(Stdio::piped());
    command
}

fn answer(output: &mut impl BufRead) -> String {
    loop {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "no answer");
        // The harness ends no line before the test does.
        if let Some((_, answer)) = line.split_once(ANSWER) {
            return answer.trim_end().to_owned();
        }
    }
}

fn numbers(text: &str) -> Vec<u64> {
    text.split_whitespace().map(|word| word.parse().unwrap()).collect()
}

/// The thread that traces a thread, or 0.
pub fn tracer(thread: Thread) -> i32 {
    let status = fs::read_to_string(format!("/proc/{}/task/{}/status", thread.pid, thread.tid)).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).unwrap();
    line.trim().parse().unwrap()
}

/// Sends a thread a signal.
pub fn send(pid: i32, tid: i32, signal: i32) {
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) }, 0);
}

/// Sends a process a signal.
pub fn send_all(pid: i32, signal: i32) {
    // SAFETY: takes numbers.
    assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
}

static COUNTS: [AtomicU64; WORKERS] = [const { AtomicU64::new(0) }; WORKERS];
static ENDED: [AtomicBool; WORKERS] = [const { AtomicBool::new(false) }; WORKERS];
static SIGNALS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
static WAITS: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(signal: i32) {
    SIGNALS[usize::from(signal != libc::SIGUSR1)].fetch_add(1, SeqCst);
}

fn tid() -> i32 {
    // SAFETY: takes nothing.
    unsafe { libc::gettid() }
}

/// Starts a thread, and gives its number.
fn start(work: impl FnOnce() + Send + 'static) -> i32 {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        tell.send(tid()).unwrap();
        work();
    });
    told.recv().unwrap()
}

fn wait_for_events() {
    // SAFETY: takes a number.
    let events = unsafe { libc::epoll_create1(0) };
    loop {
        let mut event = libc::epoll_event { events: 0, u64: 0 };
        // SAFETY: the kernel writes at most one event.
        if unsafe { libc::epoll_wait(events, &raw mut event, 1, -1) } < 0 {
            WAITS.fetch_add(1, SeqCst);
        }
    }
}

/// Waits, as nothing can stop it, for a child that sleeps.
fn wait_in_vfork(sleep_ms: u64) {
    extern "C" fn sleep(time: *mut libc::c_void) -> i32 {
        // SAFETY: `time` is the timespec below, whose owner waits.
        unsafe { libc::nanosleep(time.cast_const().cast(), std::ptr::null_mut()) }
    }
    let mut time = libc::timespec {
        tv_sec: (sleep_ms / 1000).cast_signed(),
        tv_nsec: (sleep_ms % 1000 * 1_000_000).cast_signed(),
    };
    let mut stack = vec![0u128; 4096];
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the child has a stack of its own, and this thread, which owns all that it uses, waits until it has ended.
    let child = unsafe {
        libc::clone(
            sleep,
            stack.as_mut_ptr_range().end.cast(),
            flags,
            (&raw mut time).cast(),
        )
    };
    assert!(child > 0);
}

#[test]
#[ignore = "a process that other tests start"]
fn a_process_to_be_stopped() {
    for signal in [libc::SIGUSR1, libc::SIGRTMIN()] {
        // SAFETY: the handler only counts.
        unsafe { libc::signal(signal, on_signal as *const () as libc::sighandler_t) };
    }
    let mut tids: Vec<i32> = (0..WORKERS)
        .map(|worker| {
            start(move || {
                while !ENDED[worker].load(SeqCst) {
                    COUNTS[worker].fetch_add(1, SeqCst);
                }
            })
        })
        .collect();
    tids.push(start(wait_for_events));
    // It waits.
    std::thread::sleep(Duration::from_millis(20));
    let words = |numbers: Vec<String>| println!("{ANSWER}{}", numbers.join(" "));
    words(tids.iter().map(i32::to_string).collect());
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut question = line.split(' ');
        let name = question.next().unwrap();
        let args: Vec<u64> = question.map(|word| word.parse().unwrap()).collect();
        let values: Vec<u64> = match name {
            "counts" => {
                let alive = |worker: &usize| !ENDED[*worker].load(SeqCst);
                (0..WORKERS)
                    .filter(alive)
                    .map(|worker| COUNTS[worker].load(SeqCst))
                    .collect()
            }
            "signals" => SIGNALS.iter().map(|count| count.load(SeqCst)).collect(),
            "waits" => vec![WAITS.load(SeqCst)],
            "end" => {
                let (worker, delay_us) = (usize::try_from(args[0]).unwrap(), args[1]);
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_micros(delay_us));
                    ENDED[worker].store(true, SeqCst);
                });
                vec![]
            }
            "vfork" => vec![start(move || wait_in_vfork(args[0])).cast_unsigned().into()],
            _ => panic!("{line}"),
        };
        words(values.iter().map(u64::to_string).collect());
    }
}

/// The threads that this process is to stop.
fn chosen() -> Vec<Thread> {
    let chosen = std::env::var(CHOSEN).unwrap();
    let numbers: Vec<i32> = chosen.split(' ').map(|word| word.parse().unwrap()).collect();
    let all = threads(numbers[0]).unwrap().into_iter().map(|(thread, _)| thread);
    all.filter(|thread| numbers[1..].contains(&thread.tid)).collect()
}

#[test]
#[ignore = "a process that other tests start"]
fn a_process_that_stops_threads_and_sleeps() {
    let _stopped = Stopped::stop(&chosen(), Duration::from_secs(5)).unwrap();
    println!("{ANSWER}");
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
#[ignore = "a process that other tests start"]
fn a_process_that_stops_threads_again_and_again() {
    let chosen = chosen();
    println!("{ANSWER}");
    loop {
        drop(Stopped::stop(&chosen, Duration::from_secs(5)).unwrap());
    }
}
