//! What the tests run inside a host in a box, beside vmpatch: see `e2e::in_box`. Nobody else runs it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};
use e2e::cut::{Call, Side};
use e2e::in_box::cut_off::Cut;
use e2e::in_box::{self, bench, cut_off, cycles};

#[derive(Parser)]
#[command(name = "in-box")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Compares pauses.
    Bench {
        name: String,
        vmpatch: PathBuf,
        module: PathBuf,
        socket: PathBuf,
        warm_up: usize,
        rounds: usize,
    },
    /// Applies and reverts again and again.
    Cycles {
        name: String,
        vmpatch: PathBuf,
        module: PathBuf,
        count: usize,
    },
    /// Kills vmpatch, or its supervisor, at a system call.
    Cut {
        /// The process whose threads must be free afterwards.
        pid: u32,
        call: CallName,
        nth: usize,
        /// Behind the call, not before it.
        #[arg(long)]
        behind: bool,
        #[arg(long)]
        supervisor: bool,
        #[arg(last = true)]
        command: Vec<String>,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum CallName {
    Watch,
    Seize,
    Interrupt,
    ThreadRegisters,
    ReadProcess,
    WriteProcess,
    Detach,
    Release,
}

impl From<CallName> for Call {
    fn from(name: CallName) -> Self {
        match name {
            CallName::Watch => Self::Watch,
            CallName::Seize => Self::Seize,
            CallName::Interrupt => Self::Interrupt,
            CallName::ThreadRegisters => Self::ThreadRegisters,
            CallName::ReadProcess => Self::ReadProcess,
            CallName::WriteProcess => Self::WriteProcess,
            CallName::Detach => Self::Detach,
            CallName::Release => Self::Release,
        }
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("in-box: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> in_box::Result<()> {
    match task {
        Task::Bench {
            name,
            vmpatch,
            module,
            socket,
            warm_up,
            rounds,
        } => bench::run(&name, &vmpatch, &module, &socket, (warm_up, rounds)),
        Task::Cycles {
            name,
            vmpatch,
            module,
            count,
        } => cycles::run(&name, &vmpatch, &module, count),
        Task::Cut {
            pid,
            call,
            nth,
            behind,
            supervisor,
            command,
        } => {
            let (program, args) = command.split_first().ok_or("no command")?;
            let side = match behind {
                true => Side::Behind,
                false => Side::Before,
            };
            let cut = Cut {
                call: call.into(),
                nth,
                side,
                supervisor,
            };
            println!("{}", cut_off::run(program.as_ref(), args, cut, pid)?);
            Ok(())
        }
    }
}
