//! Adds a patch's branches to the lists of their static keys. A key lists all branches that the kernel rewrites when it flips the key.
//!
//! `static_key.entries` (include/linux/jump_label.h) is a pointer with two bits. Bit 0 is the key's initial value. If bit 1 is clear, the
//! pointer leads to the rows of the key's own object; if it is set, to a list of `struct static_key_mod` (kernel/jump_label.c), one for
//! each object with rows. A key in sealed read-only data has no list, because it is never flipped (6.10).

use super::words::{WORD, Words, damaged, unreadable};
use crate::addr::Gva;
use crate::change::{Change, ChangeError};
use crate::kernel::modules;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::module::{JumpLabels, JumpLayout, NODES_BYTES, UsedKey};
use serde::{Deserialize, Serialize};

/// The two bits: the key's initial value, and whether it has a list.
const BITS: u64 = 3;
const LINKED: u64 = 2;
/// Most objects that list branches at one key.
const NODES_MAX: usize = 4096;
/// What the guest is doing when it changes the lists.
const CHANGING: &str = "flipping static keys, or loading or unloading modules that use them";
/// Name of the changes, for errors.
const KEYS: &str = "the guest's static keys";

/// A key that lists the branches of a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedKey {
    /// Guest-virtual address of the `struct static_key`.
    pub key: u64,
    /// Guest-virtual address of the node for the patch's branches.
    pub node: u64,
    /// Guest-virtual address of the node for the branches of the key's own object, where the patch holds this node, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<u64>,
}

/// Offsets of the members of `struct static_key_mod`.
pub(super) struct Node {
    pub next: u64,
    pub entries: u64,
    pub module: u64,
}

impl Node {
    fn of(live: &Live<'_>) -> Result<Self, KernelError> {
        let node = live.kernel.btf.structure("static_key_mod")?;
        if 2 * node.size() > NODES_BYTES {
            return Err(damaged(
                format!("a static_key_mod of {} bytes", node.size()),
                "at most half of 48",
            ));
        }
        Ok(Self {
            next: node.offset("next")?,
            entries: node.offset("entries")?,
            module: node.offset("mod")?,
        })
    }
}

/// The offsets in this kernel's `struct static_key` that linking needs.
pub fn layout(live: &Live<'_>) -> Result<JumpLayout, KernelError> {
    let btf = &live.kernel.btf;
    let key = btf.structure("static_key")?;
    if btf.structure("jump_entry")?.size() != 16 {
        return Err(damaged("another struct jump_entry".to_owned(), "one of 16 bytes"));
    }
    Ok(JumpLayout {
        enabled: key.offset("enabled")?,
        entries: key.offset("entries")?,
    })
}

/// Plans to add the branches of the module at `module` to the lists of their keys. Fills the nodes in `data`, which has space for them and
/// will be at `at`.
pub fn list(
    live: &Live<'_>,
    labels: &JumpLabels,
    module: Gva,
    (at, data): (Gva, &mut Vec<u8>),
) -> Result<(Vec<Change>, Vec<ListedKey>), KernelError> {
    if labels.keys.is_empty() {
        return Ok((Vec::new(), Vec::new()));
    }
    let (layout, node) = (layout(live)?, Node::of(live)?);
    let flipping = live.that_changes_when(CHANGING);
    let mut words = Words::new(&flipping, at, std::mem::take(data));
    let mut listed = Vec::new();
    for key in &labels.keys {
        require_unflipped(&flipping, key, &layout)?;
        let head = key.at.wrapping_add(layout.entries);
        let word = words.get(head)?;
        let (first, is_linked) = (word & !BITS, word & LINKED != 0);
        if is_linked && first == 0 {
            // The key is sealed: it is never flipped again.
            continue;
        }
        let ours = key.nodes;
        let own = (!is_linked).then(|| ours.wrapping_add(NODES_BYTES / 2));
        if let Some(own) = own {
            let object = match live.kernel.image.segment(key.at) {
                Some(_) => Gva(0),
                None => modules::containing(live, key.at)?
                    .map(|module| module.at)
                    .ok_or_else(|| damaged(format!("a static key at {}", key.at), "one in the image or a module"))?,
            };
            words.set(own.wrapping_add(node.next), 0)?;
            words.set(own.wrapping_add(node.entries), first)?;
            words.set(own.wrapping_add(node.module), object.0)?;
        }
        words.set(ours.wrapping_add(node.next), own.map_or(first, |own| own.0))?;
        words.set(ours.wrapping_add(node.entries), key.first.0)?;
        words.set(ours.wrapping_add(node.module), module.0)?;
        words.set(head, ours.0 | LINKED | (word & BITS))?;
        listed.push(ListedKey {
            key: key.at.0,
            node: ours.0,
            own: own.map(|own| own.0),
        });
    }
    let (bytes, changes) = words.finish(live, KEYS)?;
    *data = bytes;
    Ok((changes, listed))
}

