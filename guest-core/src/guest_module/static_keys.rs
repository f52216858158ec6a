//! Static keys that a patch's branches hang on: each keeps a list of who has branches to rewrite when it is flipped.
//!
//! `static_key.entries` (include/linux/jump_label.h) is a pointer with two bits: bit 0 says how the key starts; while bit 1 is
//! clear it leads to the rows of the key's own object, else to a list of `struct static_key_mod` (kernel/jump_label.c), one
//! for each object with rows. A key in read-only data that was sealed has no list, as it is never flipped (6.10).

use super::words::{WORD, Words, damaged, unreadable};
use crate::addr::Gva;
use crate::change::{Change, ChangeError};
use crate::kernel::modules;
use crate::kernel::{KernelError, Live};
use crate::memory::VirtMemory;
use crate::module::{JumpLabels, JumpLayout, NODES_BYTES, UsedKey};
use serde::{Deserialize, Serialize};

/// How the key starts, and whether it has a list.
const BITS: u64 = 3;
const LINKED: u64 = 2;
/// More objects than ever hang on one key.
const NODES_MAX: usize = 4096;
/// What the guest is doing when it changes them.
const CHANGING: &str = "flipping static keys, or loading or unloading modules that use them";
/// What the changes are called.
const KEYS: &str = "the guest's static keys";

/// A key that lists the branches of a patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedKey {
    /// Guest-virtual address of the `struct static_key`.
    pub key: u64,
    /// Of the node for the patch's branches.
    pub node: u64,
    /// Of the node for the branches of the key's own object, where the patch had to bring that along, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own: Option<u64>,
}

/// Members of a `static_key_mod`.
struct Node {
    next: u64,
    entries: u64,
    module: u64,
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

/// The offsets of this kernel that branches are linked with.
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

/// Plans to list the branches of the module at `module` at their keys. `data`, which is going to be at `at`, has room for the
/// nodes; it is filled in.
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
            // Sealed: never flipped again.
            continue;
        }
        let ours = key.room;
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

/// Demands that the key is still in the state that the branches were made for.
fn require_unflipped(live: &Live<'_>, key: &UsedKey, layout: &JumpLayout) -> Result<(), KernelError> {
    let at = key.at.wrapping_add(layout.enabled);
    let enabled = live.read_u32(at).map_err(|source| unreadable(at, source))?;
    if enabled.to_le_bytes() == key.enabled.to_le_bytes() {
        return Ok(());
    }
    let (gpa, _) = live.physical(at).map_err(|source| unreadable(at, source))?;
    Err(KernelError::Changed(ChangeError::Changing { doing: CHANGING, gpa }))
}

/// Plans to take a patch's branches from the lists of their keys, whatever those are like now.
///
/// Gives the key that still needs a node which the patch brought along: a module that the guest loaded since hangs on it.
pub fn unlist(live: &Live<'_>, listed: &[ListedKey]) -> Result<Result<Vec<Change>, Gva>, KernelError> {
    if listed.is_empty() {
        return Ok(Ok(Vec::new()));
    }
    let (layout, node) = (layout(live)?, Node::of(live)?);
    let flipping = live.that_changes_when(CHANGING);
    let mut words = Words::new(&flipping, Gva(0), Vec::new());
    for key in listed {
        let head = Gva(key.key).wrapping_add(layout.entries);
        let word = words.get(head)?;
        if word & LINKED == 0 {
            // Not listed yet, or not any more.
            continue;
        }
        let mut at = head;
        let mut bits = word & BITS;
        for _ in 0..NODES_MAX {
            let next = words.get(at)? & !bits;
            if next == key.node {
                let behind = words.get(Gva(next).wrapping_add(node.next))?;
                words.set(at, behind | bits)?;
                break;
            }
            if next == 0 {
                break;
            }
            (at, bits) = (Gva(next).wrapping_add(node.next), 0);
        }
        let Some(own) = key.own else { continue };
        let word = words.get(head)?;
        if word & !BITS != own || words.get(Gva(own).wrapping_add(node.next))? != 0 {
            return Ok(Err(Gva(key.key)));
        }
        let entries = words.get(Gva(own).wrapping_add(node.entries))?;
        words.set(head, entries | (word & BITS & !LINKED))?;
    }
    Ok(Ok(words.finish(live, KEYS)?.1))
}

const _: () = assert!(NODES_BYTES == 6 * WORD);
