//! Published fixes as livepatch modules.

use std::fs;
use std::path::PathBuf;

use patch_build::source::package;

use super::{Error, FixedFunctions, KernelTree};
use crate::cache;

/// A flaw of `linux-image-6.1.0-47-*` (6.1.170-3) that Debian fixed later, in functions that need only exported symbols,
/// and that an unprivileged program can see (see [`Cve::program`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cve {
    /// CVE-2026-52928: `ioctl(SIOCATMARK)` answers for Unix sockets that have no out-of-band data.
    Y2026N52928,
    /// CVE-2026-53249: any user may set a source route with `setsockopt(IP_OPTIONS)`.
    Y2026N53249,
}

/// The package that has the fixes, and its first version with all of them.
const FIXED_PACKAGE: &str = "linux-source-6.1";
const FIXED_VERSION: &str = "6.1.192-2";
/// What the releases of that series begin with.
const FIXED_SERIES: &str = "6.1.";

impl Cve {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Y2026N52928, Self::Y2026N53249];

    /// The identifier, as published.
    pub fn id(self) -> &'static str {
        match self {
            Self::Y2026N52928 => "CVE-2026-52928",
            Self::Y2026N53249 => "CVE-2026-53249",
        }
    }

    /// The source file that was fixed.
    pub fn file(self) -> &'static str {
        match self {
            Self::Y2026N52928 => "net/unix/af_unix.c",
            Self::Y2026N53249 => "net/ipv4/ip_options.c",
        }
    }

    /// The functions that the fix changed.
    pub fn functions(self) -> &'static [&'static str] {
        match self {
            Self::Y2026N52928 => &["unix_ioctl"],
            Self::Y2026N53249 => &["ip_options_get"],
        }
    }

    /// The program that sees the flaw; see [`super::programs`].
    pub fn program(self) -> &'static str {
        match self {
            Self::Y2026N52928 => "siocatmark",
            Self::Y2026N53249 => "lsrr",
        }
    }

    /// The livepatch module's name, without `.ko`.
    pub fn module_name(self) -> String {
        format!("livepatch-{}", self.id().to_lowercase())
    }

    /// Whether the fix is made for that kernel: it is of the series whose source package has the fix.
    pub fn concerns(self, release: &str) -> bool {
        release.starts_with(FIXED_SERIES)
    }

    /// Builds the livepatch module for that kernel, the functions taken from Debian's fixed source package. Returns the
    /// `.ko` in the cache.
    pub fn module(self, tree: &KernelTree) -> Result<PathBuf, Error> {
        if !self.concerns(tree.release()) {
            return Err(Error::OtherSeries {
                id: self.id(),
                release: tree.release().to_owned(),
                series: FIXED_SERIES,
            });
        }
        let files = Self::ALL.map(Self::file);
        let folder = package::files(tree.cache(), FIXED_PACKAGE, FIXED_VERSION, &files)?;
        let path = folder.join(self.file());
        let text = fs::read_to_string(&path).map_err(cache::Error::io("read", &path))?;
        let fixed = FixedFunctions {
            file: self.file(),
            text: &text,
            functions: self.functions(),
        };
        fixed.module(&self.module_name())?.build(tree)
    }
}
