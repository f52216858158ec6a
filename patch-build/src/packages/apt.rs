//! The machine's apt: what it knows about a package, and the download.

use std::path::Path;

use super::Error;
use crate::command;

/// What apt's lists say about one version of a package.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) version: String,
    /// In hexadecimal.
    pub(super) sha256: String,
}

/// Looks a package up in apt's lists: that version, or the one that apt would install.
pub(super) fn lookup(name: &str, version: Option<&str>) -> Result<Listed, Error> {
    let wanted = spelled(name, version);
    // apt-cache fails for an unknown name, and prints nothing for an unknown version.
    let text = command::output("apt-cache", &["show", "--no-all-versions", &wanted], Path::new("/"));
    let text = match text {
        Err(error @ command::Error::Start { .. }) => return Err(error.into()),
        Err(command::Error::Failed { .. }) => String::new(),
        Ok(text) => String::from_utf8_lossy(&text).into_owned(),
    };
    // What has a dot in it and is no name, apt takes for a pattern.
    if field(&text, "Package") != Some(name) {
        return Err(Error::Unknown {
            wanted,
            known: known_versions(name),
        });
    }
    parse(&text, &wanted)
}

/// Downloads a package into `folder`; apt checks it against its signed lists.
pub(super) fn download(name: &str, version: &str, folder: &Path) -> Result<(), Error> {
    let wanted = spelled(name, Some(version));
    // As root, apt would drop to a user of its own, who may not write into the cache.
    let args = ["download", "-q", "-o", "APT::Sandbox::User=root", &wanted];
    command::output("apt-get", &args, folder)?;
    Ok(())
}

fn spelled(name: &str, version: Option<&str>) -> String {
    version.map_or_else(|| name.to_owned(), |version| format!("{name}={version}"))
}

/// What the first paragraph of `apt-cache show` says, in deb822 form.
fn parse(text: &str, wanted: &str) -> Result<Listed, Error> {
    let needed = |name: &'static str| {
        field(text, name).map(str::to_owned).ok_or_else(|| Error::NoField {
            wanted: wanted.to_owned(),
            field: name,
        })
    };
    Ok(Listed {
        version: needed("Version")?,
        sha256: needed("SHA256")?,
    })
}

/// A field of the first paragraph.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let paragraph = text.split("\n\n").next()?;
    let mut lines = paragraph.lines();
    lines.find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim()))
}

/// All versions of a package that apt knows, the newest first.
pub(super) fn versions(name: &str) -> Vec<String> {
    let text = command::output("apt-cache", &["madison", name], Path::new("/")).unwrap_or_default();
    versions_in(&String::from_utf8_lossy(&text), name)
}

/// Those of `apt-cache madison`: "NAME | VERSION | WHERE" for each.
fn versions_in(text: &str, name: &str) -> Vec<String> {
    let version = |line: &str| {
        let mut fields = line.split('|').map(str::trim);
        (fields.next()? == name).then(|| fields.next().map(str::to_owned))?
    };
    let mut versions: Vec<String> = text.lines().filter_map(version).collect();
    versions.dedup();
    versions
}

/// For the error message: all versions of a package that apt knows.
fn known_versions(name: &str) -> String {
    let versions = versions(name);
    if versions.is_empty() {
        "none of that name".to_owned()
    } else {
        versions.join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHOWN: &str = "Package: linux-headers-6.1.0-47-common\nVersion: 6.1.170-3\nArchitecture: all\n\
                         Description: SHA256: not this one\nSHA256: 0a1b\n\nPackage: other\nVersion: 2\n";

    #[test]
    fn version_and_digest_come_from_the_first_paragraph() {
        let listed = parse(SHOWN, "x").unwrap();
        assert_eq!(
            listed,
            Listed {
                version: "6.1.170-3".into(),
                sha256: "0a1b".into()
            }
        );
    }

    #[test]
    fn versions_are_those_of_the_very_package() {
        let text =
            " base-files | 12.4 | here\n base-files | 12.4 | there\n base-files | 12 | there\n other | 3 | here\n";
        assert_eq!(versions_in(text, "base-files"), ["12.4", "12"]);
        assert_eq!(versions_in(text, "base.files"), [""; 0]);
    }

    #[test]
    fn an_entry_without_digest_is_refused_by_name() {
        let error = parse("Version: 1\n", "base-files=1").unwrap_err();
        assert_eq!(error.to_string(), "apt's entry for base-files=1 has no SHA256");
    }
}
