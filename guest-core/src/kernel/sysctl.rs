//! Finds values of the guest's sysctls in the tree that `/proc/sys` shows.
//!
//! `sysctl_table_root.default_set.dir` is the top directory: a `ctl_dir` with a red-black tree of `ctl_node`, sorted by name
//! (`find_entry`, `namecmp` in fs/proc/proc_sysctl.c, Linux 5.10 to 7.2). A node's entry is the element of its header's
//! `ctl_table` at the node's own index in `ctl_table_header.node`.

use super::{KernelError, Live};
use crate::addr::Gva;
use crate::memory::VirtMemory;
use std::cmp::Ordering;

/// Largest depth of a tree: a red-black tree of 2^32 entries has at most 64 levels.
const DEPTH_MAX: usize = 64;
/// Longest name that is compared, in bytes. Names of sysctls are short.
const NAME_BYTES_MAX: u64 = 64;
/// `S_IFMT` and `S_IFDIR` (include/uapi/linux/stat.h).
const FILE_TYPE: u64 = 0o170_000;
const DIRECTORY: u64 = 0o040_000;
/// Name of what is read here, for errors.
const WHAT: &str = "the guest's sysctls";

/// A directory of `/proc/sys`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Directory {
    /// Guest-virtual address of its `struct ctl_dir`.
    at: Gva,
}

/// An entry of a directory.
enum Entry {
    Directory(Directory),
    /// Guest-virtual address of the value (`ctl_table.data`).
    Value(Gva),
}

impl Directory {
    /// `/proc/sys` itself, without the entries of network and user namespaces. `None` for a kernel without sysctls.
    pub fn root(live: &Live<'_>) -> Result<Option<Self>, KernelError> {
        let Some(root) = live.kernel.symbol_of_feature("sysctl_table_root")? else {
            return Ok(None);
        };
        let offset = live.kernel.btf.structure("ctl_table_root")?.offset("default_set.dir")?;
        Ok(Some(Self {
            at: root.wrapping_add(offset),
        }))
    }

    /// The directory `name` in this one.
    ///
    /// # Errors
    ///
    /// The tree cannot be read, or has no end.
    pub fn directory(self, live: &Live<'_>, name: &str) -> Result<Option<Self>, KernelError> {
        Ok(match self.find(live, name)? {
            Some(Entry::Directory(directory)) => Some(directory),
            _ => None,
        })
    }

    /// Guest-virtual address of the value `name` in this directory.
    ///
    /// # Errors
    ///
    /// The tree cannot be read, or has no end.
    pub fn value(self, live: &Live<'_>, name: &str) -> Result<Option<Gva>, KernelError> {
        Ok(match self.find(live, name)? {
            Some(Entry::Value(at)) => Some(at),
            _ => None,
        })
    }

    fn find(self, live: &Live<'_>, name: &str) -> Result<Option<Entry>, KernelError> {
        let btf = &live.kernel.btf;
        let (rb, node) = (btf.structure("rb_node")?, btf.structure("ctl_node")?);
        let (left, right) = (rb.offset("rb_left")?, rb.offset("rb_right")?);
        let root = btf.structure("ctl_dir")?.offset("root.rb_node")?;
        let mut at = pointer(live, self.at.wrapping_add(root))?;
        for _ in 0..DEPTH_MAX {
            if at.0 == 0 {
                return Ok(None);
            }
            let entry = entry_of(live, Gva(at.0.wrapping_sub(node.offset("node")?)))?;
            at = match name.as_bytes().cmp(&entry.name(live)?) {
                Ordering::Less => pointer(live, at.wrapping_add(left))?,
                Ordering::Greater => pointer(live, at.wrapping_add(right))?,
                Ordering::Equal => return entry.read(live).map(Some),
            };
        }
        Err(KernelError::Disagrees {
            what: WHAT,
            found: format!("a tree of more than {DEPTH_MAX} levels"),
            expected: "an end".to_owned(),
        })
    }
}

/// An element of a `ctl_table`, and the header that it belongs to.
struct Element {
    table: Gva,
    header: Gva,
}

/// The element of the `ctl_node` at `node`.
fn entry_of(live: &Live<'_>, node: Gva) -> Result<Element, KernelError> {
    let btf = &live.kernel.btf;
    let (nodes, headers) = (btf.structure("ctl_node")?, btf.structure("ctl_table_header")?);
    let header = pointer(live, node.wrapping_add(nodes.offset("header")?))?;
    let table = pointer(live, header.wrapping_add(headers.offset("ctl_table")?))?;
    let first = pointer(live, header.wrapping_add(headers.offset("node")?))?;
    let distance = node.0.wrapping_sub(first.0);
    let index = distance.checked_div(nodes.size()).unwrap_or(0);
    let offset = index.wrapping_mul(btf.structure("ctl_table")?.size());
    Ok(Element {
        table: table.wrapping_add(offset),
        header,
    })
}

impl Element {
    fn name(&self, live: &Live<'_>) -> Result<Vec<u8>, KernelError> {
        let offset = live.kernel.btf.structure("ctl_table")?.offset("procname")?;
        let at = pointer(live, self.table.wrapping_add(offset))?;
        let mut name = Vec::new();
        for index in 0..NAME_BYTES_MAX {
            let mut byte = [0];
            let at = at.wrapping_add(index);
            live.read(at, &mut byte).map_err(|source| unreadable(at, source))?;
            if byte == [0] {
                break;
            }
            name.extend(byte);
        }
        Ok(name)
    }

    fn read(&self, live: &Live<'_>) -> Result<Entry, KernelError> {
        let btf = &live.kernel.btf;
        let table = btf.structure("ctl_table")?;
        let mode = pointer(live, self.table.wrapping_add(table.offset("mode")?))?;
        if mode.0 & FILE_TYPE == DIRECTORY {
            let header = btf.structure("ctl_dir")?.offset("header")?;
            return Ok(Entry::Directory(Directory {
                at: Gva(self.header.0.wrapping_sub(header)),
            }));
        }
        Ok(Entry::Value(pointer(
            live,
            self.table.wrapping_add(table.offset("data")?),
        )?))
    }
}

fn pointer(live: &Live<'_>, at: Gva) -> Result<Gva, KernelError> {
    let word = live.read_u64(at).map_err(|source| unreadable(at, source))?;
    Ok(Gva(word))
}

fn unreadable(at: Gva, source: crate::memory::MemoryError) -> KernelError {
    KernelError::Unreadable { what: WHAT, at, source }
}
