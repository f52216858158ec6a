//! Compares the pause guard to a bare QMP `stop` and `cont` of the same run, the three in turns: medians, and where the
//! guard's time goes. The guard reads all registers and makes four small writes.
//!
//!     cargo run --release -p qmp --example pause -- QMP-SOCKET
use guest_core::Gpa;
use qmp::{Machine, PauseTimes};
use std::path::Path;
use std::time::{Duration, Instant};

type Failure = Box<dyn std::error::Error>;

const PAUSES: usize = 200;
/// Memory that firmware leaves alone, and Linux too: it reserves the first MiB, whose top holds its CPU start code.
const UNUSED: [Gpa; 4] = [Gpa(0x7_0000), Gpa(0x7_0100), Gpa(0x7_0200), Gpa(0x7_0300)];
const BYTES: [u8; 5] = [0; 5];
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Before each pause, so that the guest does its usual work again.
const REST: Duration = Duration::from_millis(10);

fn main() -> Result<(), Failure> {
    let path = std::env::args_os().nth(1).ok_or("usage: pause QMP-SOCKET")?;
    let (mut bare, mut first, mut later) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..PAUSES {
        let mut machine = Machine::attach(Path::new(&path), CONNECT_TIMEOUT)?;
        machine.prepare_pause()?;
        std::thread::sleep(REST);
        bare.push(bare_pause(&machine)?);
        std::thread::sleep(REST);
        first.push(guarded_pause(&mut machine)?);
        std::thread::sleep(REST);
        later.push(guarded_pause(&mut machine)?);
    }
    bare.sort_unstable();
    let bare_us = percentile(&bare, 50);
    println!(
        "{:40} p50 {bare_us} us, p99 {} us",
        "bare QMP stop and cont",
        percentile(&bare, 99)
    );
    print("first pause (register layout unknown)", &first, bare_us);
    print("later pause (register layout known)", &later, bare_us);
    Ok(())
}

fn bare_pause(machine: &Machine) -> Result<u64, Failure> {
    let start = Instant::now();
    machine.block_on(machine.client().execute(qapi::qmp::stop {}))?;
    machine.block_on(machine.client().execute(qapi::qmp::cont {}))?;
    Ok(u64::try_from(start.elapsed().as_micros())?)
}

fn guarded_pause(machine: &mut Machine) -> Result<PauseTimes, Failure> {
    // What is there cannot be read before the pause, nor in it without counting: write to memory that nobody uses.
    let mut paused = machine.pause()?;
    paused.write(&UNUSED.map(|at| (at, &BYTES[..])))?;
    Ok(paused.resume()?)
}

fn percentile<T: Copy>(sorted: &[T], percent: usize) -> T {
    sorted[(sorted.len() - 1) * percent / 100]
}

fn print(name: &str, pauses: &[PauseTimes], bare_us: u64) {
    let part = |field: fn(&PauseTimes) -> u64, percent| {
        let mut sorted: Vec<u64> = pauses.iter().map(field).collect();
        sorted.sort_unstable();
        percentile(&sorted, percent)
    };
    let total_us = part(|times| times.total_us, 50);
    println!(
        "{name:40} p50 {total_us} us, p99 {} us, {:.2} x bare (stop {}, registers {}, writes {}, resume {})",
        part(|times| times.total_us, 99),
        total_us as f64 / bare_us as f64,
        part(|times| times.stop_us, 50),
        part(|times| times.registers_us, 50),
        part(|times| times.writes_us, 50),
        part(|times| times.resume_us, 50),
    );
}
