//! The kernel's red-black trees (`struct rb_root`): insertion and removal as changes of words.
//!
//! Format: `struct rb_node` and `struct rb_root` (include/linux/rbtree_types.h): a node's first word is its parent's address,
//! with the colour in bit 0 (1 is black). The algorithms are the textbook ones (Cormen et al., Introduction to Algorithms, chapter 13).
//! Mirrored cases share their code.

use super::words::{Words, damaged};
use crate::addr::Gva;
use crate::btf::{Btf, BtfError};
use crate::kernel::KernelError;

/// Largest depth of a tree: one with 2^64 nodes has at most 128 levels.
const DEPTH_MAX: usize = 128;
/// Colour bit of `rb_node.__rb_parent_color`.
const BLACK: u64 = 1;
/// Low bits of that word that do not belong to the address.
const COLOUR_BITS: u64 = 3;
/// The address of a missing node.
const NONE: Gva = Gva(0);

/// Offsets of a node's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NodeLayout {
    parent_colour: u64,
    left: u64,
    right: u64,
}

impl NodeLayout {
    pub fn find(btf: &Btf) -> Result<Self, BtfError> {
        let node = btf.structure("rb_node")?;
        Ok(Self {
            parent_colour: node.offset("__rb_parent_color")?,
            left: node.offset("rb_left")?,
            right: node.offset("rb_right")?,
        })
    }
}

/// A child's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Left,
    Right,
}
use Side::{Left, Right};

impl Side {
    fn other(self) -> Self {
        match self {
            Left => Right,
            Right => Left,
        }
    }
}

/// One tree.
pub(super) struct Tree<'w, 'a> {
    pub words: &'w mut Words<'a>,
    pub layout: NodeLayout,
    /// Guest-virtual address of the word that holds the root's address.
    pub root_at: Gva,
    /// Distance from a node to its key, the word that the tree is ordered by.
    pub key: i64,
}

type Done = Result<(), KernelError>;

impl Tree<'_, '_> {
    /// Inserts `node`, whose key is already set.
    pub fn insert(&mut self, node: Gva) -> Done {
        let key = self.key_of(node)?;
        let (mut parent, mut side, mut at) = (NONE, Left, self.root()?);
        let mut depth = 0;
        while at != NONE {
            self.require_child(at, parent)?;
            depth += 1;
            if depth > DEPTH_MAX {
                return Err(damaged(format!("a path of more than {DEPTH_MAX} nodes"), "a tree"));
            }
            side = if key < self.key_of(at)? { Left } else { Right };
            (parent, at) = (at, self.child(at, side)?);
        }
        self.words.set(node.wrapping_add(self.layout.parent_colour), parent.0)?;
        self.set_child(node, Left, NONE)?;
        self.set_child(node, Right, NONE)?;
        match parent {
            NONE => self.words.set(self.root_at, node.0)?,
            parent => self.set_child(parent, side, node)?,
        }
        self.fix_red(node)
    }

    /// Rebalances after an insertion: `node` is red, and its parent may be red, too.
    fn fix_red(&mut self, mut node: Gva) -> Done {
        for _ in 0..DEPTH_MAX {
            let parent = self.parent(node)?;
            if parent == NONE {
                return self.set_black(node, true);
            }
            if self.is_black(parent)? {
                return Ok(());
            }
            let grandparent = self.parent(parent)?;
            if grandparent == NONE {
                return Err(damaged(format!("a red root {parent}"), "a black one"));
            }
            let side = self.side_of(parent, grandparent)?;
            let uncle = self.child(grandparent, side.other())?;
            if !self.is_black(uncle)? {
                self.set_black(parent, true)?;
                self.set_black(uncle, true)?;
                self.set_black(grandparent, false)?;
                node = grandparent;
                continue;
            }
            let mut top = parent;
            if self.child(parent, side.other())? == node {
                self.rotate(parent, side)?;
                top = node;
            }
            self.set_black(top, true)?;
            self.set_black(grandparent, false)?;
            return self.rotate(grandparent, side.other());
        }
        Err(damaged(format!("a path of more than {DEPTH_MAX} nodes"), "a tree"))
    }

