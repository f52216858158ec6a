//! Many moves of one guest between QEMUs, some of them with a vmpatch that is killed at a random moment. The guest works all the while: it
//! writes and checks memory, and three disks (virtio-blk on qcow2 with threads, virtio-blk with an iothread and native AIO, virtio-scsi with an
//! iothread and io_uring); somebody talks to it on one TCP connection; its clock is compared with the host's after each move. QEMU's
//! NVMe can't be moved ("non-migratable device", 7.2 and 10.0).
//!
//! usage: cargo run --release -p e2e --bin moves [MOVES [KILLS [QEMU]...]]
//!
//! The QEMUs are those of bookworm (7.2) and this machine's own, and those that the command line names. Writes a table of what was moved
//! from where to where, by which method.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime};

use e2e::bed::assert_healthy;
use e2e::kit;
use e2e::load::Outfit;
use e2e::moving::{INSTALLED, Keeper, processes_of, temporary_names};
use e2e::processes;
use e2e::vmpatch::{self, Vmpatch};
use images::guest::{Guest, Ram};
use images::kernel::Kernel;
use images::qemu;
use nix::sys::signal::Signal;
use serde_json::Value;

/// The guest's name.
const NAME: &str = "vmmoves";
/// A machine that all QEMUs know.
const MACHINE: &str = "pc-q35-7.2,aux-ram-share=on";
/// The same, for a QEMU that begins with 7.2, which does not know the switch.
const MACHINE_FIRST: &str = "pc-q35-7.2";
/// Memory that the guest writes again and again, in MiB.
const WRITTEN_MIB: u32 = 8;
/// Disks beside that of the [`Outfit`]: the file, its name in the guest, the device, AIO.
const DISKS: [(&str, &str, &str, &str); 2] = [
    ("scsi", "/dev/sda", "scsi-hd,bus=scsi0.0,id=scsidisk0", "io_uring"),
    ("native", "/dev/vdb", "virtio-blk-pci,iothread=io0,id=block1", "native"),
];
const DISK_LEN: u64 = 4 << 20;
const MOVES_DEFAULT: usize = 200;
const KILLS_DEFAULT: usize = 20;
/// A vmpatch is killed within this time from its start, until a whole move has told how long one takes.
const KILL_WITHIN_FIRST_MS: u64 = 1200;
/// How far the guest's clock may be from where it should be, in seconds, beside how long the guest takes to tell it: it tells whole seconds.
const CLOCK_ERROR_S: f64 = 2.0;
/// Times that it is asked for: the fastest answer counts, as a busy host can take seconds for one.
const CLOCK_TRIES: u32 = 5;
/// How long a move that was cut off may take to come to its end.
const END_LIMIT: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("moves: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default| words.get(at).map_or(Ok(default), |text| text.parse::<usize>());
    let (moves, kills) = (number(0, MOVES_DEFAULT)?, number(1, KILLS_DEFAULT)?);
    vmpatch::program()?;
    let mut programs = vec![qemu::bookworm()?, PathBuf::from(INSTALLED)];
    programs.extend(words.iter().skip(2).map(PathBuf::from));
    let mut total = Table::default();
    let mut dice = Dice(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs());
    println!("random numbers from {}", dice.0);
    // A guest whose RAM QEMU 7.2 could give it, and one whose RAM can be handed over.
    let halves = [
        (MACHINE_FIRST, Ram::Private, &programs[..]),
        (MACHINE, Ram::SharedMemfd, programs.get(1..).unwrap_or_default()),
    ];
    for (half, (machine, ram, programs)) in halves.into_iter().enumerate() {
        let mut trip = Trip::boot(machine, ram, programs)?;
        let (moves, kills) = ((moves + half) / 2, (kills + half) / 2);
        for left in (1..=moves).rev() {
            let is_kill = dice.below(left as u64) < kills.saturating_sub(trip.kills) as u64;
            trip.go(&mut dice, is_kill, &mut total)?;
        }
        trip.end()?;
    }
    total.print();
    Ok(())
}

/// Where a program that was unpacked beside the installed one has its firmware.
fn data_folders(program: &Path) -> Vec<String> {
    let unpacked = program.ancestors().nth(2).filter(|_| program != Path::new(INSTALLED));
    let folders = unpacked
        .into_iter()
        .flat_map(|usr| ["share/qemu", "share/seabios"].map(|folder| usr.join(folder)));
    let there = folders.filter(|folder| folder.exists());
    there.map(|folder| folder.display().to_string()).collect()
}

