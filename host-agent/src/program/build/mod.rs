//! `build`: a livepatch module from a source change. No guest is needed.

mod failure;
mod options;
pub mod report;

pub use failure::BuildError;
pub use options::BuildOptions;

use self::report::Building;
use patch_build::build::Built;
use patch_build::cache::Cache;
use patch_build::request::{self, Request};
use std::fs;
use std::path::{Path, PathBuf};

/// Builds the module and writes its file. Where something speaks against it, the report says what, and nothing is written.
pub fn build(options: &BuildOptions) -> Result<(Building, Option<BuildError>), BuildError> {
    let cache = Cache::from_env().map_err(BuildError::Cache)?;
    let diff = match &options.patch {
        Some(path) => Some(fs::read_to_string(path).map_err(failed("reading", path))?),
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
    let built = request::build(&cache, &request, &|what| tracing::debug!("{what}"), &|what| {
        tracing::warn!("{what}")
    })
    .map_err(|source| BuildError::Build {
        name: request.name.clone(),
        source: Box::new(source),
    })?;
    match built {
        Built::Nothing => Err(BuildError::NothingToBuild),
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
            let failure = BuildError::NotAllowed {
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
fn write(path: &Path, bytes: &[u8]) -> Result<(), BuildError> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    fs::write(&partial, bytes).map_err(failed("writing", path))?;
    fs::rename(&partial, path).map_err(failed("writing", path))
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::File { doing, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_step_and_the_file_that_failed() {
        let missing = Path::new("/no/such/folder/out.ko");
        assert_eq!(
            write(missing, b"").unwrap_err().to_string(),
            format!("writing {}", missing.display())
        );
        let options = |name: &str| crate::program::cli::build_options(&["--kernel", "k", name, "-o", "out.ko"]);
        assert_eq!(
            build(&options("/no/fix.patch")).unwrap_err().to_string(),
            "reading /no/fix.patch"
        );
    }
}
