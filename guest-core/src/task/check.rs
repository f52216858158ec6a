//! Checks one context: scans its stack, and walks the stack if the scan has found something.

use super::cpus::Cpus;
use super::layout::TaskLayout;
use super::verdict::{Blocker, State, Why};
use crate::addr::Gva;
use crate::unwind::hooked_returns::HookedReturn;
use crate::unwind::scan::{Finding, scan, scan_words};
use crate::unwind::{
    CodeMap, Frame, HookedReturns, KernelView, OldCode, OldFunction, PtRegs, Stack, StackKind, Start, UnwindError,
    Unwinder,
};
use crate::vcpu::Registers;
use std::cell::Cell;

/// Addresses from here on are the kernel's; below are user mode's.
const KERNEL_START: u64 = 1 << 63;

/// What [`UnwindError::Unreadable`] says was being read.
const STACK: &str = "the stack";
const TASK: &str = "the task";

/// What a check of a stack needs.
pub(super) struct StackCheck<'a> {
    pub view: &'a dyn KernelView,
    pub layout: &'a TaskLayout,
    pub cpus: &'a Cpus,
    pub regs: &'a PtRegs,
    pub returns: &'a HookedReturns,
    pub code: &'a CodeMap,
    pub old: &'a OldCode,
    /// Code at which a new task starts. It is not a return address.
    pub fork_entry: Option<Gva>,
    /// How many frames may still be walked, of all tasks together.
    pub frames_left: &'a Cell<usize>,
}

