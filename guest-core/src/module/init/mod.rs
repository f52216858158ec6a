//! Finds what a module's init and exit functions do beside enabling the patch. vmpatch does not run them, so that a module whose init or exit does more is
//! refused: its new functions would find pointers that are not set and locks that are not initialised.
//!
//! Accepted are:
//! - of a static `klp_patch`: messages, and `klp_enable_patch` of that patch, without a branch before;
//! - what the init and exit of kpatch-build (kmod/patch/livepatch-patch-hook.c of kpatch 0.9.10 and 0.9.11) and of klp-build
//!   (scripts/livepatch/init.c of Linux 6.19 to 7.2) do: allocate a `klp_patch` and fill it from the tables that
//!   [`PatchModule::patch`] has read.
//!
//! The error names everything else: the called function, the written variable, the instruction. `walk.rs` follows the code, instruction by instruction
//! (`step.rs`); `state.rs` holds what is known of the registers.

mod calls;
mod state;
mod step;
#[cfg(test)]
mod tests;
mod walk;

use super::sections::{SectionOffset, SymbolPlace};
use super::this_module::SECTION as THIS_MODULE;
use super::{PatchError, PatchFormat, PatchModule};
use calls::Rules;
use std::fmt;
use walk::Walk;

/// By this name the loader's headers know a module's exit function.
const EXIT: &str = "cleanup_module";
/// Tables of code that the loader rewrites, or that continues elsewhere after a fault: the bytes in the file do not show what such code does.
const REWRITTEN: [&str; 4] = [".altinstructions", "__jump_table", ".parainstructions", "__ex_table"];

/// A function of the module that the kernel's own loader runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnFunction {
    /// What runs when the module is loaded.
    Init,
    /// What runs when it is unloaded.
    Exit,
}

impl fmt::Display for OwnFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Init => "init",
            Self::Exit => "exit",
        })
    }
}

/// What init or exit does beside enabling the patch.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Work {
    /// Calls a function.
    #[error("calls {0}")]
    Calls(String),
    /// Calls a function through a pointer.
    #[error("calls a function through a pointer")]
    CallsPointer,
    /// Writes a variable.
    #[error("writes {0}")]
    Writes(String),
    /// Writes through a pointer that does not lead to its own stack.
    #[error("writes through a pointer")]
    WritesPointer,
    /// Uses a variable that has nothing to do with enabling the patch.
    #[error("uses {0}")]
    Uses(String),
    /// Whether, or how, the patch is enabled depends on something.
    #[error("decides by {0} how to enable the patch")]
    Decides(String),
    /// Enables another patch than the module's `klp_patch`.
    #[error("enables another patch than the module's klp_patch")]
    OtherPatch,
    /// Has an instruction that no accepted init has.
    #[error("executes {0}")]
    Executes(String),
    /// Has code that the loader changes.
    #[error("has code that {0} lists, which the loader may change")]
    Rewritten(&'static str),
    /// Has no code, or code without an end.
    #[error("goes on where no instruction is")]
    NoCode,
    /// Has more code than is followed.
    #[error("is too long to be followed")]
    TooLong,
}

impl PatchModule<'_> {
    /// Refuses a module whose init does more than enable its patch, the `klp_patch` at `patch` where that is static; or whose
    /// exit does anything that counts. Gives the value that a tool's init writes to `klp_patch.replace`, at that offset, where it is known.
    pub(super) fn check_own_functions(
        &self,
        format: PatchFormat,
        patch: Option<SectionOffset>,
        replace_at: Option<u64>,
    ) -> Result<Option<bool>, PatchError> {
        let (mut enables, mut replace) = (false, None);
        for (function, entry) in self.own_functions()? {
            let rules = Rules::of(format, function);
            let mut walk = Walk::new(self, rules, patch).with_replace_at(replace_at);
            let refuse = |(work, at)| PatchError::OwnFunction {
                function,
                work,
                at: self.place(at),
            };
            walk.follow(entry).map_err(refuse)?;
            self.refuse_rewritten(&walk).map_err(refuse)?;
            if function == OwnFunction::Init {
                enables |= walk.enables();
                replace = walk.replace();
            }
        }
        if enables {
            Ok(replace)
        } else {
            Err(PatchError::NotEnabled)
        }
    }

    /// Init and exit, and where they begin.
    pub(super) fn own_functions(&self) -> Result<Vec<(OwnFunction, SectionOffset)>, PatchError> {
        let Some((id, section)) = self.section_named(THIS_MODULE) else {
            return Ok(Vec::new());
        };
        let mut functions = Vec::new();
        for relocation in &section.relocations {
            let at = SectionOffset {
                section: id,
                offset: relocation.offset,
            };
            let code = self.target(relocation, 0);
            let code = code.filter(|code| self.section(code.section).is_some_and(|s| s.is_executable()));
            let Some(entry) = code else {
                let found = self.symbol_name(relocation);
                return Err(self.member("struct module", at, found, "the module's init or exit"));
            };
            // Where the symbol is the section's own, the name that is missing may be that of exit.
            let is_exit = self.symbol_name(relocation) == EXIT
                || self.names_at(entry).any(|name| name == EXIT)
                || self.section_name(entry.section).starts_with(".exit.");
            let function = if is_exit { OwnFunction::Exit } else { OwnFunction::Init };
            functions.push((function, entry));
        }
        Ok(functions)
    }

    fn refuse_rewritten(&self, walk: &Walk<'_, '_>) -> Result<(), (Work, SectionOffset)> {
        for (_, table) in self.sections() {
            let Some(name) = REWRITTEN.into_iter().find(|name| *name == table.name) else {
                continue;
            };
            let targets = table.relocations.iter().filter_map(|r| self.target(r, 0));
            if let Some(at) = targets.into_iter().find(|at| walk.has_visited(*at)) {
                return Err((Work::Rewritten(name), at));
            }
        }
        Ok(())
    }

    /// The names of symbols at a place.
    fn names_at(&self, at: SectionOffset) -> impl Iterator<Item = &str> {
        let here = move |place| place == SymbolPlace::Defined(at);
        let symbols = self.elf.symbols.iter();
        symbols
            .filter(move |symbol| here(symbol.place))
            .map(|symbol| symbol.name)
    }

    /// The variable or function that a place belongs to, for a message.
    fn owner(&self, at: SectionOffset) -> String {
        let symbols = self.elf.symbols.iter().filter(|symbol| !symbol.name.is_empty());
        let covers = symbols.filter_map(|symbol| match symbol.place {
            SymbolPlace::Defined(start) if start.section == at.section => {
                let offset = at.offset.checked_sub(start.offset)?;
                // Marks that a linker script sets have no size, and may be where a variable begins.
                (offset < symbol.size.max(1)).then_some((symbol.size > 0, start.offset, symbol.name))
            }
            _ => None,
        });
        let nearest = covers.max_by_key(|(is_sized, start, _)| (*is_sized, *start));
        nearest.map_or_else(|| self.place(at), |(_, _, name)| name.to_owned())
    }
}
