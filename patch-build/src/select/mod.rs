//! What goes into the module: the changed and new functions, and the new data that they need. All else stays the running
//! kernel's, and is referred to.

mod left_out;
#[cfg(test)]
mod meant;
mod reference;
mod risk;
mod roots;
#[cfg(test)]
mod tests;

pub use reference::{OutSymbol, Reference};
pub use risk::{Finding, Risk};
pub use roots::Side;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::compare::{ItemId, Verdict};
use crate::elf::{At, Relocation};
use crate::facts::Exports;
use crate::running::Found;

/// Which item of which file: an index of the sides, and an item of the file's second version.
pub type Chosen = (usize, ItemId);

/// A function that the patch replaces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    /// The new one.
    pub new: Chosen,
    /// The old one: an item of the file's first version.
    pub old: ItemId,
    /// Where the old one is.
    pub found: Found,
}

/// A piece of a section that no symbol names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Piece {
    /// Index of the file.
    pub side: usize,
    /// Where it is.
    pub at: At,
    /// Its bytes.
    pub len: u64,
}

/// What goes into the module.
#[derive(Debug)]
pub struct Selection {
    /// The functions that the patch replaces.
    pub replaced: Vec<Replaced>,
    /// All that is carried, with the reason.
    pub carried: BTreeMap<Chosen, Why>,
    /// What speaks against it, or should be known.
    pub findings: Vec<Finding>,
}

/// Why something is in the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// A function that changed, in this.
    Changed(String),
    /// It was not there before; needed by this.
    New(String),
    /// Split off the function of that name.
    Part(String),
    /// A constant or a copy that is needed by this.
    Copy(String),
}

/// Why a selection could not be made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SelectError {
    /// A changed function has no symbol in the kernel.
    #[error("{file}: {name} changed, but the kernel has no symbol of that name: it is always inlined, or not built in")]
    NoSymbol {
        /// The source file.
        file: String,
        /// The function.
        name: String,
    },
    /// The linker took another file's function of that name.
    #[error(
        "{file}: {name} changed, but the kernel's {name} is another file's, which is taken instead: what the change does to this one has no effect; \
         leave it out"
    )]
    Overridden {
        /// The source file.
        file: String,
        /// The function.
        name: String,
    },
    /// Several symbols have a name, and nothing tells which one is meant.
    #[error("{file}: the kernel has {count} symbols named {name}, and its code does not tell which one is meant")]
    Ambiguous {
        /// The source file.
        file: String,
        /// The name.
        name: String,
        /// How many there are.
        count: usize,
    },
    /// A function of the kernel that two files have.
    #[error("{name} of the kernel is in {first} and in {second}: only one of them can be what the kernel is made of")]
    Twice {
        /// The function.
        name: String,
        /// A source file.
        first: String,
        /// The other one.
        second: String,
    },
    /// A function that the kernel has only once for two, which are not the same any more.
    #[error(
        "{file}: the kernel has the same code for {name} and {other}, which differ now: to replace one would change both"
    )]
    Shared {
        /// The source file.
        file: String,
        /// The function that changed.
        name: String,
        /// The other one.
        other: String,
    },
    /// A per-CPU variable of the patch's own that begins with an address.
    #[error(
        "{file}: the new per-CPU variable {name} begins with an address, which a kernel that loads the module itself may not fill in: set it at run time"
    )]
    PerCpuAddress {
        /// The source file.
        file: String,
        /// The variable.
        name: String,
    },
    /// The address of a function to which no indirect call may lead.
    #[error(
        "{file}: {needed_by} keeps the address of {name}, as no code of the kernel did: the kernel has sealed that entry, and a processor with IBT \
         stops a call that leads there; keep that of a new function which calls it"
    )]
    Sealed {
        /// The source file.
        file: String,
        /// The function.
        name: String,
        /// Who keeps it.
        needed_by: String,
    },
    /// Something that is nowhere.
    #[error("{file}: {needed_by} needs {name}, which the kernel does not have")]
    Unknown {
        /// The source file.
        file: String,
        /// The symbol.
        name: String,
        /// Who needs it.
        needed_by: String,
    },
    /// A branch that would have to follow a static key of the patched module.
    #[error(
        "{file}: {needed_by} hangs on {key}, a static key of module {module}, which a livepatch module learns of too late"
    )]
    ModuleKey {
        /// The source file.
        file: String,
        /// The function.
        needed_by: String,
        /// The key.
        key: String,
        /// The module.
        module: String,
    },
    /// A section that says something of carried code, and is not understood.
    #[error(
        "{file}: section {section} says something about {name}, and a module's loader does not read such a section"
    )]
    Section {
        /// The source file.
        file: String,
        /// The section.
        section: String,
        /// The function.
        name: String,
    },
}

