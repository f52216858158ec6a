//! The `vmpatch` program: reads the command line, runs a command, prints its report.

#![deny(clippy::print_stdout, clippy::print_stderr)]

use clap::Parser;
use host_agent::cli::{Cli, Command};
use host_agent::error::Failure;
use host_agent::progress::Progress;
use host_agent::report::Patches;
use host_agent::state::GuestState;
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
    let show = |report: Patches| print(options.json, progress, &report, report.changed(), text::patches);
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
                print(options.json, progress, &report, false, as_text)?;
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
            false,
            text::inspection,
        ),
        Some(Command::Domains) => {
            let lines = commands::domains(progress)?;
            print(options.json, progress, &lines, false, |lines| text::domains(lines))
        }
        Some(Command::Upgrade(wanted)) => {
            let report = upgrade::run(options, wanted, progress)?;
            print(options.json, progress, &report, report.moved(), text::upgrade)
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

/// Prints a report of a command that has `changed` the guest or not.
fn print<R: Serialize>(
    json: bool,
    progress: &Progress,
    report: &R,
    changed: bool,
    text: impl Fn(&R) -> String,
) -> Result<(), Failure> {
    progress.clear();
    let text = if json {
        serde_json::to_string_pretty(report).map_err(|error| Failure::Output(error.into()))? + "\n"
    } else {
        text(report)
    };
    let state = if changed {
        GuestState::InForce
    } else {
        GuestState::AsBefore
    };
    output::report(&text).map_err(|error| Failure::Output(error).after(state))
}

/// The chain of causes once, in one line, what the guest is like where it is not as before, and a hint where there is one.
fn report_failure(failure: &Failure, json: bool) {
    if json && !matches!(failure, Failure::Incomplete { .. } | Failure::NotAllowed { .. }) {
        let document = serde_json::Value::Object(failure.members());
        // The exit code and standard error say the same.
        let _ = output::report(&format!("{document:#}\n"));
    }
    output::message(&format!("vmpatch: {}\n", failure.chain().join(": ")));
    if let Some(sentence) = failure.guest_state().sentence() {
        output::message(&format!("guest: {sentence}\n"));
    }
    if let Some(hint) = failure.hint() {
        output::message(&format!("hint: {hint}\n"));
    }
}
