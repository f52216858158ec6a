//! What follows where vmpatch was killed: which step of a commit is undone, and which is finished. [`State`] says what each step records
//! in the registry.
//!
//! The next vmpatch goes by the registry and by what the patch's sites hold:
//!
//! | state | sites | rest |
//! |---|---|---|
//! | `Staging`, `Reverted` | – | wipe: the guest can't reach the patch |
//! | `Applied`, `Kept`, `Transition`, `Unpatching` | – | nothing |
//! | `Applying` | all old | remove |
//! | `Applying` | a jump | remove; keep code that the guest may use |
//! | `Reapplying` | – | remove; keep the code |
//! | `Reverting` | all jumps | in force again: the pause had not begun |
//! | `Reverting` | else | remove; keep code that has handed out its addresses |
//! | `StartUnpatching` | all jumps lead to the new code | in force again: the pause had not begun |
//! | `StartUnpatching` | some lead to trampolines, the others to the new code | complete: the pause of the begin again, with marks for the tasks that are inside now |
//! | `StartUnpatching` | else | remove; keep code that has handed out its addresses |
//! | `Replaced` | – | remove, if the guest does not use it; keep code that has handed out its addresses |
//!
//! *Remove* is a commit of its own, with all its checks: old bytes into the sites, and then either another name for the module, or the module
//! out of the guest's lists and the text wiped.
//!
//! The supervisor has the commit's journal. Where the guest has not run since the pause began, it undoes all of it. Under KVM the guest runs as
//! soon as vmpatch is dead, and nobody has checked its stacks and locks since:
//!
//! | written in the pause | apply | revert, recovery |
//! |---|---|---|
//! | nothing | undo the staged changes | the same |
//! | data in front of the code | undo these data; the memory stays | old bytes into the sites |
//! | some code | old bytes into the sites, state `Reverting` | old bytes into the sites |
//! | all code | finish | finish |
//! | the last word | complete | complete |
//!
//! The begin of a transition that reverts a patch is an exception: where the guest may have run, the supervisor finishes it as soon as any code was
//! written. All marks were set before that, and tasks may have entered the old code since: direct jumps would lead them to the new one.
//!
//! What the supervisor leaves is whole, and the next vmpatch removes it. Why that is safe:
//!
//! - **A jump is only written in the pause that checked the stacks.** Before, a task may be in the middle of the bytes that it takes.
//! - **Old bytes may go over a jump at any time.** A jump is one instruction, so that no task is in the middle of it. The old function behind it is
//!   whole. Where another patch held the function, the old bytes are its jump, and its code is still there.
//! - **Where one jump was there, new code and its registration stay**: a task may be in that code.
//! - **All code of a revert was written**: its pause found no task in the new code, and no jump has led there since. What is left are
//!   words of the guest's lists.
//! - **Words of the guest's lists are written only where no lock of them is held, and each word is as the commit found it or has left it.**
//!   Else they stay, and the next vmpatch plans anew from the guest as it is.

use crate::registry::State;

/// What a patch's sites hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sites {
    /// No jump.
    Old,
    /// Jumps in some of them, or a part of what a commit writes beside.
    Mixed,
    /// All that a commit writes there.
    New,
}

/// What the next vmpatch does with a patch first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rest {
    /// Nothing.
    Nothing,
    /// It wipes the pages, which the guest can't reach, and empties the slot.
    Wipe,
    /// It records that the patch is in force.
    Reinstate,
    /// It takes the patch out of force.
    Remove(Keep),
    /// It completes the begin of a transition that reverts the patch.
    Complete,
    /// It removes the patch, to which nothing leads any more, if it can.
    Discard,
}

/// When a patch that is taken out of force keeps its code, and stays registered in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Never: the code has not run.
    Never,
    /// Where it may have [handed out its addresses](crate::registry::Record::must_stay).
    IfHandedOut,
    /// The same, and where the guest has a reference to the module.
    IfUsed,
    /// Always.
    Always,
}

