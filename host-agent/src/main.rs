//! The `vmpatch` program: reads the command line, runs a command, prints its report.

#![deny(clippy::print_stdout, clippy::print_stderr)]

use clap::Parser;
use host_agent::cli::{Cli, Command};
use host_agent::error::Failure;
use host_agent::progress::Progress;
use host_agent::{commands, output, supervisor, text, upgrade};
use serde::Serialize;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.options.json;
    let progress = Progress::new(cli.options.verbose);
    let result = run(&cli, &progress);
    progress.clear();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            report_failure(&failure, json);
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(cli: &Cli, progress: &Progress) -> Result<(), Failure> {
    let options = &cli.options;
    let show = |report| print(options.json, progress, &report, text::patches);
    match &cli.command {
        None => {
            let (report, failure) = commands::update(options, progress)?;
            show(report)?;
            failure.map_or(Ok(()), Err)
        }
        Some(Command::Apply { files }) => show(commands::apply(options, files, progress)?),
        Some(Command::Build(build)) => {
            let (report, failure) = commands::build(build, progress)?;
            let as_text = |report: &_| text::building(report, build.explain);
            // Without --explain, a refusal's own words are all that a person needs.
            if options.json || build.explain || failure.is_none() {
                print(options.json, progress, &report, as_text)?;
            }
            failure.map_or(Ok(()), Err)
        }
        Some(Command::Check { files }) => show(commands::check(options, files, progress)?),
        Some(Command::Revert { ids, .. }) => show(commands::revert(options, ids, progress)?),
        Some(Command::Status) => show(commands::status(options, progress)?),
        Some(Command::Inspect) => print(
            options.json,
            progress,
            &commands::inspect(options, progress)?,
            text::inspection,
        ),
        Some(Command::Domains) => print(options.json, progress, &commands::domains(progress)?, |lines| {
            text::domains(lines)
        }),
        Some(Command::Upgrade(wanted)) => {
            let report = upgrade::run(options, wanted, progress)?;
            print(options.json, progress, &report, text::upgrade)
        }
        Some(Command::Supervise { socket }) => supervisor::supervise(socket),
        Some(Command::Launch) => Ok(upgrade::launch::launch()?),
        Some(Command::WatchMove {
            old,
            was_running,
            socket,
            taps,
        }) => upgrade::watch::watch(*old, *was_running, socket, taps),
    }
}

fn print<R: Serialize>(
    json: bool,
    progress: &Progress,
    report: &R,
    text: impl Fn(&R) -> String,
) -> Result<(), Failure> {
    progress.clear();
    let text = if json {
        serde_json::to_string_pretty(report).map_err(|error| Failure::Output(error.into()))? + "\n"
    } else {
        text(report)
    };
    output::report(&text).map_err(Failure::Output)
}

/// The chain of causes once, in one line, and a hint where there is one.
fn report_failure(failure: &Failure, json: bool) {
    let chain = failure.chain();
    if json && !matches!(failure, Failure::Incomplete { .. } | Failure::NotAllowed { .. }) {
        let document =
            serde_json::json!({ "error": chain.join(": "), "causes": chain, "exit_code": failure.exit_code() });
        // The exit code and standard error say the same.
        let _ = output::report(&format!("{document:#}\n"));
    }
    output::message(&format!("vmpatch: {}\n", chain.join(": ")));
    if let Some(hint) = failure.hint() {
        output::message(&format!("hint: {hint}\n"));
    }
}
