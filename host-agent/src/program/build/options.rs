//! The options of `vmpatch build`.

use clap::Args;
use patch_build::request::{ChangeChoice, KernelChoice};
use patch_build::select::Risk;
use patch_build::target::Own;
use std::path::{Path, PathBuf};

/// What to build, and for which kernel.
#[derive(Debug, Clone, Args)]
pub struct BuildOptions {
    /// The change, as a unified diff (paths as in a/net/core/dev.c)
    #[arg(value_name = "FIX.patch", required_unless_present = "function")]
    pub patch: Option<PathBuf>,
    /// The kernel, by the Debian package that it comes in: NAME or NAME=VERSION
    #[arg(long, value_name = "PACKAGE", required_unless_present = "source")]
    pub kernel: Option<String>,
    /// The module to write; its name is that of the patch
    #[arg(short, long, value_name = "FILE.ko", required_unless_present = "explain")]
    pub output: Option<PathBuf>,
    /// In place of a diff: a function as --to has it, everything else as it was; may be given again
    #[arg(long, value_name = "FILE.c:NAME", requires_all = ["from", "to"], conflicts_with = "patch")]
    pub function: Vec<String>,
    /// The source package without the fix, as linux-source-6.1=6.1.170-3
    #[arg(long, value_name = "PACKAGE=VERSION", requires = "function")]
    pub from: Option<String>,
    /// The source package with the fix
    #[arg(long, value_name = "PACKAGE=VERSION", requires = "function")]
    pub to: Option<String>,
    /// Source of a kernel that is no Debian package, clean
    #[arg(long, value_name = "DIR", requires_all = ["headers", "vmlinux"], conflicts_with = "kernel")]
    pub source: Option<PathBuf>,
    /// What that kernel's modules are built with, as /lib/modules/RELEASE/build
    #[arg(long, value_name = "DIR", requires = "source")]
    pub headers: Option<PathBuf>,
    /// Its configuration, if not .config of --headers
    #[arg(long, value_name = "FILE", requires = "source")]
    pub config: Option<PathBuf>,
    /// That kernel: vmlinuz, or vmlinux; it has its own table of symbols
    #[arg(long, value_name = "FILE", requires = "source")]
    pub vmlinux: Option<PathBuf>,
    /// Its modules, as /lib/modules/RELEASE; only for patches of modules
    #[arg(long, value_name = "DIR", requires = "source")]
    pub modules: Option<PathBuf>,
    /// A risk to take, as the refusal names it; may be given again
    #[arg(long, value_name = "RISK", value_parser = risk)]
    pub allow: Vec<Risk>,
    /// Identifier of a flaw that it fixes; may be given again
    #[arg(long, value_name = "ID")]
    pub cve: Vec<String>,
    /// What it does, for people
    #[arg(long, value_name = "TEXT", default_value = "")]
    pub description: String,
    /// Version of the patch
    #[arg(long, value_name = "TEXT", default_value = "1")]
    pub patch_version: String,
    /// Show the review sheet: each function, why it is in, sizes, symbols, sections, warnings
    #[arg(long)]
    pub explain: bool,
}

impl BuildOptions {
    /// The kernel that was chosen.
    pub fn kernel(&self) -> KernelChoice {
        match (&self.kernel, &self.source) {
            (Some(package), _) => KernelChoice::Package(package.clone()),
            (None, source) => KernelChoice::Own(Own {
                source: source.clone().unwrap_or_default(),
                headers: self.headers.clone().unwrap_or_default(),
                config: self.config.clone(),
                image: self.vmlinux.clone().unwrap_or_default(),
                modules: self.modules.clone(),
            }),
        }
    }

    /// The change that was chosen; the diff's text where it is one.
    pub fn change(&self, diff: Option<String>) -> ChangeChoice {
        match (&self.patch, diff) {
            (Some(path), Some(text)) => ChangeChoice::Patch {
                name: file_name(path),
                text,
            },
            _ => ChangeChoice::Functions {
                from: self.from.clone().unwrap_or_default(),
                to: self.to.clone().unwrap_or_default(),
                names: self.function.clone(),
            },
        }
    }

    /// The module's name: that of its file, else of the diff.
    pub fn name(&self) -> String {
        let path = self.output.as_deref().or(self.patch.as_deref());
        let stem = path
            .and_then(Path::file_stem)
            .map(|stem| stem.to_string_lossy().into_owned());
        stem.unwrap_or_else(|| "livepatch".to_owned())
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map_or_else(
        || path.display().to_string(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn risk(text: &str) -> Result<Risk, String> {
    text.parse().map_err(|_| {
        let all: Vec<&str> = Risk::all().map(Risk::name).collect();
        format!("no such risk; there are {}", all.join(", "))
    })
}

#[cfg(test)]
mod tests {
    use crate::program::cli::{Cli, Command};
    use clap::Parser;

    fn parsed(line: &str) -> Result<super::BuildOptions, String> {
        let words = ["vmpatch", "build"].into_iter().chain(line.split_whitespace());
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Some(Command::Build(options)) => Ok(*options),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn a_diff_or_functions_of_two_versions_are_wanted_but_not_both() {
        let patch = parsed("--kernel k fix.patch -o livepatch-a.ko").unwrap();
        assert_eq!(patch.name(), "livepatch-a");
        assert!(parsed("--kernel k --from a=1 --to a=2 --function x.c:f -o a.ko").is_ok());
        for line in [
            "--kernel k -o a.ko",
            "--kernel k --from a=1 --to a=2 -o a.ko",
            "--kernel k --function x.c:f -o a.ko",
            "--kernel k --from a=1 --to a=2 --function x.c:f fix.patch -o a.ko",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_kernel_is_a_package_or_all_that_a_kernel_of_ones_own_takes() {
        assert!(parsed("--source s --headers h --vmlinux v fix.patch -o a.ko").is_ok());
        for line in [
            "fix.patch -o a.ko",
            "--source s fix.patch -o a.ko",
            "--kernel k --source s --headers h --vmlinux v fix.patch -o a.ko",
            "--kernel k --config c fix.patch -o a.ko",
        ] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[test]
    fn the_review_sheet_needs_no_file_to_write() {
        assert!(parsed("--kernel k fix.patch").is_err());
        assert_eq!(parsed("--kernel k fix.patch --explain").unwrap().name(), "fix");
    }

    #[test]
    fn an_unknown_risk_is_refused_with_those_that_there_are() {
        let error = parsed("--kernel k fix.patch -o a.ko --allow everything").unwrap_err();
        assert!(error.contains("there are changed-data, "), "{error}");
    }
}