impl Rest {
    /// The first table: what is left to do of a patch in `state`.
    pub const fn of(state: State, sites: Sites) -> Self {
        match (state, sites) {
            (State::Staging | State::Reverted, _) => Self::Wipe,
            (State::Applied | State::Kept | State::Transition | State::Unpatching, _) => Self::Nothing,
            (State::Replaced, _) => Self::Discard,
            (State::Applying, Sites::Old) => Self::Remove(Keep::Never),
            (State::Applying, _) => Self::Remove(Keep::IfUsed),
            (State::Reapplying, _) => Self::Remove(Keep::Always),
            (State::Reverting | State::StartUnpatching, Sites::New) => Self::Reinstate,
            (State::StartUnpatching, Sites::Mixed) => Self::Complete,
            (State::StartUnpatching, Sites::Old) => Self::Remove(Keep::IfHandedOut),
            (State::Reverting, _) => Self::Remove(Keep::IfHandedOut),
        }
    }
}

/// How much of a commit's pause was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// Nothing.
    Nothing,
    /// Data alone, which come before the code.
    Data,
    /// Some of the code.
    SomeCode,
    /// All code.
    AllCode,
}

/// What a supervisor does with a commit whose last word is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It undoes all of it.
    Undo,
    /// It undoes the data.
    UndoData,
    /// It writes old bytes into the sites.
    RestoreSites,
    /// It makes what is left.
    Finish,
}

impl Ending {
    /// The second table. `redirects`: the commit leads the guest into new code. `has_run`: the guest may have run since the pause began.
    pub const fn of(written: Written, redirects: bool, has_run: bool) -> Self {
        match (has_run, written) {
            (false, _) | (true, Written::Nothing) => Self::Undo,
            (true, Written::Data) if redirects => Self::UndoData,
            (true, Written::Data | Written::SomeCode) => Self::RestoreSites,
            (true, Written::AllCode) => Self::Finish,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Ending::{Finish, RestoreSites, Undo, UndoData};
    use Keep::{Always, IfHandedOut, IfUsed, Never};
    use Rest::{Complete, Discard, Nothing, Reinstate, Remove, Wipe};

    #[test]
    fn the_next_vmpatch_goes_by_state_and_sites() {
        for (state, old, mixed, new) in [
            (State::Staging, Wipe, Wipe, Wipe),
            (State::Applying, Remove(Never), Remove(IfUsed), Remove(IfUsed)),
            (State::Applied, Nothing, Nothing, Nothing),
            (State::Reverting, Remove(IfHandedOut), Remove(IfHandedOut), Reinstate),
            (State::Reverted, Wipe, Wipe, Wipe),
            (State::Kept, Nothing, Nothing, Nothing),
            (State::Transition, Nothing, Nothing, Nothing),
            (State::Unpatching, Nothing, Nothing, Nothing),
            (State::StartUnpatching, Remove(IfHandedOut), Complete, Reinstate),
            (State::Replaced, Discard, Discard, Discard),
            (State::Reapplying, Remove(Always), Remove(Always), Remove(Always)),
        ] {
            for (sites, rest) in [(Sites::Old, old), (Sites::Mixed, mixed), (Sites::New, new)] {
                assert_eq!(Rest::of(state, sites), rest, "{state:?} {sites:?}");
            }
        }
    }

    #[test]
    fn the_supervisor_goes_by_what_was_written_and_whether_the_guest_has_run() {
        for (written, apply, revert) in [
            (Written::Nothing, Undo, Undo),
            (Written::Data, UndoData, RestoreSites),
            (Written::SomeCode, RestoreSites, RestoreSites),
            (Written::AllCode, Finish, Finish),
        ] {
            for (redirects, ending) in [(true, apply), (false, revert)] {
                assert_eq!(Ending::of(written, redirects, true), ending, "{written:?}");
                assert_eq!(Ending::of(written, redirects, false), Undo, "{written:?}");
            }
        }
    }
}
