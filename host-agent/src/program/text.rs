//! Reports as text, for people.

use super::report::{DomainLine, Guest, Inspection, Patch, Patches, Upgrade, Verified};
use std::fmt::Write;

/// `finish`: as [`patches`], but where no patch is in transition.
pub fn finished(report: &Patches) -> String {
    match report.patches.as_slice() {
        [] => format!(
            "{}: kernel {}: no patch is in transition\n",
            shown(&report.guest),
            report.guest.release
        ),
        _ => patches(report),
    }
}

/// `apply`, `check`, `revert`, `status` and the bare command: a line for each patch and function, and a closing one.
pub fn patches(report: &Patches) -> String {
    let guest = shown(&report.guest);
    let mut text = String::new();
    for patch in &report.patches {
        one_patch(&mut text, patch);
    }
    let _ = match report.patches.as_slice() {
        [] => writeln!(text, "{guest}: kernel {}, no patches", report.guest.release),
        some => {
            let pause = some
                .iter()
                .filter_map(|patch| patch.pause.map(|pause| pause.pause_us_max))
                .max();
            let pause = pause.map_or(String::new(), |us| format!(", paused for {us} µs"));
            let mut states: Vec<(&str, usize)> = Vec::new();
            for patch in some {
                match states.iter_mut().find(|(state, _)| *state == patch.state) {
                    Some((_, count)) => *count += 1,
                    None => states.push((&patch.state, 1)),
                }
            }
            let states: Vec<_> = states.iter().map(|(state, count)| format!("{count} {state}")).collect();
            writeln!(
                text,
                "{guest}: kernel {}: {}{pause}",
                report.guest.release,
                states.join(", ")
            )
        }
    };
    if let Some(warning) = report
        .guest
        .integrity_guard
        .as_ref()
        .and_then(|guard| guard.warning.as_ref())
    {
        let _ = writeln!(text, "{guest}: {warning}");
    }
    if let Some(due) = &report.upgrade_due {
        let _ = writeln!(text, "{guest}: {due}");
    }
    text
}

fn shown(guest: &Guest) -> String {
    let process = || format!("process {}", guest.pid);
    guest.domain.clone().unwrap_or_else(process)
}

