//! The benchmark of `vmpatch upgrade`: how long a guest is paused while it moves into another QEMU, and how long the move takes. Every
//! figure is beside that of the same migration by bare QMP, taken in the same run, turn by turn.
//!
//! Beside what the two QEMUs say of it (STOP to RESUME), a datagram every millisecond to the guest and back shows what somebody at the
//! other end of a network sees.
//!
//! usage: cargo run --release -p e2e --bin bench_upgrade [MOVES]

use std::error::Error;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use e2e::bare;
use e2e::kit;
use e2e::load::{Gap, Outfit};
use e2e::moving::{INSTALLED, Keeper, RamFile};
use e2e::vmpatch;
use images::guest::{Guest, GuestConfig, Ram};
use images::kernel::Kernel;
use serde_json::Value;

/// The guest's name.
const NAME: &str = "vmbench-upgrade";
/// Its RAM, in MiB.
const MEMORY_MIB: [u32; 2] = [512, 2048];
/// Ways of that RAM.
const WAYS: [&str; 3] = ["cpr-transfer", "x-ignore-shared", "precopy"];
/// Memory that a guest writes again and again where it is not idle, in MiB.
const WRITTEN_MIB: u32 = 64;
/// Moves of each kind, unless the command line says otherwise.
const MOVES_DEFAULT: usize = 5;
/// Before and behind each move, so that the echo has begun and a gap has an end.
const CALM: Duration = Duration::from_millis(300);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench_upgrade: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let moves = std::env::args().nth(1).map_or(Ok(MOVES_DEFAULT), |text| text.parse())?;
    vmpatch::program()?;
    println!(
        "Medians of {moves} moves each, in ms. \"stood\": STOP to RESUME; \"echo\": the longest time without a datagram, of one \
         sent each ms; \"move\": from the new process's start until the guest runs there; \"command\": all of vmpatch. Bare QMP has QEMU's own downtime \
         limit, 300 ms, where vmpatch begins with 20; that matters for precopy alone.\n"
    );
    println!(
        "| method | RAM, MiB | guest | stood: bare | vmpatch | ratio | echo: bare | vmpatch | move: bare | vmpatch | ratio | command |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|");
    for mib in MEMORY_MIB {
        for way in WAYS {
            let mut bench = Bench::boot(mib, way)?;
            for written in [0, WRITTEN_MIB] {
                bench.measure(written, moves)?;
            }
        }
    }
    Ok(())
}

/// A guest that moves there and then again.
struct Bench {
    guest: Guest,
    #[expect(dead_code, reason = "it works by being dropped")]
    keeper: Keeper,
    outfit: Outfit,
    #[expect(dead_code, reason = "the guest's RAM may be there")]
    file: RamFile,
    way: &'static str,
    mib: u32,
}

/// Times of one move.
#[derive(Clone, Copy, Debug)]
struct Times {
    stood: Duration,
    echo: Duration,
    total: Duration,
    command: Duration,
}

impl Bench {
    fn boot(mib: u32, way: &'static str) -> Result<Self> {
        let (outfit, file) = (Outfit::new(), RamFile::new());
        let config = kit::guest(Kernel::CLOUD_6_1).name(NAME).memory_mib(mib);
        let guest = Guest::boot(outfit.fit(with_ram_for(way, config, &file)))?;
        Ok(Self {
            keeper: Keeper::of(&guest),
            guest,
            outfit,
            file,
            way,
            mib,
        })
    }

    fn measure(&mut self, written_mib: u32, moves: usize) -> Result<()> {
        match written_mib {
            0 => self.outfit.start_echo(&self.guest),
            mib => self.outfit.start_work(&self.guest, mib),
        }
        let (mut bare, mut own) = (Vec::new(), Vec::new());
        for _ in 0..moves {
            bare.push(self.one(Self::move_bare)?);
            own.push(self.one(Self::move_own)?);
        }
        self.outfit.end_work(&self.guest);
        let state = if written_mib == 0 {
            "idle".to_owned()
        } else {
            format!("writes {written_mib} MiB and its disk")
        };
        let [bare, own] = [bare, own].map(|times| median(&times));
        println!(
            "| {} | {} | {state} | {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            self.way,
            self.mib,
            ms(bare.stood),
            ms(own.stood),
            ratio(own.stood, bare.stood),
            ms(bare.echo),
            ms(own.echo),
            ms(bare.total),
            ms(own.total),
            ratio(own.total, bare.total),
            ms(own.command),
        );
        Ok(())
    }

    fn one(&mut self, work: fn(&mut Self) -> Result<(u32, Times)>) -> Result<Times> {
        let beat = self.outfit.beat();
        std::thread::sleep(CALM);
        let moved = work(self);
        std::thread::sleep(CALM);
        let Gap { longest, heard, sent } = beat.end();
        let (pid, times) = moved?;
        if heard == 0 {
            return Err(format!("none of {sent} datagrams came back").into());
        }
        self.guest.follow(pid)?;
        Ok(Times { echo: longest, ..times })
    }

    fn move_bare(&mut self) -> Result<(u32, Times)> {
        let moved = bare::upgrade(&self.guest, INSTALLED, self.way)?;
        let times = Times {
            stood: moved.stood,
            echo: Duration::ZERO,
            total: moved.total,
            command: moved.total,
        };
        Ok((moved.pid, times))
    }

    fn move_own(&mut self) -> Result<(u32, Times)> {
        let start = Instant::now();
        let output = Command::new(vmpatch::program()?)
            .args([
                "--domain", NAME, "upgrade", "--json", "--qemu", INSTALLED, "--method", self.way,
            ])
            .stdin(Stdio::null())
            .output()?;
        let command = start.elapsed();
        if !output.status.success() {
            return Err(String::from_utf8_lossy(&output.stderr).into());
        }
        let report: Value = serde_json::from_slice(&output.stdout)?;
        let number = |pointer: &str| {
            let number = report.pointer(pointer).and_then(Value::as_u64);
            number.ok_or_else(|| format!("no {pointer} in {report}"))
        };
        let times = Times {
            stood: Duration::from_micros(number("/downtime_us")?),
            echo: Duration::ZERO,
            total: Duration::from_millis(number("/total_ms")?),
            command,
        };
        Ok((u32::try_from(number("/new/pid")?)?, times))
    }
}

/// RAM that can go that way.
fn with_ram_for(way: &str, mut config: GuestConfig, file: &RamFile) -> GuestConfig {
    match way {
        "cpr-transfer" => config.machine = "q35,aux-ram-share=on".to_owned(),
        "x-ignore-shared" => return file.fit(config),
        _ => config.ram = Ram::Private,
    }
    config
}

fn median(times: &[Times]) -> Times {
    let of = |pick: fn(&Times) -> Duration| {
        let mut all: Vec<Duration> = times.iter().map(pick).collect();
        all.sort_unstable();
        all.get(all.len() / 2).copied().unwrap_or_default()
    };
    Times {
        stood: of(|times| times.stood),
        echo: of(|times| times.echo),
        total: of(|times| times.total),
        command: of(|times| times.command),
    }
}

fn ms(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}

fn ratio(a: Duration, b: Duration) -> String {
    format!("{:.2}", a.as_secs_f64() / b.as_secs_f64().max(1e-6))
}
