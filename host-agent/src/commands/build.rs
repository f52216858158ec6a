//! `build`: a livepatch module from a source change. No guest is needed.

use crate::cli::BuildOptions;
use crate::error::Failure;
use crate::progress::Progress;
use crate::report::Building;
use patch_build::build::Built;
use patch_build::cache::Cache;
use patch_build::request::{self, Request};
use std::fs;
use std::path::{Path, PathBuf};

/// Builds the module and writes its file. Where something speaks against it, the report says what, and nothing is written.
pub fn build(options: &BuildOptions, progress: &Progress) -> Result<(Building, Option<Failure>), Failure> {
    let cache = Cache::from_env().map_err(Failure::Cache)?;
    let diff = match &options.patch {
        Some(path) => Some(fs::read_to_string(path).map_err(failed(path))?),
        None => None,
    };
    let request = Request {
        kernel: options.kernel(),
        change: options.change(diff),
        name: options.name(),
        version: options.patch_version.clone(),
        description: options.description.clone(),
        cves: options.cve.clone(),
        builder: concat!("vmpatch ", env!("CARGO_PKG_VERSION")).to_owned(),
        allow: options.allow.iter().copied().collect(),
    };
    let built = request::build(&cache, &request, &|what| progress.step(what), &|what| {
        progress.warning(what)
    })
    .map_err(|source| Failure::Build {
        name: request.name.clone(),
        source: Box::new(source),
    })?;
    match built {
        Built::Nothing => Err(Failure::NothingToBuild),
        Built::Module { bytes, sheet } => {
            if let Some(path) = &options.output {
                write(path, &bytes)?;
            }
            let file = options.output.as_ref().map(|path| path.display().to_string());
            Ok((
                Building {
                    file,
                    bytes: bytes.len(),
                    sheet,
                },
                None,
            ))
        }
        Built::Refused { findings, sheet } => {
            let mut risks: Vec<&str> = findings.iter().map(|finding| finding.risk.name()).collect();
            risks.dedup();
            let failure = Failure::NotAllowed {
                name: request.name,
                findings: findings
                    .iter()
                    .map(|finding| format!("{}: {} ({})", finding.place, finding.reason, finding.risk))
                    .collect(),
            };
            Ok((
                Building {
                    file: None,
                    bytes: 0,
                    sheet,
                },
                Some(failure),
            ))
        }
    }
}

/// Writes the file under another name first: one that is cut off must not pass for a module.
fn write(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    fs::write(&partial, bytes).map_err(failed(path))?;
    fs::rename(&partial, path).map_err(failed(path))
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Failure {
    let path = path.to_owned();
    move |source| Failure::File { path, source }
}