impl StackCheck<'_> {
    /// Checks a task that is not running. Its stack is in use from its saved stack pointer on.
    pub fn sleeping(&self, task: Gva, buffer: &mut Vec<u8>) -> State {
        self.try_sleeping(task, buffer).unwrap_or_else(State::Unsure)
    }

    fn try_sleeping(&self, task: Gva, buffer: &mut Vec<u8>) -> Result<State, Why> {
        let sp = self.word(TASK, task.wrapping_add(self.layout.sp))?;
        let stack = self.stack_of(task)?;
        if sp % 8 != 0 || !stack.holds(sp, self.layout.frame_bytes) {
            return Err(Why::StackPointer { sp });
        }
        let finding = self.scan_from(&stack, sp, buffer)?;
        self.require_unreferenced(task, finding.data, false)?;
        let Some(hidden) = self.needs_walk(task, finding)? else {
            return Ok(State::Clear);
        };
        let ip = Gva(self.word(STACK, Gva(sp.wrapping_add(self.layout.frame_ret)))?);
        let bp = self.word(STACK, Gva(sp.wrapping_add(self.layout.frame_bp)))?;
        let frame = Frame {
            ip,
            sp: sp.wrapping_add(self.layout.frame_bytes),
            interrupted: Some(ip) == self.fork_entry,
        };
        self.walk(
            Start {
                frame,
                bp,
                general: None,
            },
            &[stack],
            &hidden,
        )
    }

    /// Checks a CPU that runs `task`, and whose vCPU is paused in the kernel.
    pub fn running(&self, task: Gva, cpu: usize, registers: &Registers, buffer: &mut Vec<u8>) -> State {
        self.try_running(task, cpu, registers, buffer)
            .unwrap_or_else(State::Unsure)
    }

    fn try_running(&self, task: Gva, cpu: usize, registers: &Registers, buffer: &mut Vec<u8>) -> Result<State, Why> {
        let (rip, sp) = (registers.rip, registers.rsp());
        let between = Why::Between { cpu, rip, sp };
        let mut stacks = vec![self.stack_of(task)?];
        let own = self.cpus.stacks(self.view, cpu);
        stacks.extend(own.map_err(|_| between.clone())?);
        let Some(on) = stacks.iter().find(|stack| stack.holds(sp, 0)) else {
            // The vCPU has just entered the kernel or is about to leave it. It is on the user's stack, and the kernel's stacks are empty.
            let is_outermost = sp < KERNEL_START && self.cpus.is_entry(rip);
            let is_clear = is_outermost && self.old.at_instruction(Gva(rip)).is_none();
            return is_clear.then_some(State::Clear).ok_or(between);
        };
        let mut finding = scan_words(&registers.general, self.old, self.code, self.returns);
        finding = merge(finding, scan_words(&[rip], self.old, self.code, self.returns));
        for stack in &stacks {
            if stack == on {
                finding = merge(finding, self.scan_from(stack, sp & !7, buffer)?);
            } else if on.kind != StackKind::Task {
                // Outer frames may be on any other stack. From which address on it is in use is not known yet.
                finding = merge(finding, self.scan_if_mapped(stack, buffer)?);
            }
        }
        self.require_unreferenced(task, finding.data, true)?;
        let Some(hidden) = self.needs_walk(task, finding)? else {
            return Ok(State::Clear);
        };
        // Some instructions of the entry code have wrong ORC rules.
        if self.cpus.is_entry(rip) {
            return Err(Why::Entry { rip });
        }
        let frame = Frame {
            ip: Gva(rip),
            sp,
            interrupted: true,
        };
        let (bp, general) = (registers.rbp(), Some(registers.general));
        self.walk(Start { frame, bp, general }, &stacks, &hidden)
    }

    /// Checks a stack whose task is unknown. From which address on it is in use is unknown, too, so that all of it counts.
    pub fn unlisted(&self, stack: Gva, buffer: &mut Vec<u8>) -> State {
        let range = stack..stack.wrapping_add(self.layout.stack_bytes);
        let kind = StackKind::Task;
        let finding = match self.scan_from(&Stack { kind, range }, stack.0, buffer) {
            Ok(finding) => finding,
            Err(why) => return State::Unsure(why),
        };
        let holds = match finding.old.map(|word| self.old.at_word(word)) {
            Some(Some(function)) => format!("an address in {}", function.name),
            _ if !finding.is_clear() => "an address that needs an unwound stack".to_owned(),
            _ if finding.data.is_some() => "an address in the patch's module".to_owned(),
            _ => return State::Clear,
        };
        State::Unsure(Why::Unlisted { stack, holds })
    }

    /// The task's own stack.
    fn stack_of(&self, task: Gva) -> Result<Stack, Why> {
        let base = Gva(self.word(TASK, task.wrapping_add(self.layout.stack))?);
        let end = base
            .checked_add(self.layout.stack_bytes)
            .ok_or(Why::StackPointer { sp: base.0 })?;
        Ok(Stack {
            kind: StackKind::Task,
            range: base..end,
        })
    }

    /// True where `sp` is on the task's own stack.
    pub fn is_on_stack_of(&self, task: Gva, sp: u64) -> bool {
        self.stack_of(task).is_ok_and(|stack| stack.holds(sp, 8))
    }

    fn scan_from(&self, stack: &Stack, from: u64, buffer: &mut Vec<u8>) -> Result<Finding, Why> {
        let len = stack.range.end.0.saturating_sub(from);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        let unreadable = |source| UnwindError::Unreadable {
            what: STACK,
            at: from,
            source,
        };
        self.view.read(Gva(from), buffer).map_err(unreadable)?;
        Ok(scan(buffer, self.old, self.code, self.returns))
    }

    /// Scans a whole stack. An exception stack may have no memory, if the CPU has no such exception.
    fn scan_if_mapped(&self, stack: &Stack, buffer: &mut Vec<u8>) -> Result<Finding, Why> {
        match self.scan_from(stack, stack.range.start.0, buffer) {
            Err(_) if stack.kind == StackKind::Exception => Ok(Finding::default()),
            finding => finding,
        }
    }

    /// Requires that a task does not read memory that is going to be wiped, if it has an address in there. The kernel reads the list and
    /// the tree of modules with preemption off, or in an RCU section that the task counts. In a task that is off its CPU and in no such
    /// section, the word on the stack is left over.
    fn require_unreferenced(&self, task: Gva, word: Option<u64>, runs: bool) -> Result<(), Why> {
        let Some(word) = word else { return Ok(()) };
        let may_read = match self.layout.rcu_nesting {
            _ if runs => true,
            Some(nesting) => self.word(TASK, task.wrapping_add(nesting))? & 0xffff_ffff != 0,
            None => false,
        };
        if may_read {
            Err(Why::References { word })
        } else {
            Ok(())
        }
    }

    /// The task's hooked returns, which a walk needs; `None` where the scan alone shows that the stack is clear.
    fn needs_walk(&self, task: Gva, finding: Finding) -> Result<Option<Vec<HookedReturn>>, Why> {
        if finding.is_clear() {
            return Ok(None);
        }
        Ok(Some(self.returns.of_task(self.view, task)?))
    }

    fn walk(&self, start: Start, stacks: &[Stack], hidden: &[HookedReturn]) -> Result<State, Why> {
        let unwinder = Unwinder {
            code: self.code,
            returns: self.returns,
            regs: self.regs,
        };
        if self.frames_left.get() == 0 {
            return Err(Why::TooManyFrames);
        }
        let mut frames = Vec::new();
        let mut inside: Option<String> = None;
        let end = unwinder.walk(self.view, start, stacks, hidden, &mut |frame| {
            self.frames_left.set(self.frames_left.get().saturating_sub(1));
            if frames.len() < Blocker::FRAMES_MAX {
                frames.push(frame);
            }
            if inside.is_none() {
                inside = self.old_function(frame).map(|old| old.name.clone());
            }
        });
        match (inside, end) {
            (Some(function), _) => Ok(State::Inside(function, frames)),
            (None, Ok(())) => Ok(State::Clear),
            (None, Err(error)) => Err(error.into()),
        }
    }

    /// The old function that a frame is in, or is about to call.
    fn old_function(&self, frame: Frame) -> Option<&OldFunction> {
        let here = if frame.interrupted {
            self.old.at_instruction(frame.ip)
        } else {
            self.old.at_return(frame.ip)
        };
        here.or_else(|| self.code.calls_from_bpf(self.view, frame, self.old))
    }

    fn word(&self, what: &'static str, at: Gva) -> Result<u64, UnwindError> {
        self.view
            .read_u64(at)
            .map_err(|source| UnwindError::Unreadable { what, at: at.0, source })
    }
}

fn merge(one: Finding, other: Finding) -> Finding {
    Finding {
        old: one.old.or(other.old),
        hidden: one.hidden || other.hidden,
        unknown: one.unknown.or(other.unknown),
        data: one.data.or(other.data),
    }
}
