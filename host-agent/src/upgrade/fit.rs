//! What the old process says that keeps its guest where it is.

use super::error::UpgradeError;
use crate::domains::Domain;
use qmp::RunState;
use qmp::migrate::{Facts, Pair};
use std::path::Path;

/// What the guest does just now.
pub(super) fn check_state(pair: &Pair) -> Result<(), UpgradeError> {
    let RunState::Other(state) = pair.source_state()? else {
        return Ok(());
    };
    let reason = match state.as_str() {
        "postmigrate" => {
            "all of it was sent to another process once; if it has never run there, QMP `cont` lets it go on in this one"
        }
        _ => "only one that runs, or is paused by its operator, is moved",
    };
    Err(UpgradeError::unfit(
        format!("the guest is in the state `{state}`"),
        reason,
    ))
}

/// A program that was started through the loader of programs: what /proc names as the program is the loader, and the command line begins
/// with its options.
pub(super) fn check_program(old: &Domain) -> Result<(), UpgradeError> {
    let path = old
        .binary
        .as_ref()
        .map(|binary| binary.path.as_path())
        .unwrap_or(Path::new(""));
    if is_loader(path) {
        return Err(UpgradeError::unfit(
            format!("process {} was started through the loader {}", old.pid, path.display()),
            "its command line is not QEMU's alone; start the guest anew with QEMU itself",
        ));
    }
    Ok(())
}

/// `ld-linux-x86-64.so.2`, `ld-2.31.so`, `ld-musl-x86_64.so.1`, `ld.so`.
fn is_loader(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    (name.starts_with("ld-") || name.starts_with("ld.")) && name.contains(".so")
}

/// What would end with the old process.
pub(super) fn check_bonds(facts: &Facts, arguments: &[(String, Vec<u8>)]) -> Result<(), UpgradeError> {
    if let Some(bond) = facts.bonds.first() {
        return Err(UpgradeError::unfit(&bond.what, bond.reason));
    }
    for display in &facts.passwords {
        let has_secret = |(option, value): &(String, Vec<u8>)| {
            option == display && String::from_utf8_lossy(value).contains("password-secret")
        };
        if !arguments.iter().any(has_secret) {
            return Err(UpgradeError::unfit(
                format!("the password of `-{display}`"),
                "it was set through QMP, and can't be asked for; start the guest with password-secret=",
            ));
        }
    }
    Ok(())
}

/// Network cards that were moved and were reached through them before and afterwards: see the table in `docs/support.md`.
const CARDS: [&str; 6] = ["virtio-net-pci", "e1000", "e1000e", "igb", "rtl8139", "vmxnet3"];

/// Networks as they are, with what was plugged in later, which the command line does not tell.
pub(super) fn check_networks(facts: &Facts) -> Result<(), UpgradeError> {
    for network in &facts.networks {
        let model = network.split(',').find_map(|word| word.strip_prefix("model="));
        // `virtio-net-pci-non-transitional` is the same card.
        if let Some(model) = model.filter(|model| !CARDS.contains(model) && !model.starts_with(CARDS[0])) {
            return Err(UpgradeError::unfit(
                format!("a network card of the kind `{model}`"),
                format!("it was never tried; those that were are {}", CARDS.join(", ")),
            ));
        }
    }
    if facts.networks.iter().any(|network| network.contains("type=user")) {
        return Err(UpgradeError::unfit(
            "a network of type `user`",
            "the guest's connections live in the old process; use a tap or a bridge, or -nic none where there is no network",
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_loader;
    use std::path::Path;

    #[test]
    fn loaders_are_known_by_their_names() {
        for name in ["ld-linux-x86-64.so.2", "ld-2.31.so", "ld.so", "ld-musl-x86_64.so.1"] {
            assert!(is_loader(&Path::new("/lib64").join(name)), "{name}");
        }
        for name in ["qemu-system-x86_64", "ld-wrapper", ""] {
            assert!(!is_loader(Path::new(name)), "{name}");
        }
    }
}
