use super::rb_tree::{NodeLayout, Tree};
use super::static_keys::{ListedKey, Node, unlink};
use super::words::Words;
use crate::addr::Gva;
use crate::btf::Btf;
use crate::btf::builder::{Builder, STRUCT};
use crate::memory::{MemoryError, VirtMemory};
use std::collections::{BTreeMap, BTreeSet};

/// Words of memory. Missing words read as zero.
#[derive(Default)]
struct Memory(BTreeMap<u64, u64>);

impl VirtMemory for Memory {
    fn read(&self, at: Gva, buf: &mut [u8]) -> Result<(), MemoryError> {
        let word = self.0.get(&at.0).copied().unwrap_or(0);
        buf.copy_from_slice(&word.to_le_bytes()[..buf.len()]);
        Ok(())
    }
}

const ROOT: u64 = 0x10;
/// The layout of nodes as `struct rb_node` has it. A node's key is the word before the node.
const NODES: u64 = 0x1000;
const NODE_BYTES: u64 = 32;

fn layout() -> NodeLayout {
    let mut b = Builder::new();
    let word = b.int("u64", 8);
    let members = [
        ("__rb_parent_color", word, 0),
        ("rb_right", word, 64),
        ("rb_left", word, 128),
    ];
    b.composite("rb_node", STRUCT, 24, &members);
    NodeLayout::find(&Btf::parse(b.bytes()).unwrap()).unwrap()
}

fn node(number: u64) -> u64 {
    NODES + NODE_BYTES * number + 8
}

/// Changes the tree in memory.
fn change(
    memory: &mut Memory,
    work: impl Fn(&mut Tree<'_, '_>) -> Result<(), crate::kernel::KernelError>,
) -> Result<(), String> {
    let mut words = Words::new(memory, Gva(0), Vec::new());
    let done = work(&mut Tree {
        words: &mut words,
        layout: layout(),
        root_at: Gva(ROOT),
        key: -8,
    });
    done.map_err(|error| error.to_string())?;
    let set = words.set_words();
    memory.0.extend(set);
    Ok(())
}

/// Requires that the tree is a red-black tree. Gives its keys in order, and the number of black nodes of every path.
fn check(memory: &Memory, at: u64, parent: u64) -> (Vec<u64>, u32) {
    if at == 0 {
        return (Vec::new(), 1);
    }
    let word = |at: u64| memory.0.get(&at).copied().unwrap_or(0);
    let (up, black) = (word(at) & !3, word(at) & 1);
    assert_eq!(up, parent, "the parent of {at:#x}");
    let is_black = |child: u64| child == 0 || word(child) & 1 == 1;
    let (right, left) = (word(at + 8), word(at + 16));
    assert!(
        black == 1 || (is_black(left) && is_black(right)),
        "{at:#x} and a child are red"
    );
    assert!(parent != 0 || black == 1, "the root is red");
    let (mut keys, high) = check(memory, left, at);
    let (more, other) = check(memory, right, at);
    assert_eq!(high, other, "black nodes below {at:#x}");
    keys.push(word(at - 8));
    keys.extend(more);
    (keys, high + u32::try_from(black).unwrap())
}

fn require(memory: &Memory, keys: &BTreeSet<u64>) {
    let root = memory.0.get(&ROOT).copied().unwrap_or(0);
    assert_eq!(check(memory, root, 0).0, keys.iter().copied().collect::<Vec<_>>());
}

#[test]
fn insertions_and_removals_keep_the_tree_balanced() {
    for seed in 1..40_u64 {
        let (mut memory, mut keys, mut random) = (Memory::default(), BTreeSet::new(), seed);
        for _ in 0..120 {
            // Knuth's linear congruential generator: it gives the same numbers in each run.
            random = random
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            let number = random >> 59;
            // The keys have another order than the addresses, because modules are loaded wherever there is space.
            let key = number.wrapping_mul(0x9e37_79b9) % 97 + 1;
            if keys.contains(&key) {
                change(&mut memory, |tree| tree.remove(Gva(node(number)))).unwrap();
                keys.remove(&key);
            } else {
                memory.0.insert(node(number) - 8, key);
                change(&mut memory, |tree| tree.insert(Gva(node(number)))).unwrap();
                keys.insert(key);
            }
            require(&memory, &keys);
        }
    }
}

fn of(keys: &[u64]) -> Memory {
    let mut memory = Memory::default();
    for (number, key) in (0..).zip(keys) {
        memory.0.insert(node(number) - 8, *key);
        change(&mut memory, |tree| tree.insert(Gva(node(number)))).unwrap();
    }
    memory
}

