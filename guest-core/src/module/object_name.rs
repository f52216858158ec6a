//! The names that a module can have. A patch for any other name would be pending for ever.
//!
//! The kernel's build makes a module's name of its file's, with `_` for `-` and `,` (scripts/Makefile.lib, `name-fix`, 5.10 to
//! 7.2), and the name with its NUL has room in `struct module` (`MODULE_NAME_LEN`, include/linux/module.h: 64 less a long).

/// Most bytes of a name.
const BYTES_MAX: usize = 64 - size_of::<u64>() - 1;
/// The name of the kernel image, which is also an object without a name.
const IMAGE: &str = "vmlinux";

/// Advice on a name that no module can have; `None` for a name that a module can have.
pub(super) fn advice(name: &str) -> Option<String> {
    if name == IMAGE {
        return Some("the kernel image is the object without a name".to_owned());
    }
    if name.len() > BYTES_MAX {
        return Some(format!("a name has at most {BYTES_MAX} bytes"));
    }
    let file = name.trim();
    let stem = [".ko", ".ko.gz", ".ko.xz", ".ko.zst"]
        .iter()
        .find_map(|end| file.strip_suffix(end));
    let made = stem.unwrap_or(file).replace(['-', ','], "_");
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_.+".contains(c);
    if !made.chars().all(is_plain) || made.is_empty() {
        return Some("a name has letters, digits and underscores".to_owned());
    }
    (made != name).then(|| format!("did you mean {made}?"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_no_module_can_have_gives_the_right_one_as_advice() {
        for (name, meant) in [
            ("kvm_amd.ko", "kvm_amd"),
            ("kvm-amd", "kvm_amd"),
            ("zfs ", "zfs"),
            ("a-b.ko.xz", "a_b"),
        ] {
            assert_eq!(advice(name), Some(format!("did you mean {meant}?")));
        }
        for name in ["vmlinux", "", "two words", "a/b", "x\u{e9}", &"n".repeat(56)] {
            assert!(advice(name).is_some(), "{name}");
        }
    }

    #[test]
    fn names_that_modules_have_are_accepted() {
        for name in ["af_alg", "8021q", "ip6t_REJECT", "nf_log_syslog", &"n".repeat(55)] {
            assert_eq!(advice(name), None);
        }
    }
}