/// What was moved: from, into, method; how often, and how often the vmpatch was killed and the guest stayed.
#[derive(Default)]
struct Table(BTreeMap<(String, String, String), [usize; 2]>);

impl Table {
    fn add(&mut self, [from, into, way]: [&str; 3], stayed: bool) {
        let counts = self.0.entry((from.into(), into.into(), way.into())).or_default();
        counts[usize::from(stayed)] += 1;
    }

    fn print(&self) {
        println!("| from | into | method | moved | killed, stayed |\n|---|---|---|---|---|");
        for ((from, into, way), [moved, stayed]) in &self.0 {
            println!("| {from} | {into} | {way} | {moved} | {stayed} |");
        }
        let sums = self
            .0
            .values()
            .fold([0; 2], |all, one| [all[0] + one[0], all[1] + one[1]]);
        println!("{} moves, {} cut off where the guest stayed", sums[0], sums[1]);
    }
}

/// Random numbers that can be had again (`xorshift64`, Marsaglia 2003).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end.max(1)
    }
}

/// A guest on its way.
struct Trip {
    guest: Guest,
    #[expect(dead_code, reason = "it works by being dropped")]
    keeper: Keeper,
    outfit: Outfit,
    vmpatch: Vmpatch,
    programs: Vec<PathBuf>,
    kills: usize,
    /// How long the last whole move took.
    within_ms: u64,
    /// The guest's clock less the host's, as it should be: it does not advance while the guest is paused.
    clock: f64,
}

impl Trip {
    fn boot(machine: &str, ram: Ram, programs: &[PathBuf]) -> Result<Self> {
        let outfit = Outfit::new();
        let mut config = outfit.fit(kit::guest(Kernel::GENERIC_6_1).name(NAME).ram(ram));
        config.qemu = programs.first().ok_or("no QEMU")?.clone();
        config.machine = machine.to_owned();
        // `max` is another CPU in each QEMU, and lacks something on the way back.
        config.cpu = Some("qemu64".to_owned());
        for word in [
            "-object",
            "iothread,id=io0",
            "-device",
            "virtio-scsi-pci,id=scsi0,iothread=io0",
        ] {
            config = config.qemu_arg(word);
        }
        for (name, _, device, aio) in DISKS {
            let path = outfit.folder().join(name);
            std::fs::File::create(&path)?.set_len(DISK_LEN)?;
            let drive = format!(
                "file={},if=none,id={name},format=raw,cache=none,aio={aio}",
                path.display()
            );
            let device = format!("{device},drive={name}");
            config = config
                .qemu_arg("-drive")
                .qemu_arg(&drive)
                .qemu_arg("-device")
                .qemu_arg(&device);
        }
        let config = config.module("virtio_scsi").module("sd_mod");
        let guest = Guest::boot(config)?;
        outfit.start_work(&guest, WRITTEN_MIB);
        for (name, disk, ..) in DISKS {
            let script = format!(
                "(setsid /opt/load 0 {disk} 0 >/tmp/{name} 2>&1 </dev/null & echo $! >/tmp/{name}.pid) && \
                 until grep -q started /tmp/{name}; do sleep 0.1; done"
            );
            guest.text(&["sh", "-c", &script])?;
        }
        let mut trip = Self {
            keeper: Keeper::of(&guest),
            vmpatch: Vmpatch::on(&guest),
            guest,
            outfit,
            programs: programs.to_vec(),
            kills: 0,
            within_ms: KILL_WITHIN_FIRST_MS,
            clock: 0.0,
        };
        trip.clock = trip.clock_ahead()?.0;
        Ok(trip)
    }

