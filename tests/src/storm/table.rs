//! The result of storms in Markdown.

use super::run::Report;

/// Names of the columns.
const HEADING: &str = "| kernel | vCPUs | storm | cycles | applied | reverted | exit 4 | refused | failed | calls old / new / mixed / lost | longest pause | the guest's rounds | time |\n\
                       |---|---|---|---|---|---|---|---|---|---|---|---|---|\n";

/// A line for each.
pub fn markdown(reports: &[Report]) -> String {
    let lines = reports.iter().map(line);
    HEADING.to_owned() + &lines.collect::<String>()
}

fn line(report: &Report) -> String {
    let Report { outcomes, calls, .. } = report;
    let rounds: u64 = report.work.iter().map(|(_, rounds)| rounds.rounds).sum();
    let cells = [
        report.kernel.clone(),
        report.vcpus.to_string(),
        report.storm.to_owned(),
        outcomes.cycles.to_string(),
        outcomes.applied.to_string(),
        outcomes.reverted.to_string(),
        outcomes.not_safe_in_all().to_string(),
        outcomes.refused_in_all().to_string(),
        report.wrong.len().to_string(),
        format!("{} / {} / {} / {}", calls.old, calls.new, calls.mixed, calls.lost),
        format!("{:.1} ms", outcomes.pause_us_max as f64 / 1000.0),
        rounds.to_string(),
        format!("{} s", report.took.as_secs()),
    ];
    format!("| {} |\n", cells.join(" | "))
}
