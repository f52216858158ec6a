//! Describes for a person what blocked a commit.

use super::NotSafe;
use crate::addr::Gva;
use crate::kernel::Live;
use crate::text::chain;

/// Most tasks that a message names.
const TASKS_MAX: usize = 4;
/// Most frames of each task that a message shows.
const FRAMES_MAX: usize = 8;

/// Says which task is inside which function, or what else blocked the commit.
pub(super) fn describe(live: &Live<'_>, why: &NotSafe) -> String {
    match why {
        NotSafe::Held(held) => held.to_string(),
        NotSafe::Changing => "the guest keeps changing what the plan was made from".to_owned(),
        NotSafe::TooLong { took_us, allowed_us } => {
            format!("the pause took {took_us} µs, more than the {allowed_us} allowed: the host is too busy")
        }
        NotSafe::Stacks(verdict) => {
            let symbol = |at: Gva| match live.kernel.symbols.containing(at) {
                Some((symbol, _)) => format!("{}+{:#x}", symbol.name, at.0.wrapping_sub(symbol.address.0)),
                None => at.to_string(),
            };
            let blockers = verdict.blockers.iter().map(|blocker| {
                let stack: Vec<_> = blocker
                    .stack
                    .iter()
                    .take(FRAMES_MAX)
                    .map(|frame| symbol(frame.ip))
                    .collect();
                format!(
                    "{} is inside {} ({})",
                    blocker.task,
                    blocker.function,
                    stack.join(" < ")
                )
            });
            let unsure = verdict.unsure.iter().map(|unsure| {
                let task = unsure
                    .task
                    .as_ref()
                    .map_or_else(|| "the guest".to_owned(), ToString::to_string);
                format!("{task}: {}", chain(&unsure.why))
            });
            let all: Vec<_> = blockers.chain(unsure).collect();
            let more = all.len().saturating_sub(TASKS_MAX);
            let shown = all.into_iter().take(TASKS_MAX).collect::<Vec<_>>().join("; ");
            if more == 0 {
                shown
            } else {
                format!("{shown}; and {more} more")
            }
        }
    }
}