#[test]
fn a_node_outside_the_tree_is_not_removed() {
    let mut memory = of(&[1, 2, 3]);
    memory.0.insert(node(7), node(1));
    let error = change(&mut memory, |tree| tree.remove(Gva(node(7)))).unwrap_err();
    assert!(error.contains("as child of"), "{error}");
    let error = change(&mut memory, |tree| tree.remove(Gva(node(8)))).unwrap_err();
    assert!(error.contains("without a parent"), "{error}");
}

#[test]
fn a_tree_with_a_cycle_or_a_wrong_parent_is_refused() {
    let mut memory = of(&[1, 2, 3, 4, 5]);
    memory.0.insert(node(9) - 8, 9);
    // The last node on the path to the new one leads back to the root, and is the root's parent.
    let root = memory.0[&ROOT];
    memory.0.insert(node(4) + 8, root);
    memory.0.insert(root, node(4) | 1);
    let error = change(&mut memory, |tree| tree.insert(Gva(node(9)))).unwrap_err();
    assert!(error.contains("as parent of"), "{error}");

    let mut memory = of(&[1]);
    memory.0.insert(node(0) + 8, node(0));
    memory.0.insert(node(0), 1);
    memory.0.insert(node(9) - 8, 9);
    let error = change(&mut memory, |tree| tree.insert(Gva(node(9)))).unwrap_err();
    assert!(error.contains("as parent of"), "{error}");
}

#[test]
fn the_first_and_the_last_node_are_found() {
    let memory = of(&[5, 3, 9, 1]);
    let mut words = Words::new(&memory, Gva(0), Vec::new());
    let tree = Tree {
        words: &mut words,
        layout: layout(),
        root_at: Gva(ROOT),
        key: -8,
    };
    assert_eq!(tree.ends().unwrap(), Some([Gva(node(3)), Gva(node(2))]));
}

#[test]
fn words_that_are_not_staged_yet_are_set_in_place() {
    let memory = Memory::default();
    let mut words = Words::new(&memory, Gva(0x100), vec![0; 16]);
    words.set(Gva(0x108), 7).unwrap();
    words.set(Gva(0x110), 8).unwrap();
    assert_eq!((words.get(Gva(0x108)).unwrap(), words.get(Gva(0x110)).unwrap()), (7, 8));
    assert_eq!(words.set_words(), [(0x110, 8)]);
}

// A key's `entries` behind `enabled`, and nodes of next, entries and module.
const KEY: u64 = 0x5000;
const ENTRIES: u64 = 8;
const LINKED: u64 = 2;
const OURS: u64 = 0x7000;
const OWN: u64 = 0x7018;

/// Takes the patch's nodes from the list of the key; gives whether that could be, and the words that change.
fn unlinked(words: &[(u64, u64)]) -> (bool, Vec<(u64, u64)>) {
    let memory = Memory(words.iter().copied().collect());
    let key = ListedKey {
        key: KEY,
        node: OURS,
        own: Some(OWN),
    };
    let node = Node {
        next: 0,
        entries: 8,
        module: 16,
    };
    let mut words = Words::new(&memory, Gva(0), Vec::new());
    let done = unlink(&mut words, ENTRIES, &node, &key).unwrap();
    (done, words.set_words())
}

#[test]
fn a_key_gets_back_its_own_rows_when_the_last_patch_leaves() {
    let rows = 0x9000;
    let listed = [
        (KEY + ENTRIES, OURS | LINKED | 1),
        (OURS, OWN),
        (OWN, 0),
        (OWN + 8, rows),
    ];
    assert_eq!(unlinked(&listed), (true, vec![(KEY + ENTRIES, rows | 1)]));
    // The patch is gone already, or was never listed.
    assert_eq!(unlinked(&[(KEY + ENTRIES, rows | 1)]), (true, Vec::new()));
}

#[test]
fn a_node_that_a_later_module_hangs_on_stays() {
    let other = 0x6000;
    let listed = [(KEY + ENTRIES, other | LINKED), (other, OURS), (OURS, OWN), (OWN, 0)];
    assert!(!unlinked(&listed).0);
}

/// The guest has made the key a list by itself when it loaded a module, as the patch was only staged.
#[test]
fn a_list_that_never_had_a_patchs_nodes_is_none_of_its_business() {
    let (first, last) = (0x6000, 0x6018);
    let listed = [(KEY + ENTRIES, first | LINKED | 1), (first, last), (last, 0)];
    assert_eq!(unlinked(&listed), (true, Vec::new()));
}
