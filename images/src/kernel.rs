//! The Debian kernels that guests run: a table of those that the tests refer to, and any other by its package's name.

use std::borrow::Cow;

use patch_build::headers::{self, Headers};
pub use patch_build::kernel_files::{Error, KernelFiles};

use crate::cache;

/// A kernel, by the Debian package that it comes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    label: Cow<'static, str>,
    package: Cow<'static, str>,
    version: Option<Cow<'static, str>>,
}

impl Kernel {
    /// 6.1 for clouds, from before the security updates whose fixes the demo and the tests apply.
    pub const CLOUD_6_1: Self = Self::pinned("6.1-cloud", "linux-image-6.1.0-47-cloud-amd64", "6.1.170-3");
    /// 6.1 for any hardware, of the same source as [`Kernel::CLOUD_6_1`].
    pub const GENERIC_6_1: Self = Self::pinned("6.1", "linux-image-6.1.0-47-amd64", "6.1.170-3");
    /// 6.12 for clouds, as built for bookworm.
    pub const CLOUD_6_12: Self = Self::pinned(
        "6.12-cloud",
        "linux-image-6.12.117+deb12-cloud-amd64",
        "6.12.117-1~deb12u1",
    );
    /// 6.1 with PREEMPT_RT, of the same source as [`Kernel::CLOUD_6_1`].
    pub const RT_6_1: Self = Self::pinned("6.1-rt", "linux-image-6.1.0-47-rt-amd64", "6.1.170-3");
    /// 6.12 for any hardware, as built for bookworm.
    pub const GENERIC_6_12: Self = Self::pinned("6.12", "linux-image-6.12.117+deb12-amd64", "6.12.117-1~deb12u1");
    /// 6.12 with PREEMPT_RT, as built for bookworm.
    pub const RT_6_12: Self = Self::pinned("6.12-rt", "linux-image-6.12.117+deb12-rt-amd64", "6.12.117-1~deb12u1");
    /// 5.10 for clouds, of bullseye.
    pub const CLOUD_5_10: Self = Self::pinned("5.10-cloud", "linux-image-5.10.0-46-cloud-amd64", "5.10.262-1");
    /// 5.10 for any hardware, of bullseye.
    pub const GENERIC_5_10: Self = Self::pinned("5.10", "linux-image-5.10.0-46-amd64", "5.10.262-1");
    /// 7.2 for clouds, of sid.
    pub const CLOUD_7_2: Self = Self::pinned("7.2-cloud", "linux-image-7.2.13+deb14-cloud-amd64", "7.2.13-1");
    /// 7.2 for any hardware, of sid.
    pub const GENERIC_7_2: Self = Self::pinned("7.2", "linux-image-7.2.13+deb14-amd64", "7.2.13-1");
    /// 7.3 for clouds, as built for trixie.
    pub const CLOUD_7_3: Self = Self::pinned("7.3-cloud", "linux-image-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1");
    /// All kernels with a label of their own, the oldest first.
    pub const TABLE: [Self; 11] = [
        Self::CLOUD_5_10,
        Self::GENERIC_5_10,
        Self::CLOUD_6_1,
        Self::GENERIC_6_1,
        Self::RT_6_1,
        Self::CLOUD_6_12,
        Self::GENERIC_6_12,
        Self::RT_6_12,
        Self::CLOUD_7_2,
        Self::GENERIC_7_2,
        Self::CLOUD_7_3,
    ];

    const fn pinned(label: &'static str, package: &'static str, version: &'static str) -> Self {
        Self {
            label: Cow::Borrowed(label),
            package: Cow::Borrowed(package),
            version: Some(Cow::Borrowed(version)),
        }
    }

    /// The kernel with this label in [`Kernel::TABLE`], or the one in the package of this name (`NAME` or
    /// `NAME=VERSION`).
    pub fn named(name: &str) -> Self {
        if let Some(kernel) = Self::TABLE.into_iter().find(|kernel| kernel.label == name) {
            return kernel;
        }
        let (package, version) = match name.split_once('=') {
            Some((package, version)) => (package, Some(version.to_owned().into())),
            None => (name, None),
        };
        Self {
            label: name.to_owned().into(),
            package: package.to_owned().into(),
            version,
        }
    }

    /// The short name by which [`Kernel::named`] finds it.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The name of its package.
    pub fn package(&self) -> &str {
        &self.package
    }

    /// The version of its package, if it is bound to one.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// What the kernel's modules are built with, in the user's cache.
    pub fn headers(&self) -> Result<Headers, headers::Error> {
        let release = self.package.strip_prefix("linux-image-").unwrap_or(&self.package);
        Headers::fetch(&cache::Cache::from_env()?, release, self.version())
    }

    /// Fetches the kernel into the user's cache.
    pub fn fetch(&self) -> Result<KernelFiles, Error> {
        KernelFiles::fetch(&cache::Cache::from_env()?, &self.package, self.version())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_names_a_kernel_of_the_table() {
        assert_eq!(Kernel::named("6.1-cloud"), Kernel::CLOUD_6_1);
    }

    #[test]
    fn any_other_name_is_a_package_with_or_without_version() {
        let kernel = Kernel::named("linux-image-6.1.0-48-amd64");
        assert_eq!(
            (kernel.package(), kernel.version()),
            ("linux-image-6.1.0-48-amd64", None)
        );
        let kernel = Kernel::named("linux-image-6.1.0-48-amd64=6.1.172-1");
        assert_eq!(
            (kernel.package(), kernel.version()),
            ("linux-image-6.1.0-48-amd64", Some("6.1.172-1"))
        );
    }

    #[test]
    fn the_table_has_no_label_twice() {
        let labels: std::collections::BTreeSet<_> = Kernel::TABLE.iter().map(|kernel| kernel.label.clone()).collect();
        assert_eq!(labels.len(), Kernel::TABLE.len());
    }
}
