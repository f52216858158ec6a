//! Huge pages of the host, for a guest's RAM.

use std::fs;
use std::path::PathBuf;

/// Bytes of one, in MiB: x86-64's smaller kind, which every host has.
const PAGE_MIB: u32 = 2;

/// Huge pages that were added to the host's, until this is dropped.
#[derive(Debug)]
pub struct HugePages {
    added: u64,
}

impl HugePages {
    /// Has the host set as many aside as a guest with that much RAM needs. Takes root.
    ///
    /// # Panics
    ///
    /// If the host does not give them.
    pub fn for_ram(mib: u32) -> Self {
        let added = u64::from(mib.div_ceil(PAGE_MIB));
        let before = read("nr_hugepages");
        let guard = Self { added };
        fs::write(file("nr_hugepages"), (before + added).to_string()).expect("root may set huge pages aside");
        assert!(
            read("free_hugepages") >= added,
            "the host has no memory in pieces of {PAGE_MIB} MiB: {} of {added}",
            read("free_hugepages")
        );
        guard
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let left = read("nr_hugepages").saturating_sub(self.added);
        let _ = fs::write(file("nr_hugepages"), left.to_string());
    }
}

/// Documentation/admin-guide/mm/hugetlbpage.rst.
fn file(name: &str) -> PathBuf {
    PathBuf::from(format!("/sys/kernel/mm/hugepages/hugepages-{}kB", PAGE_MIB * 1024)).join(name)
}

fn read(name: &str) -> u64 {
    let text = fs::read_to_string(file(name)).expect("the host has huge pages");
    text.trim().parse().expect("it says how many")
}