    /// True where `node` is in the tree: a search for its key finds it.
    pub fn holds(&self, node: Gva) -> Result<bool, KernelError> {
        let key = self.key_of(node)?;
        let mut at = self.root()?;
        for _ in 0..DEPTH_MAX {
            if at == NONE || at == node {
                return Ok(at == node);
            }
            let side = if key < self.key_of(at)? { Left } else { Right };
            at = self.child(at, side)?;
        }
        Err(damaged(format!("a path of more than {DEPTH_MAX} nodes"), "a tree"))
    }

    /// Removes `node`. Its own words stay as they are.
    pub fn remove(&mut self, node: Gva) -> Done {
        self.require_linked(node)?;
        let (left, right) = (self.child(node, Left)?, self.child(node, Right)?);
        let (moved_up, parent, was_black) = if left != NONE && right != NONE {
            // The next node in order, which has no left child, takes the node's place.
            let next = self.outermost(right, Left)?;
            let (behind, was_black) = (self.child(next, Right)?, self.is_black(next)?);
            let parent = match self.parent(next)? {
                parent if parent == node => next,
                parent => {
                    self.set_child(parent, Left, behind)?;
                    self.set_child(next, Right, right)?;
                    self.set_parent(right, next)?;
                    parent
                }
            };
            self.replace(node, next)?;
            self.set_child(next, Left, left)?;
            self.set_parent(left, next)?;
            let is_black = self.is_black(node)?;
            self.set_black(next, is_black)?;
            (behind, parent, was_black)
        } else {
            let only = if left == NONE { right } else { left };
            let parent = self.parent(node)?;
            self.replace(node, only)?;
            (only, parent, self.is_black(node)?)
        };
        if moved_up != NONE {
            self.set_parent(moved_up, parent)?;
        }
        if was_black {
            self.fix_black(moved_up, parent)
        } else {
            Ok(())
        }
    }

    /// Rebalances after a removal: the paths through `node`, a child of `parent` that may be missing, have one black node less than the
    /// others.
    fn fix_black(&mut self, mut node: Gva, mut parent: Gva) -> Done {
        for _ in 0..DEPTH_MAX {
            if parent == NONE || !self.is_black(node)? {
                break;
            }
            let side = if self.child(parent, Left)? == node { Left } else { Right };
            let mut sibling = self.child(parent, side.other())?;
            if !self.is_black(sibling)? {
                self.set_black(sibling, true)?;
                self.set_black(parent, false)?;
                self.rotate(parent, side)?;
                sibling = self.child(parent, side.other())?;
            }
            if sibling == NONE {
                return Err(damaged(format!("no sibling below {parent}"), "one"));
            }
            let (near, far) = (self.child(sibling, side)?, self.child(sibling, side.other())?);
            if self.is_black(near)? && self.is_black(far)? {
                self.set_black(sibling, false)?;
                (node, parent) = (parent, self.parent(parent)?);
                continue;
            }
            if self.is_black(far)? {
                self.set_black(near, true)?;
                self.set_black(sibling, false)?;
                self.rotate(sibling, side.other())?;
                sibling = near;
            }
            let is_black = self.is_black(parent)?;
            self.set_black(sibling, is_black)?;
            self.set_black(parent, true)?;
            let far = self.child(sibling, side.other())?;
            self.set_black(far, true)?;
            return self.rotate(parent, side);
        }
        if node == NONE {
            Ok(())
        } else {
            self.set_black(node, true)
        }
    }

    /// Rotates the subtree at `top` towards `side`: the child on the other side takes the place of `top`, which becomes its child.
    fn rotate(&mut self, top: Gva, side: Side) -> Done {
        let up = self.child(top, side.other())?;
        if up == NONE {
            return Err(damaged(format!("no child to turn up at {top}"), "one"));
        }
        let inner = self.child(up, side)?;
        self.set_child(top, side.other(), inner)?;
        if inner != NONE {
            self.set_parent(inner, top)?;
        }
        self.replace(top, up)?;
        self.set_child(up, side, top)?;
        self.set_parent(top, up)
    }