/// Requires that the key has the state that the branches were linked for.
fn require_unflipped(live: &Live<'_>, key: &UsedKey, layout: &JumpLayout) -> Result<(), KernelError> {
    let at = key.at.wrapping_add(layout.enabled);
    let enabled = live.read_u32(at).map_err(|source| unreadable(at, source))?;
    if enabled.to_le_bytes() == key.enabled.to_le_bytes() {
        return Ok(());
    }
    let (gpa, _) = live.physical(at).map_err(|source| unreadable(at, source))?;
    Err(KernelError::Changed(ChangeError::Changing { doing: CHANGING, gpa }))
}

/// Plans to remove a patch's branches from the lists of their keys, as they are now.
///
/// Gives the address of a key that still needs a node of the patch, because the guest has loaded another module with branches on it since.
pub fn unlist(live: &Live<'_>, listed: &[ListedKey]) -> Result<Result<Vec<Change>, Gva>, KernelError> {
    if listed.is_empty() {
        return Ok(Ok(Vec::new()));
    }
    let (layout, node) = (layout(live)?, Node::of(live)?);
    let flipping = live.that_changes_when(CHANGING);
    let mut words = Words::new(&flipping, Gva(0), Vec::new());
    for key in listed {
        if !unlink(&mut words, layout.entries, &node, key)? {
            return Ok(Err(Gva(key.key)));
        }
    }
    Ok(Ok(words.finish(live, KEYS)?.1))
}

/// Takes a patch's nodes from the list of one key, whose `static_key.entries` is at that offset. Gives false where others need a node
/// that the patch brought along.
pub(super) fn unlink(words: &mut Words<'_>, entries: u64, node: &Node, key: &ListedKey) -> Result<bool, KernelError> {
    let head = Gva(key.key).wrapping_add(entries);
    // The nodes of a patch that was only staged are in no list, and nothing keeps the guest from unloading the module whose key it is.
    let Some(word) = words.get_mapped(head)?.filter(|word| word & LINKED != 0) else {
        return Ok(true);
    };
    let mut nodes = nodes(words, node, Gva(word & !BITS))?;
    if let Some(index) = nodes.iter().position(|at| at.0 == key.node) {
        let (before, bits) = match index.checked_sub(1).and_then(|before| nodes.get(before)) {
            Some(before) => (before.wrapping_add(node.next), 0),
            None => (head, word & BITS),
        };
        let behind = words.get(Gva(key.node).wrapping_add(node.next))?;
        words.set(before, behind | bits)?;
        nodes.remove(index);
    }
    let Some(own) = key.own.filter(|own| nodes.contains(&Gva(*own))) else {
        return Ok(true);
    };
    if nodes.len() != 1 {
        return Ok(false);
    }
    let rows = words.get(Gva(own).wrapping_add(node.entries))?;
    words.set(head, rows | (word & BITS & !LINKED))?;
    Ok(true)
}

/// The list that begins with `first`, as far as it can be read.
fn nodes(words: &Words<'_>, node: &Node, first: Gva) -> Result<Vec<Gva>, KernelError> {
    let (mut found, mut at) = (Vec::new(), first);
    while at.0 != 0 && found.len() < NODES_MAX {
        found.push(at);
        at = match words.get_mapped(at.wrapping_add(node.next))? {
            Some(next) => Gva(next),
            None => break,
        };
    }
    Ok(found)
}

const _: () = assert!(NODES_BYTES == 6 * WORD);