impl Selection {
    /// Selects what goes into the module.
    ///
    /// Errors: see [`SelectError`]. What can be allowed is a [`Finding`] instead.
    pub fn of(sides: &[Side<'_>], exports: &Exports) -> Result<Self, SelectError> {
        let mut findings = Vec::new();
        let roots = roots::roots(sides, &mut findings);
        let mut replaced = Vec::new();
        for root in &roots {
            replaced.extend(roots::replaced(sides, root)?);
        }
        roots::check_once(sides, &replaced)?;
        let patched: BTreeSet<Chosen> = roots.iter().map(|root| root.new).collect();
        let resolver = reference::Resolver {
            sides,
            exports,
            patched: &patched,
        };
        let mut closure = Closure {
            resolver,
            carried: BTreeMap::new(),
            pieces: BTreeSet::new(),
            queue: VecDeque::new(),
            findings,
        };
        for root in roots {
            closure.carry(root.new, Why::Changed(root.what));
        }
        closure.close()?;
        let mut selection = Self {
            replaced,
            carried: closure.carried,
            findings: closure.findings,
        };
        risk::look(sides, &mut selection)?;
        selection.findings.sort();
        selection.findings.dedup();
        Ok(selection)
    }

    /// The resolver that this selection was made with.
    pub fn patched(&self) -> BTreeSet<Chosen> {
        self.replaced.iter().map(|replaced| replaced.new).collect()
    }

    /// True where nothing is to be replaced.
    pub fn is_empty(&self) -> bool {
        self.replaced.is_empty()
    }
}

pub(crate) use reference::Resolver;

/// What is carried so far, and whose references are still to be followed.
struct Closure<'s, 'k> {
    resolver: Resolver<'s, 'k>,
    carried: BTreeMap<Chosen, Why>,
    pieces: BTreeSet<Piece>,
    queue: VecDeque<Node>,
    findings: Vec<Finding>,
}

#[derive(Clone, Copy)]
enum Node {
    Item(Chosen),
    Piece(Piece),
}

impl Closure<'_, '_> {
    fn carry(&mut self, chosen: Chosen, why: Why) {
        if let Entry::Vacant(slot) = self.carried.entry(chosen) {
            slot.insert(why);
            self.queue.push_back(Node::Item(chosen));
        }
    }

    fn close(&mut self) -> Result<(), SelectError> {
        while let Some(node) = self.queue.pop_front() {
            match node {
                Node::Item(chosen) => self.item(chosen)?,
                Node::Piece(piece) => self.piece(piece, "a constant")?,
            }
        }
        Ok(())
    }

    fn item(&mut self, (side, id): Chosen) -> Result<(), SelectError> {
        let Some(of) = self.resolver.sides.get(side) else {
            return Ok(());
        };
        let unit = &of.comparison.after;
        let item = unit.item(id);
        for relocation in unit.relocations(item) {
            self.follow(side, item.at.section, relocation, &item.name)?;
        }
        for entry in unit.entries(id).iter().filter(|entry| !entry.is_inherited) {
            let Some(section) = unit.object.section(entry.at.section) else {
                continue;
            };
            if self.resolver.is_left_out(side, entry, &item.name)? {
                continue;
            }
            if let Some((at, len)) = self.resolver.replacement(side, entry) {
                self.piece(Piece { side, at, len }, &item.name)?;
                continue;
            }
            for relocation in section.relocations_in(entry.at.offset, entry.at.offset + entry.len) {
                let reference = self
                    .resolver
                    .resolve_entry(side, entry.at.section, relocation, &item.name)?;
                self.note(reference, &item.name);
            }
        }
        Ok(())
    }

    fn piece(&mut self, piece: Piece, needed_by: &str) -> Result<(), SelectError> {
        let Some(of) = self.resolver.sides.get(piece.side) else {
            return Ok(());
        };
        let Some(section) = of.comparison.after.object.section(piece.at.section) else {
            return Ok(());
        };
        for relocation in section.relocations_in(piece.at.offset, piece.at.offset + piece.len) {
            self.follow(piece.side, piece.at.section, relocation, needed_by)?;
        }
        Ok(())
    }

    fn follow(&mut self, side: usize, section: usize, relocation: &Relocation, by: &str) -> Result<(), SelectError> {
        let reference = self.resolver.resolve(side, section, relocation, by)?;
        self.note(reference, by);
        Ok(())
    }

    fn note(&mut self, reference: Reference, by: &str) {
        match reference {
            Reference::Carried { item, .. } | Reference::Entry { item, .. } => {
                let why = self.why(item, by);
                self.carry(item, why);
            }
            Reference::Piece { piece, .. } => {
                if self.pieces.insert(piece) {
                    self.queue.push_back(Node::Piece(piece));
                }
            }
            Reference::Running { .. } | Reference::Text(..) | Reference::Number(_) => {}
        }
    }

    fn why(&self, (side, id): Chosen, by: &str) -> Why {
        let Some(of) = self.resolver.sides.get(side) else {
            return Why::Copy(by.to_owned());
        };
        let item = of.comparison.after.item(id);
        if let Some(parent) = crate::compare::names::warm_part(&item.name).filter(|_| item.is_function) {
            return Why::Part(parent.to_owned());
        }
        let by_contents = crate::compare::is_by_contents(&of.comparison.after, id);
        match of.comparison.verdict(id) {
            Verdict::New if !by_contents => Why::New(by.to_owned()),
            _ => Why::Copy(by.to_owned()),
        }
    }
}
