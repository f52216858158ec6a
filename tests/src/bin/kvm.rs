//! Guests under KVM in a host in a box, by hand: the benchmark of pauses, many cycles under load, and kills at each step of a pause by
//! ptrace. Of times, only ratios mean anything there.
//!
//! usage: cargo run --release -p e2e --bin kvm bench|cycles|kills …

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Parser, Subcommand};
use e2e::boxed::{Boxed, Step, assert_clean};
use e2e::killing::Command;
use e2e::kit;
use images::guest::Ram;
use images::host_box::HostBox;
use images::kernel::Kernel;

/// How long the guest may take to start its tasks.
const START_LIMIT: Duration = Duration::from_secs(600);
/// How long everything else may take in the box.
const LIMIT: Duration = Duration::from_secs(7200);
/// More writes than any pause has.
const WRITES_MAX: usize = 64;
/// RAM of a guest with many tasks, MiB.
const MEMORY_MIB: u32 = 768;

#[derive(Parser)]
#[command(name = "kvm")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Compares vmpatch's pause with QEMU's own and with a bare stop of the vCPUs' threads, turn by turn: idle, busy, and with many tasks
    Bench {
        #[arg(long, default_value_t = 100)]
        warm_up: usize,
        #[arg(long, default_value_t = 200)]
        rounds: usize,
        /// Tasks that sleep in the guest, for the rows of many tasks
        #[arg(long, value_delimiter = ',', default_value = "100,5000")]
        tasks: Vec<u32>,
    },
    /// Applies and reverts under load, with private and with shared RAM
    Cycles {
        #[arg(long, default_value_t = 1000)]
        count: usize,
        #[arg(long, value_delimiter = ',', default_value = "1,2,4")]
        vcpus: Vec<u32>,
        /// Private RAM alone
        #[arg(long)]
        private: bool,
    },
    /// Kills vmpatch, and its supervisor, at each step of a pause
    Kills {
        /// Shared RAM, of which data are written without a system call
        #[arg(long)]
        shared: bool,
    },
}

fn main() {
    let in_box = in_box();
    let host = HostBox::start().unwrap_or_else(|error| panic!("{error}"));
    match Cli::parse().task {
        Task::Bench { warm_up, rounds, tasks } => bench(&host, &in_box, (warm_up, rounds), &tasks),
        Task::Cycles { count, vcpus, private } => {
            for vcpus in vcpus {
                for ram in [Ram::Private, Ram::SharedMemfd] {
                    if ram == Ram::Private || !private {
                        cycles(&host, &in_box, count, vcpus, ram);
                    }
                }
            }
        }
        Task::Kills { shared } => kills(&host, &in_box, if shared { Ram::SharedMemfd } else { Ram::Private }),
    }
    assert_clean(&host);
}

/// The program `in-box`, which is built together with this one.
fn in_box() -> PathBuf {
    let own = std::env::current_exe().expect("this program has a path");
    let program = own.with_file_name("in-box");
    assert!(
        program.exists(),
        "build it first: cargo build --release -p e2e --bin in-box"
    );
    program
}

fn bench(host: &HostBox, in_box: &Path, (warm_up, rounds): (usize, usize), tasks: &[u32]) {
    println!("2 vCPUs, µs: p50 / p99 / max; {rounds} rounds after {warm_up} to warm up");
    let boxed = Boxed::boot(host, in_box, Boxed::with_disk(host, 2, Ram::SharedMemfd));
    println!("idle\n{}", boxed.bench(warm_up, rounds, LIMIT));
    let work = boxed.start_work();
    println!("busy: disk, memory, callers\n{}", boxed.bench(warm_up, rounds, LIMIT));
    println!("{:?}", boxed.end_work(&work));
    assert_clean(&boxed.guest);
    drop(boxed);
    let config = kit::guest(Kernel::CLOUD_6_1).memory_mib(MEMORY_MIB);
    let boxed = Boxed::boot(host, in_box, config);
    for count in tasks {
        let wanted = count.to_string();
        let sleepers = boxed
            .guest
            .spawn(&["/opt/tasks", &wanted])
            .expect("the guest starts tasks");
        sleepers
            .wait_for_stdout("sleeping", START_LIMIT)
            .expect("the tasks start");
        println!("{count} tasks\n{}", boxed.bench(warm_up, rounds, LIMIT));
        sleepers.kill().expect("the tasks can be ended");
        sleepers.wait(START_LIMIT).expect("they end");
    }
    assert_clean(&boxed.guest);
}

fn cycles(host: &HostBox, in_box: &Path, count: usize, vcpus: u32, ram: Ram) {
    let boxed = Boxed::boot(host, in_box, Boxed::with_disk(host, vcpus, ram));
    let work = boxed.start_work();
    let told = boxed.cycles(count, LIMIT);
    println!("{vcpus} vCPUs, {ram:?}: {}", told.lines().last().unwrap_or_default());
    println!("{:?}", boxed.end_work(&work));
    boxed.look("at the end");
    assert_clean(&boxed.guest);
}

fn kills(host: &HostBox, in_box: &Path, ram: Ram) {
    let boxed = Boxed::boot(host, in_box, kit::guest(Kernel::CLOUD_6_1).ram(ram));
    let calls = [
        "watch",
        "seize",
        "interrupt",
        "thread-registers",
        "read-process",
        "detach",
        "release",
    ];
    let fixed = calls.into_iter().flat_map(|call| [(call, 1, false), (call, 1, true)]);
    let mut count = 0;
    for supervisor in [false, true] {
        let both = |step: Step| {
            [Command::Apply, Command::Revert].map(|command| boxed.cut_and_repeat(command, step, supervisor))
        };
        for step in fixed.clone() {
            assert_eq!(both(step), [true; 2], "{step:?}");
            count += 2;
        }
        for nth in 1..=WRITES_MAX {
            let reached = both(("write-process", nth, false));
            count += reached.iter().filter(|reached| **reached).count();
            if reached == [false; 2] {
                break;
            }
        }
    }
    println!("{count} kills");
    assert_clean(&boxed.guest);
}