/// `upgrade`.
pub fn upgrade(report: &Upgrade) -> String {
    let mut text = String::new();
    for patch in &report.patches {
        one_patch(&mut text, patch);
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    let (
        guest,
        Upgrade {
            old,
            new,
            method,
            machine,
            ..
        },
    ) = (shown(&report.guest), report);
    let ms = |us: u64| format!("{}.{} ms", us / 1000, us % 1000 / 100);
    let _ = match new.pid {
        Some(pid) => writeln!(
            text,
            "{guest}: moved from QEMU {} to {} ({machine}, now process {pid}) by {method} in {} ms{}",
            old.qemu,
            new.qemu,
            report.total_ms.unwrap_or(0),
            report
                .downtime_us
                .map_or(", paused".to_owned(), |us| format!(", paused for {}", ms(us)))
        ),
        None => writeln!(
            text,
            "{guest}: would move from QEMU {} to {} ({machine}) by {method}; {}",
            old.qemu,
            new.qemu,
            match method.as_str() {
                "precopy" => "it will be paused for some ten milliseconds, longer where it writes much",
                _ => "it will be paused for some ten milliseconds",
            }
        ),
    };
    text
}

fn one_patch(text: &mut String, patch: &Patch) {
    let reason = patch
        .reason
        .as_ref()
        .map_or(String::new(), |reason| format!(": {reason}"));
    let _ = writeln!(text, "{}: {}{reason}", patch.id, patch.state);
    if let Some(module) = &patch.module {
        let mut row = |name: &str, value: Option<&str>| {
            let _ = value.map(|value| writeln!(text, "  {name:<11} {value}"));
        };
        row("description", module.description.as_deref());
        row("format", Some(module.format));
        row("vermagic", Some(&module.vermagic));
        row("version", module.version.as_deref());
        row("srcversion", module.srcversion.as_deref());
        row("build ID", module.build_id.as_deref());
        row("SHA-256", patch.digest.as_deref());
    }
    for function in &patch.functions {
        let position = if function.sympos == 0 {
            String::new()
        } else {
            format!(",{}", function.sympos)
        };
        let redirect = format!("{:?}", function.redirect).to_lowercase();
        let object = function
            .object
            .as_ref()
            .map_or(String::new(), |object| format!("{object}:"));
        let by = function
            .overridden_by
            .as_ref()
            .map_or(String::new(), |id| format!(" by {id}"));
        let _ = writeln!(
            text,
            "  {object}{}{position}: {}{by} ({redirect}, {:#x} → {:#x})",
            function.name, function.state, function.old.0, function.new.0
        );
    }
    if !patch.replaces.is_empty() {
        let _ = writeln!(text, "  replaces {}", patch.replaces.join(", "));
    }
    if let Some(line) = patch.verified.and_then(Verified::line) {
        let _ = writeln!(text, "  {line}");
    }
    for object in &patch.pending {
        let _ = writeln!(text, "  {object}: pending, the guest has not loaded it");
    }
    for warning in &patch.warnings {
        let _ = writeln!(text, "  warning: {warning}");
    }
}

/// `inspect`.
pub fn inspection(report: &Inspection) -> String {
    let mut text = String::new();
    let mut row = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<12} {value}");
    };
    row("domain", report.guest.domain.clone().unwrap_or_default());
    let program = match report.qemu.as_str() {
        "" => String::new(),
        version => format!("QEMU {version}, "),
    };
    row(
        "process",
        format!("{} ({program}{})", report.guest.pid, report.accelerator),
    );
    row(
        "guest",
        format!("{} vCPUs, {} MiB", report.vcpus, report.ram.div_ceil(1 << 20)),
    );
    row("kernel", report.banner.clone());
    row(
        "image",
        format!(
            "{:#x}, {} KiB, at GPA {:#x}",
            report.image.start.0,
            report.image.len >> 10,
            report.image_physical.0
        ),
    );
    row(
        "page tables",
        format!(
            "{} levels, root at GPA {:#x}",
            report.page_table_levels, report.page_table_root.0
        ),
    );
    row("symbols", format!("{}, types {}", report.symbols, report.types));
    for cave in &report.caves {
        row("cave", format!("{:#x}, {} KiB", cave.start.0, cave.len >> 10));
    }
    match &report.registry {
        Some(registry) => row(
            "registry",
            format!("{:#x}, {} KiB", registry.start.0, registry.len >> 10),
        ),
        None => row("registry", "none: this guest holds no patches".to_owned()),
    }
    for source in &report.sources {
        row("source", source.clone());
    }
    text
}

/// `domains`.
pub fn domains(lines: &[DomainLine]) -> String {
    let unknown = || "-".to_owned();
    let mut rows = vec![["NAME", "PID", "ACCEL", "KERNEL", "PATCHES"].map(str::to_owned)];
    rows.extend(lines.iter().map(|line| {
        let patches = match (&line.error, line.patches.as_slice()) {
            (Some(error), _) => format!("({error})"),
            (None, []) => unknown(),
            (None, some) => some.join(" "),
        };
        [
            line.name.clone().unwrap_or_else(unknown),
            line.pid.to_string(),
            line.accelerator.clone().unwrap_or_else(unknown),
            line.kernel.clone().unwrap_or_else(unknown),
            patches,
        ]
    }));
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..4).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in &rows {
        let [name, pid, accelerator, kernel, patches] = row;
        let cells = [name, pid, accelerator, kernel].into_iter().zip(&widths);
        let cells: Vec<_> = cells.map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}  {patches}", cells.join("  "));
    }
    text
}
