//! vmpatch, and its supervisor, killed by SIGKILL at each step of an apply and of a revert, many times: see `e2e::killing`. After each kill
//! the guest runs, is wholly old or wholly new, `status` says the same, and the same command works.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use e2e::bed::assert_healthy;
use e2e::cut::{Call, Side};
use e2e::killing::{Command, Stage, Victim, When};
use e2e::vmpatch;
use images::kernel::Kernel;

/// A kill in the pause comes within this time after the guest has stopped.
const PAUSE: Duration = Duration::from_millis(2);

/// System calls between which vmpatch is killed, in their order.
const CALLS: [(Call, &str); 5] = [
    (Call::Watch, "telling the supervisor of the change"),
    (Call::Pause, "pausing the guest"),
    (Call::WriteMemory, "writing code"),
    (Call::Resume, "letting the guest run"),
    (Call::Release, "dismissing the supervisor"),
];

/// Kills vmpatch and its supervisor at each step of an apply and of a revert, and prints a table of what came of it.
///
/// Ends with a failure at the first guest that is paused, half patched, not as `status` says, or complains; or where the same command does
/// not work afterwards.
#[derive(Parser)]
#[command(name = "kills")]
struct Cli {
    /// Kills of each kind
    #[arg(long, default_value_t = 100)]
    each: u32,
    /// Ends after so many seconds, with all kinds alike
    #[arg(long)]
    seconds: Option<u64>,
    /// Kernel of the guest: a short name (see `vmpatch-images list`) or a package
    #[arg(long, default_value = "6.1-cloud")]
    kernel: String,
}

/// A step at which is killed.
#[derive(Clone, Copy)]
enum Step {
    /// On that side of a system call.
    At(Call, Side, &'static str),
    /// In the pause, at any time.
    InPause,
    /// At any time.
    AnyTime,
}

impl Step {
    fn all() -> Vec<Self> {
        let calls = CALLS
            .into_iter()
            .flat_map(|(call, what)| [Side::Before, Side::Behind].map(|side| Self::At(call, side, what)));
        calls.chain([Self::InPause, Self::AnyTime]).collect()
    }

    fn name(self) -> String {
        match self {
            Self::At(_, Side::Before, what) => format!("before {what}"),
            Self::At(_, Side::Behind, what) => format!("after {what}"),
            Self::InPause => "in the pause, spread over 2 ms".to_owned(),
            Self::AnyTime => "spread over the whole run".to_owned(),
        }
    }

    /// When it is in the round of that number of all, in a command that takes that long.
    fn when(self, (round, all): (u32, u32), time: Duration) -> When {
        match self {
            Self::At(call, side, _) => When::At(call, side),
            Self::InPause => When::InPause(PAUSE * round / all),
            Self::AnyTime => When::After(time * round / all),
        }
    }
}

/// What came of the kills of one kind.
#[derive(Clone, Copy, Default)]
struct Row {
    kills: u32,
    /// The command ended by itself, before or in spite of the kill.
    ended: u32,
    /// Afterwards the guest was as the command makes it.
    done: u32,
    /// From the command's start to the end of it and its supervisor.
    longest: Duration,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kills: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Box<dyn std::error::Error>> {
    vmpatch::program()?;
    let mut stage = Stage::new(Kernel::named(&cli.kernel));
    let commands = [Command::Apply, Command::Revert];
    let times = commands.map(|command| stage.measure(command));
    let kinds: Vec<(Step, Victim)> = Step::all()
        .into_iter()
        .flat_map(|step| [(step, Victim::Worker), (step, Victim::Supervisor)])
        .collect();
    let mut table = vec![[Row::default(); 2]; kinds.len()];
    let start = Instant::now();
    for round in 0..cli.each {
        if cli.seconds.is_some_and(|limit| start.elapsed().as_secs() >= limit) {
            break;
        }
        for ((step, victim), rows) in kinds.iter().zip(&mut table) {
            for ((command, time), row) in commands.into_iter().zip(times).zip(rows) {
                let when = step.when((round, cli.each), time);
                let (answer, seen) = stage.cut_and_repeat(command, when, *victim);
                row.kills += 1;
                row.ended += u32::from(answer.code.is_some());
                row.done += u32::from(seen == command.aim());
                row.longest = row.longest.max(answer.took);
            }
        }
        assert_healthy(&stage.guest);
        eprintln!("round {} of {}, {} s", round + 1, cli.each, start.elapsed().as_secs());
    }
    println!(
        "{} in {} s; apply and revert take {times:?} alone",
        cli.kernel,
        start.elapsed().as_secs()
    );
    println!("| killed | when | command | kills | ended by itself | done afterwards | longest, with its supervisor |");
    println!("|---|---|---|---|---|---|---|");
    for ((step, victim), rows) in kinds.iter().zip(&table) {
        for (command, row) in commands.iter().zip(rows) {
            let Row {
                kills,
                ended,
                done,
                longest,
            } = row;
            let (victim, command) = (
                format!("{victim:?}").to_lowercase(),
                format!("{command:?}").to_lowercase(),
            );
            let when = step.name();
            println!(
                "| {victim} | {when} | {command} | {kills} | {ended} | {done} | {} ms |",
                longest.as_millis()
            );
        }
    }
    Ok(())
}
