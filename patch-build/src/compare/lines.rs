//! Line numbers in the code: `__LINE__` as an argument of a call. An unrelated line above changes them; they do not matter.

use std::collections::BTreeMap;

use iced_x86::{Mnemonic, OpKind, Register};

use crate::elf::code::instructions;

/// Where functions start in the file, before and after.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    /// Line before and line after, ascending by the first.
    starts: Vec<(u64, u64)>,
}

impl Lines {
    /// Of the functions that both versions have.
    pub fn new(before: &BTreeMap<String, u64>, after: &BTreeMap<String, u64>) -> Self {
        let both = before
            .iter()
            .filter_map(|(name, line)| Some((*line, *after.get(name)?)));
        let mut starts: Vec<(u64, u64)> = both.collect();
        starts.sort_unstable();
        Self { starts }
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

    /// True where the code differs in nothing but line numbers handed to calls.
    pub fn explain(&self, before: &[u8], after: &[u8]) -> bool {
        if before.len() != after.len() {
            return false;
        }
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
                    self.moved(u64::from(a.immediate32()), u64::from(b.immediate32()))
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
        Lines::new(&map(10), &map(13))
    }

    #[test]
    fn a_line_that_moved_with_its_function_is_no_change() {
        assert!(lines().explain(&code(12), &code(15)));
    }

    #[test]
    fn a_line_inside_a_text_is_no_change_either() {
        assert!(lines().explain_text(b"a at x.c:12\0", b"a at x.c:15\0"));
        assert!(!lines().explain_text(b"a at x.c:12\0", b"a at x.c:16\0"));
        assert!(!lines().explain_text(b"a at x.c:12\0", b"b at x.c:15\0"));
    }

    #[test]
    fn another_number_is_a_change() {
        assert!(!lines().explain(&code(12), &code(16)));
        assert!(!lines().explain(&code(9), &code(12)));
    }
}