    /// Links `new`, which may be missing, to the parent of `old`, or to the root.
    fn replace(&mut self, old: Gva, new: Gva) -> Done {
        let parent = self.parent(old)?;
        if parent == NONE {
            self.words.set(self.root_at, new.0)?;
        } else {
            let side = self.side_of(old, parent)?;
            self.set_child(parent, side, new)?;
        }
        if new == NONE {
            Ok(())
        } else {
            self.set_parent(new, parent)
        }
    }

    /// The first and the last node; `None` for an empty tree.
    pub fn ends(&self) -> Result<Option<[Gva; 2]>, KernelError> {
        match self.root()? {
            NONE => Ok(None),
            root => Ok(Some([self.outermost(root, Left)?, self.outermost(root, Right)?])),
        }
    }

    /// The outermost node on a side of the subtree at `node`.
    fn outermost(&self, mut node: Gva, side: Side) -> Result<Gva, KernelError> {
        for _ in 0..DEPTH_MAX {
            let next = self.child(node, side)?;
            if next == NONE {
                return Ok(node);
            }
            node = next;
        }
        Err(damaged(format!("a path of more than {DEPTH_MAX} nodes"), "a tree"))
    }

    /// Requires that `node` is in the tree.
    fn require_linked(&self, mut node: Gva) -> Done {
        for _ in 0..DEPTH_MAX {
            let parent = self.parent(node)?;
            if parent == NONE {
                let root = self.root()?;
                return if root == node {
                    Ok(())
                } else {
                    Err(damaged(
                        format!("{node} without a parent"),
                        &format!("{root}, the root"),
                    ))
                };
            }
            self.side_of(node, parent)?;
            node = parent;
        }
        Err(damaged(format!("a path of more than {DEPTH_MAX} nodes"), "a tree"))
    }

    fn require_child(&self, node: Gva, parent: Gva) -> Done {
        match self.parent(node)? {
            found if found == parent => Ok(()),
            found => Err(damaged(format!("{found} as parent of {node}"), &parent.to_string())),
        }
    }

    fn side_of(&self, child: Gva, parent: Gva) -> Result<Side, KernelError> {
        if self.child(parent, Left)? == child {
            return Ok(Left);
        }
        match self.child(parent, Right)? {
            right if right == child => Ok(Right),
            right => Err(damaged(format!("{right} as child of {parent}"), &child.to_string())),
        }
    }

    fn root(&self) -> Result<Gva, KernelError> {
        Ok(Gva(self.words.get(self.root_at)?))
    }

    fn key_of(&self, node: Gva) -> Result<u64, KernelError> {
        self.words.get(node.wrapping_offset(self.key))
    }

    fn colour_word(&self, node: Gva) -> Result<u64, KernelError> {
        self.words.get(node.wrapping_add(self.layout.parent_colour))
    }

    fn parent(&self, node: Gva) -> Result<Gva, KernelError> {
        Ok(Gva(self.colour_word(node)? & !COLOUR_BITS))
    }

    fn set_parent(&mut self, node: Gva, parent: Gva) -> Done {
        let colour = self.colour_word(node)? & COLOUR_BITS;
        self.words
            .set(node.wrapping_add(self.layout.parent_colour), parent.0 | colour)
    }

    /// True for a black node. A missing node counts as black.
    fn is_black(&self, node: Gva) -> Result<bool, KernelError> {
        Ok(node == NONE || self.colour_word(node)? & BLACK != 0)
    }

    fn set_black(&mut self, node: Gva, is_black: bool) -> Done {
        let parent = self.colour_word(node)? & !COLOUR_BITS;
        self.words.set(
            node.wrapping_add(self.layout.parent_colour),
            parent | u64::from(is_black),
        )
    }

    fn child_at(&self, node: Gva, side: Side) -> Gva {
        node.wrapping_add(if side == Left {
            self.layout.left
        } else {
            self.layout.right
        })
    }

    fn child(&self, node: Gva, side: Side) -> Result<Gva, KernelError> {
        Ok(Gva(self.words.get(self.child_at(node, side))?))
    }

    fn set_child(&mut self, node: Gva, side: Side, child: Gva) -> Done {
        self.words.set(self.child_at(node, side), child.0)
    }
}