    /// One move, into any of the QEMUs.
    fn go(&mut self, dice: &mut Dice, is_kill: bool, table: &mut Table) -> Result<()> {
        let at = usize::try_from(dice.below(self.programs.len() as u64))?;
        let into = self.programs.get(at).ok_or("no QEMU")?.display().to_string();
        let talk = self.outfit.talk();
        let folders = data_folders(Path::new(&into));
        let mut line = vec!["upgrade", "--qemu", &into, "--json"];
        line.extend(folders.iter().flat_map(|folder| ["--data-dir", folder]));
        let begun = Instant::now();
        let child = self.vmpatch.start(&line);
        if is_kill {
            self.kills += 1;
            self.cut_off(&child, Duration::from_millis(dice.below(self.within_ms)));
        }
        let answer = self.vmpatch.finish(&line, child);
        if !is_kill {
            self.within_ms = u64::try_from(begun.elapsed().as_millis())?;
        }
        let report: Option<Value> = serde_json::from_str(&answer.stdout).ok();
        if !is_kill && answer.code != Some(0) {
            return Err(format!("{answer}").into());
        }
        let pid = self.where_it_is()?;
        let stayed = pid == self.guest.pid();
        self.guest.follow(pid)?;
        let text = |pointer: &str| {
            let found = report.as_ref().and_then(|report| report.pointer(pointer));
            found.and_then(Value::as_str).unwrap_or("cut off").to_owned()
        };
        let (from, to, way) = (text("/old/qemu"), text("/new/qemu"), text("/way"));
        table.add([&from, &to, &way], stayed);
        println!(
            "{from} -> {to} {way}: {:?}, killed: {is_kill}, stayed: {stayed}",
            begun.elapsed()
        );
        self.outfit.assert_reached("after a move");
        talk.end();
        let stood_us = report
            .as_ref()
            .and_then(|report| report.pointer("/downtime_us")?.as_f64());
        self.check_clock(stood_us)?;
        if temporary_names(&self.guest) != [""; 0] {
            return Err("temporary names are left".into());
        }
        Ok(())
    }

    /// Kills a vmpatch after that time, in every second case with the process that watches over its move.
    fn cut_off(&self, child: &Child, after: Duration) {
        sleep(after);
        if self.kills.is_multiple_of(2) {
            let watchers = processes::with_arguments(&["watch-move", &self.guest.pid().to_string()]);
            watchers
                .into_iter()
                .for_each(|pid| processes::kill(pid, Signal::SIGKILL));
        }
        processes::kill(child.id(), Signal::SIGKILL);
    }

    /// The one process that has the guest; brings a move that was cut off to its end.
    fn where_it_is(&self) -> Result<u32> {
        let end = Instant::now() + END_LIMIT;
        loop {
            let answer = self.vmpatch.run(&["status", "--json"]);
            let status: Option<Value> = serde_json::from_str(&answer.stdout).ok();
            let pid = status
                .as_ref()
                .and_then(|status| status.pointer("/guest/pid")?.as_u64());
            match (pid, processes_of(NAME).as_slice()) {
                (Some(pid), [one]) if answer.code == Some(0) && u64::from(*one) == pid => return Ok(*one),
                _ if Instant::now() > end => return Err(format!("the guest is not in one process: {answer}").into()),
                _ => sleep(Duration::from_millis(100)),
            }
        }
    }

    /// The clock is behind by what the guest stood, in microseconds; where nobody told that, it counts from here.
    fn check_clock(&mut self, stood_us: Option<f64>) -> Result<()> {
        let (ahead, error) = self.clock_ahead()?;
        let Some(stood_us) = stood_us else {
            self.clock = ahead;
            return Ok(());
        };
        self.clock -= stood_us / 1e6;
        let drift = ahead - self.clock;
        if drift.abs() > CLOCK_ERROR_S + error {
            return Err(format!("the guest's clock is {drift:.1} s from where it should be (± {error:.1} s)").into());
        }
        Ok(())
    }

    /// The guest's clock less the host's, and how far that may be wrong, in seconds.
    fn clock_ahead(&self) -> Result<(f64, f64)> {
        let mut best: Option<(f64, f64)> = None;
        for _ in 0..CLOCK_TRIES {
            let before = SystemTime::now();
            let guest: f64 = self.guest.text(&["date", "+%s"])?.trim().parse()?;
            let error = before.elapsed()? / 2;
            let ahead = guest - (before + error).duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
            if best.is_none_or(|(_, least)| error.as_secs_f64() < least) {
                best = Some((ahead, error.as_secs_f64()));
            }
        }
        Ok(best.ok_or("the clock was not asked for")?)
    }

    fn end(self) -> Result<()> {
        println!(
            "rounds of memory, wrong, blocks of the disk, wrong: {:?}",
            self.outfit.end_work(&self.guest)
        );
        for (name, ..) in DISKS {
            let script =
                format!("kill -TERM $(cat /tmp/{name}.pid) && until grep memory /tmp/{name}; do sleep 0.1; done");
            let text = self.guest.text(&["sh", "-c", &script])?;
            println!("{name}: {}", text.trim());
            let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
            if !matches!(numbers[..], [_, 0, written, 0] if written > 0) {
                return Err(format!("{name}: {text}").into());
            }
        }
        assert_healthy(&self.guest);
        Ok(())
    }
}
