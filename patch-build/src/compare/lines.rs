//! Line numbers in the code: `__LINE__` as an argument of a call. An unrelated line above changes them; they do not matter.

use std::collections::BTreeMap;

use iced_x86::{Mnemonic, OpKind, Register};

use crate::elf::At;
use crate::elf::code::instructions;
use crate::types::Rows;

/// A statement has no more lines: a macro may say any of them.
const STATEMENT_LINES_MAX: u64 = 16;

/// Where functions start in the file, before and after, and which lines their code is of.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    /// Line before and line after, ascending by the first.
    starts: Vec<(u64, u64)>,
    before: Rows,
    after: Rows,
}

impl Lines {
    /// Of the functions that both versions have.
    pub fn new(before: (&BTreeMap<String, u64>, Rows), after: (&BTreeMap<String, u64>, Rows)) -> Self {
        let both = before.0.iter();
        let both = both.filter_map(|(name, line)| Some((*line, *after.0.get(name)?)));
        let mut starts: Vec<(u64, u64)> = both.collect();
        starts.sort_unstable();
        Self {
            starts,
            before: before.1,
            after: after.1,
        }
    }

    /// True where one line became the other because text above its function grew or shrank.
    fn moved(&self, before: u64, after: u64) -> bool {
        let behind = self.starts.partition_point(|(line, _)| *line <= before);
        let start = behind.checked_sub(1).and_then(|last| self.starts.get(last));
        start.is_some_and(|(from, to)| after.checked_sub(*to) == before.checked_sub(*from))
    }

    /// True where two texts are the same but for a line of the source: `fs/namei.c:100`, as some of the kernel's macros spell it.
    pub fn explain_text(&self, before: &[u8], after: &[u8]) -> bool {
        let split = |text: &[u8]| -> Option<(String, u64, String)> {
            let text = std::str::from_utf8(text).ok()?;
            let (front, rest) = text.split_once(".c:").or_else(|| text.split_once(".h:"))?;
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            let (line, back) = rest.split_at_checked(digits)?;
            Some((front.to_owned(), line.parse().ok()?, back.to_owned()))
        };
        before == after
            || match (split(before), split(after)) {
                (Some((front, x, back)), Some((other_front, y, other_back))) => {
                    front == other_front && back == other_back && self.moved(x, y)
                }
                _ => false,
            }
    }

    /// True where the code at two places differs in nothing but line numbers handed to calls, each that of a statement of that very code.
    pub fn explain(&self, at: (At, At), before: &[u8], after: &[u8]) -> bool {
        if before.len() != after.len() {
            return false;
        }
        let len = u64::try_from(before.len()).unwrap_or(u64::MAX);
        let own: [Vec<u64>; 2] = [
            self.before.lines_in(at.0, len).collect(),
            self.after.lines_in(at.1, len).collect(),
        ];
        let is_own = |lines: &[u64], number: u64| {
            let past = |line: &u64| number.checked_sub(*line);
            lines.iter().filter_map(past).any(|past| past < STATEMENT_LINES_MAX)
        };
        instructions(before).zip(instructions(after)).all(|(a, b)| {
            if a.ip() != b.ip() || a.len() != b.len() {
                return false;
            }
            let bytes = |code: &[u8]| {
                let range = usize::try_from(a.ip()).ok()?..usize::try_from(a.next_ip()).ok()?;
                code.get(range).map(<[u8]>::to_vec)
            };
            bytes(before) == bytes(after)
                || (is_argument(&a) && is_argument(&b) && a.op0_register() == b.op0_register() && {
                    let (x, y) = (u64::from(a.immediate32()), u64::from(b.immediate32()));
                    self.moved(x, y) && is_own(&own[0], x) && is_own(&own[1], y)
                })
        })
    }
}

/// True for `mov $number, register`, the register being one that arguments are handed over in.
fn is_argument(instruction: &iced_x86::Instruction) -> bool {
    let arguments = [
        Register::EDI,
        Register::ESI,
        Register::EDX,
        Register::ECX,
        Register::R8D,
        Register::R9D,
    ];
    instruction.mnemonic() == Mnemonic::Mov
        && instruction.op1_kind() == OpKind::Immediate32
        && arguments.contains(&instruction.op0_register())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `mov $line, %esi; call`.
    fn code(line: u8) -> Vec<u8> {
        vec![0xbe, line, 0, 0, 0, 0xe8, 0, 0, 0, 0]
    }

    fn lines() -> Lines {
        let map = |line| BTreeMap::from([("f".to_owned(), line)]);
        let rows = |lines: [u64; 2]| Rows::of(lines.map(|line| (AT, line)).to_vec());
        Lines::new((&map(10), rows([10, 12])), (&map(13), rows([13, 15])))
    }

    const AT: At = At { section: 1, offset: 0 };

    #[test]
    fn a_line_that_moved_with_its_function_is_no_change() {
        assert!(lines().explain((AT, AT), &code(12), &code(15)));
    }

    #[test]
    fn a_line_inside_a_text_is_no_change_either() {
        assert!(lines().explain_text(b"a at x.c:12\0", b"a at x.c:15\0"));
        assert!(!lines().explain_text(b"a at x.c:12\0", b"a at x.c:16\0"));
        assert!(!lines().explain_text(b"a at x.c:12\0", b"b at x.c:15\0"));
    }

    #[test]
    fn another_number_is_a_change() {
        let explained = |before, after| lines().explain((AT, AT), &code(before), &code(after));
        assert!(!explained(12, 16));
        assert!(!explained(9, 12));
        // It moved as the function did, which has no such line.
        assert!(!explained(60, 63));
    }
}
