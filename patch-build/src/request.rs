//! The whole way from what a person asks for to a module.

use std::collections::BTreeSet;

use guest_core::module::Note;

use crate::build::{self, Built, Compile, Inputs};
use crate::cache::Cache;
use crate::facts::{self, KernelFacts, Sources};
use crate::select::Risk;
use crate::source::change::{self, Change};
use crate::target::{self, Own, Target};
use crate::tree::{self, Tree};
use crate::{compile, touched};

/// Longest name of a module (include/linux/moduleparam.h, `MODULE_NAME_LEN` of 64-bit kernels, without the zero byte).
const NAME_BYTES_MAX: usize = 55;

/// What is to be built.
#[derive(Clone, Debug)]
pub struct Request {
    /// The kernel.
    pub kernel: KernelChoice,
    /// The change.
    pub change: ChangeChoice,
    /// The module's name, as the kernel will list it (with `-` for `_`, if so written).
    pub name: String,
    /// Its version, as the builder counts.
    pub version: String,
    /// What it does, for people.
    pub description: String,
    /// Identifiers of the flaws that it fixes.
    pub cves: Vec<String>,
    /// What makes it; the compiler is added.
    pub builder: String,
    /// Risks that are taken.
    pub allow: BTreeSet<Risk>,
}

/// Which kernel to build for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelChoice {
    /// The one in that Debian package: `NAME` or `NAME=VERSION`.
    Package(String),
    /// One that is no Debian package.
    Own(Own),
}

/// What to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeChoice {
    /// A unified diff.
    Patch {
        /// What it is called.
        name: String,
        /// Its text.
        text: String,
    },
    /// Functions as a newer version of the distribution's source has them.
    Functions {
        /// The older version: `PACKAGE=VERSION`.
        from: String,
        /// The newer one.
        to: String,
        /// The functions: `FILE:NAME`.
        names: Vec<String>,
    },
}

/// Why nothing could be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No module can be called that.
    #[error("{name:?} can't be a module's name: letters, digits, - and _, at most {NAME_BYTES_MAX} of them")]
    Name {
        /// What was asked for.
        name: String,
    },
    /// The kernel is not known well enough.
    #[error(transparent)]
    Target(#[from] target::Error),
    /// The change could not be made.
    #[error(transparent)]
    Change(#[from] change::Error),
    /// The source could not be made ready.
    #[error(transparent)]
    Tree(#[from] tree::Error),
    /// The kernel's files could not be read.
    #[error(transparent)]
    Facts(#[from] facts::Error),
    /// The files to compile could not be told, or not compiled.
    #[error(transparent)]
    Touched(#[from] touched::Error),
    /// The changed files could not be compiled.
    #[error(transparent)]
    Compile(#[from] compile::Error),
    /// No module could be made of what was compiled.
    #[error(transparent)]
    Build(#[from] build::BuildError),
}

impl Error {
    /// Whether the change or the kernel does not fit, as opposed to something going wrong on this machine.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Name { .. } | Self::Build(_) => true,
            Self::Target(error) => matches!(error, target::Error::NoSeries { .. } | target::Error::NoRelease { .. }),
            Self::Change(change::Error::Package(_) | change::Error::Files(_)) => false,
            Self::Change(_) => true,
            Self::Tree(error) => matches!(error, tree::Error::Config { .. } | tree::Error::Toolchain(_)),
            Self::Touched(touched::Error::Compile(error)) | Self::Compile(error) => is_refusal_of_code(error),
            Self::Touched(touched::Error::Files(_) | touched::Error::Modules(_) | touched::Error::Plan(_))
            | Self::Facts(_) => false,
            Self::Touched(_) => true,
        }
    }
}

fn is_refusal_of_code(error: &compile::Error) -> bool {
    !matches!(error, compile::Error::Cache(_) | compile::Error::Before { .. })
}

/// Builds what is asked for: fetches and prepares what is not in the cache, changes the source, compiles, compares, writes.
///
/// `progress` is told what takes time, `warning` what the operator has to know: what of the change is left out.
pub fn build(
    cache: &Cache,
    request: &Request,
    progress: &dyn Fn(&str),
    warning: &dyn Fn(&str),
) -> Result<Built, Error> {
    check_name(&request.name)?;
    let target = match &request.kernel {
        KernelChoice::Package(name) => Target::package(cache, name, progress)?,
        KernelChoice::Own(own) => Target::own(own)?,
    };
    let change = match &request.change {
        ChangeChoice::Patch { name, text } => Change::patch(&target.source, name, text)?,
        ChangeChoice::Functions { from, to, names } => {
            Change::functions(cache, &target.source, from, to, names, progress)?
        }
    };
    let tree = Tree::prepare(cache, &target, progress)?;
    progress("reading the kernel's symbols");
    let facts = KernelFacts::read(&Sources {
        release: &target.release,
        vermagic: tree.vermagic(),
        config: &target.config,
        image: &target.image,
        symvers: &target.symvers,
        modules: target.modules.clone(),
    })?;
    let touched = touched::find(&tree, &facts, &change, progress)?;
    for (file, why) in change.left_out.iter().chain(&touched.left_out) {
        warning(&format!("{file} is left out: {why}"));
    }
    let pairs = compile::after(&tree, touched.units, &change.files, progress)?;
    progress("comparing");
    let mut sources = target.packages;
    for source in change.sources {
        if !sources.contains(&source) {
            sources.push(source);
        }
    }
    let about = Note {
        version: request.version.clone(),
        description: request.description.clone(),
        cves: request.cves.clone(),
        builder: format!("{}, {}", request.builder, tree.compiler()),
        sources,
        ..Note::new(&request.name.replace('-', "_"))
    };
    let inputs = Inputs {
        pairs: &pairs,
        facts: &facts,
        about: &about,
        allow: &request.allow,
        not_compiled: &touched.not_compiled,
    };
    Ok(build::build(&inputs, &tree)?)
}

impl Compile for Tree {
    fn glue(&self, module_name: &str, c_text: &str) -> Result<Vec<u8>, String> {
        self.compile_extra(module_name, c_text)
            .map_err(|error| error.to_string())
    }

    fn as_shipped(&self, source: &str) -> Result<Vec<u8>, String> {
        compile::as_shipped(self, source).map_err(|error| error.to_string())
    }
}

fn check_name(name: &str) -> Result<(), Error> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if !name.is_empty() && name.len() <= NAME_BYTES_MAX && name.chars().all(is_plain) {
        Ok(())
    } else {
        Err(Error::Name { name: name.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_module_can_have_is_refused() {
        assert!(check_name("livepatch-cve_2026").is_ok());
        for name in ["", "a b", "a.b", "../a", &"a".repeat(56)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
    }
}
