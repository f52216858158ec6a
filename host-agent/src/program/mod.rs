//! The program `vmpatch`: command line, text and JSON, progress, hints, exit codes. What it does with guests is the library's.

#[cfg(feature = "build")]
mod build;
mod cli;
mod commands;
mod failure;
mod output;
mod progress;
mod report;
mod text;

use self::cli::{Cli, Command};
use self::failure::{Failure, exit_code, guest, hint, json};
use self::progress::Progress;
use self::report::Patches;
use host_agent::outcome::GuestState;
use host_agent::supervisor::{self, Supervised};
use host_agent::upgrade;
use serde::Serialize;
use std::io;
use std::process::ExitCode;

/// Runs what the command line asks for.
pub fn run() -> ExitCode {
    let cli = cli::parse();
    let json = cli.options.json;
    let progress = Progress::install(cli.options.verbose);
    let result = carry_out(&cli, &progress);
    progress.clear();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(Ended { failure, is_reported }) => {
            report_failure(&failure, json && !is_reported);
            ExitCode::from(exit_code::of(&failure))
        }
    }
}

/// Why a command ends with a failure.
struct Ended {
    failure: Failure,
    /// The report on standard output has it, or was to have it.
    is_reported: bool,
}

impl<F: Into<Failure>> From<F> for Ended {
    fn from(failure: F) -> Self {
        Self {
            failure: failure.into(),
            is_reported: false,
        }
    }
}

fn carry_out(cli: &Cli, progress: &Progress) -> Result<(), Ended> {
    let options = &cli.options;
    let printer = Printer {
        json: options.json,
        progress,
    };
    let show = |report: Patches, failure: Option<Failure>, is_shown: bool| {
        printer.conclude(&report, report.changed(), failure, is_shown, text::patches)
    };
    match &cli.command {
        None => {
            let (report, failure) = commands::update(options)?;
            show(report, failure, true)
        }
        Some(Command::Apply { files }) => {
            let (report, failure) = commands::apply(options, files)?;
            // Where nothing was done, the failure's own words are all that a person needs; so below.
            let is_shown = failure.is_none() || report.changed();
            show(report, failure, is_shown)
        }
        #[cfg(feature = "build")]
        Some(Command::Build(build)) => {
            let (report, failure) = build::build(build).map_err(Failure::from)?;
            let is_shown = build.explain || failure.is_none();
            printer.conclude(&report, false, failure.map(Failure::from), is_shown, |report| {
                build::report::text(report, build.explain)
            })
        }
        Some(Command::Check { files }) => show(commands::check(options, files)?, None, true),
        Some(Command::Revert { ids, .. }) => {
            let (report, failure) = commands::revert(options, ids)?;
            let is_shown = failure.is_none() || report.changed();
            show(report, failure, is_shown)
        }
        Some(Command::Finish) => {
            let (report, failure) = commands::finish(options)?;
            printer.conclude(&report, report.changed(), failure, true, text::finished)
        }
        Some(Command::Status) => show(commands::status(options)?, None, true),
        Some(Command::Inspect) => printer.print(&commands::inspect(options)?, text::inspection),
        Some(Command::Domains) => printer.print(&commands::domains(options)?, |lines| text::domains(lines)),
        Some(Command::Upgrade(wanted)) => {
            let report = commands::upgrade(options, wanted)?;
            printer.conclude(&report, report.moved(), None, true, text::upgrade)
        }
        Some(Command::Supervise { route }) => {
            if let Some(supervised) = supervisor::supervise(route).map_err(Failure::from)? {
                say_killed(match supervised {
                    Supervised::Stayed => "the change is complete and stays, and the guest runs on",
                    Supervised::RolledBack => "the change was taken back, and the guest runs on",
                });
            }
            Ok(())
        }
        Some(Command::Launch) => Ok(upgrade::launch::launch().map_err(Failure::from)?),
        Some(Command::WatchMove {
            old,
            was_running,
            socket,
            taps,
        }) => {
            let recovered = upgrade::watch::watch(*old, *was_running, socket, taps).map_err(Failure::from)?;
            if let Some(recovered) = recovered {
                say_killed(&recovered.to_string());
            }
            Ok(())
        }
    }
}

/// What a process says that outlived the vmpatch that started it.
fn say_killed(what: &str) {
    output::message(&format!("vmpatch: its process was killed; {what}\n"));
}

/// Prints reports.
struct Printer<'a> {
    json: bool,
    progress: &'a Progress,
}

impl Printer<'_> {
    /// The report of a command that changes no guest.
    fn print<R: Serialize>(&self, report: &R, text: impl Fn(&R) -> String) -> Result<(), Ended> {
        self.conclude(report, false, None, true, text)
    }

    /// The report of a command that has `changed` the guest or not, and in JSON the failure with which it ended; the text only where
    /// it `is_shown`.
    fn conclude<R: Serialize>(
        &self,
        report: &R,
        changed: bool,
        failure: Option<Failure>,
        is_shown: bool,
        text: impl Fn(&R) -> String,
    ) -> Result<(), Ended> {
        self.progress.clear();
        let text = match (self.json, is_shown) {
            (true, _) => document(report, failure.as_ref()),
            (false, true) => Ok(text(report)),
            (false, false) => Ok(String::new()),
        };
        let written = text.and_then(|text| output::report(&text));
        let failure = match (written, failure) {
            (Ok(()), failure) => failure,
            (Err(error), Some(failure)) if !changed => {
                report_failure(&Failure::Output(error), false);
                Some(failure)
            }
            (Err(error), Some(failure)) => {
                report_failure(&failure, false);
                Some(Failure::Output(error).after(GuestState::PartlyDone))
            }
            (Err(error), None) => Some(Failure::Output(error).after(match changed {
                true => GuestState::InForce,
                false => GuestState::AsBefore,
            })),
        };
        let is_reported = true;
        failure.map_or(Ok(()), |failure| Err(Ended { failure, is_reported }))
    }
}

/// A report as JSON, with the members of the failure, if any.
fn document<R: Serialize>(report: &R, failure: Option<&Failure>) -> io::Result<String> {
    let text = match failure {
        None => serde_json::to_string_pretty(report)?,
        Some(failure) => {
            let mut document = serde_json::to_value(report)?;
            if let Some(members) = document.as_object_mut() {
                members.extend(json::members(failure));
            }
            serde_json::to_string_pretty(&document)?
        }
    };
    Ok(text + "\n")
}

/// The chain of causes once, in one line, what the guest is like where it is not as before, and a hint where there is one.
fn report_failure(failure: &Failure, json: bool) {
    if json {
        let document = serde_json::Value::Object(json::members(failure));
        // The exit code and standard error say the same.
        let _ = output::report(&format!("{document:#}\n"));
    }
    output::message(&format!("vmpatch: {}\n", failure.chain().join(": ")));
    if let Some(sentence) = guest::sentence(failure.guest_state()) {
        output::message(&format!("guest: {sentence}\n"));
    }
    if let Some(hint) = hint::of(failure) {
        output::message(&format!("hint: {hint}\n"));
    }
}
