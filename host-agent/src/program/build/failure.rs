//! Why no module was built.

use host_agent::outcome::Reason;
use std::io;
use std::path::PathBuf;

/// Why no module was built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No place for what `build` fetches and makes.
    #[error("looking for the cache")]
    Cache(#[source] patch_build::cache::Error),
    /// The module can't be written, or the diff not be read.
    #[error("{doing} {path}")]
    File {
        /// `reading` or `writing`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No module could be built.
    #[error("building {name}")]
    Build {
        /// The module.
        name: String,
        /// Why.
        source: Box<patch_build::request::Error>,
    },
    /// The change is one of comments, or of what is not compiled.
    #[error("the change changes no code and no data of this kernel: there is nothing to build")]
    NothingToBuild,
    /// Risks that nobody has taken.
    #[error("{name} is not built: {}", findings.join("; "))]
    NotAllowed {
        /// The module.
        name: String,
        /// What speaks against it.
        findings: Vec<String>,
    },
}

impl BuildError {
    /// Why it was not built.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Build { source, .. } if source.is_refusal() => Reason::Refused,
            Self::NothingToBuild | Self::NotAllowed { .. } => Reason::Refused,
            Self::Cache(_) | Self::File { .. } | Self::Build { .. } => Reason::Failed,
        }
    }

    /// What the operator can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotAllowed { .. } => {
                Some("if that has been thought about: --allow RISK, with the name in brackets; --explain shows more")
            }
            _ => None,
        }
    }
}
