//! Looking at one context: scan its stack, and walk it where the scan has found something.

use super::cpus::Cpus;
use super::layout::TaskLayout;
use super::verdict::{Blocker, State, Why};
use crate::addr::Gva;
use crate::unwind::returns::Hidden;
use crate::unwind::scan::{Finding, scan, scan_words};
use crate::unwind::{
    CodeMap, Frame, KernelView, OldCode, OldFunction, PtRegs, Returns, Stack, StackKind, Start, UnwindError, Unwinder,
};
use crate::vcpu::Registers;
use std::cell::Cell;

/// Addresses from here on are the kernel's; below are user mode's.
const KERNEL_START: u64 = 1 << 63;

/// What looking rests on.
pub(super) struct Look<'a> {
    pub view: &'a dyn KernelView,
    pub layout: &'a TaskLayout,
    pub cpus: &'a Cpus,
    pub regs: &'a PtRegs,
    pub returns: &'a Returns,
    pub code: &'a CodeMap,
    pub old: &'a OldCode,
    /// Code at which a new task starts; not an address that was called from.
    pub fork_entry: Option<Gva>,
    /// How many frames may still be walked, for all tasks together.
    pub frames_left: &'a Cell<usize>,
}

impl Look<'_> {
    /// A task that is not running: its stack is in use from its saved stack pointer on.
    pub fn sleeping(&self, task: Gva, buffer: &mut Vec<u8>) -> State {
        self.try_sleeping(task, buffer).unwrap_or_else(State::Unsure)
    }

    fn try_sleeping(&self, task: Gva, buffer: &mut Vec<u8>) -> Result<State, Why> {
        let sp = self.word(task.wrapping_add(self.layout.sp))?;
        let stack = self.stack_of(task)?;
        if sp % 8 != 0 || !stack.holds(sp, self.layout.frame_bytes) {
            return Err(Why::StackPointer { sp });
        }
        let finding = self.scan_from(&stack, sp, buffer)?;
        self.require_unread(task, finding.data, false)?;
        let Some(hidden) = self.needs_walk(task, finding)? else {
            return Ok(State::Clear);
        };
        let ip = Gva(self.word(Gva(sp.wrapping_add(self.layout.frame_ret)))?);
        let bp = self.word(Gva(sp.wrapping_add(self.layout.frame_bp)))?;
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

    /// A CPU whose vCPU is stopped in the kernel, running `task`.
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
            // Just come from user mode, or about to go back: still, or again, on the user's stack. The kernel's are empty.
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
                // any of the others may be in use further out; from where on is not known yet
                finding = merge(finding, self.scan_if_mapped(stack, buffer)?);
            }
        }
        self.require_unread(task, finding.data, true)?;
        let Some(hidden) = self.needs_walk(task, finding)? else {
            return Ok(State::Clear);
        };
        // not all of the entry code's instructions have a rule that is right
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

    /// A stack whose task is not known, and so neither from where on it is in use: anything on it counts.
    pub fn unlisted(&self, stack: Gva, buffer: &mut Vec<u8>) -> State {
        let range = stack..stack.wrapping_add(self.layout.stack_bytes);
        let kind = StackKind::Task;
        let finding = match self.scan_from(&Stack { kind, range }, stack.0, buffer) {
            Ok(finding) => finding,
            Err(why) => return State::Unsure(why),
        };
        let holds = match finding.old.map(|word| self.old.at_word(word)) {
            Some(Some(function)) => format!("an address in {}", function.name),
            _ if !finding.is_clear() => "an address that needs a closer look".to_owned(),
            _ if finding.data.is_some() => "an address in the patch's module".to_owned(),
            _ => return State::Clear,
        };
        State::Unsure(Why::Unlisted { stack, holds })
    }

    /// The task's own stack.
    fn stack_of(&self, task: Gva) -> Result<Stack, Why> {
        let base = Gva(self.word(task.wrapping_add(self.layout.stack))?);
        let end = base
            .checked_add(self.layout.stack_bytes)
            .ok_or(Why::StackPointer { sp: base.0 })?;
        Ok(Stack {
            kind: StackKind::Task,
            range: base..end,
        })
    }

    /// True where a task has its stack pointer, saved or in a register, on its own stack.
    pub fn is_on_stack_of(&self, task: Gva, sp: u64) -> bool {
        self.stack_of(task).is_ok_and(|stack| stack.holds(sp, 8))
    }

    fn scan_from(&self, stack: &Stack, from: u64, buffer: &mut Vec<u8>) -> Result<Finding, Why> {
        let len = stack.range.end.0.saturating_sub(from);
        buffer.resize(usize::try_from(len).unwrap_or(0), 0);
        let unreadable = |source| UnwindError::Unreadable { at: from, source };
        self.view.read(Gva(from), buffer).map_err(unreadable)?;
        Ok(scan(buffer, self.old, self.code, self.returns))
    }

    /// The same for all of a stack that may have no memory: that for a kind of exception which this CPU does not have.
    fn scan_if_mapped(&self, stack: &Stack, buffer: &mut Vec<u8>) -> Result<Finding, Why> {
        match self.scan_from(stack, stack.range.start.0, buffer) {
            Err(_) if stack.kind == StackKind::Exception => Ok(Finding::default()),
            finding => finding,
        }
    }

    /// Demands that a task does not read what is going to be wiped, where it has an address of that. Whoever reads a list of
    /// modules or the tree does so with preemption off, or in a section of RCU that the task counts: a task that is off its CPU
    /// outside of such a section has only forgotten the word on its stack.
    fn require_unread(&self, task: Gva, word: Option<u64>, runs: bool) -> Result<(), Why> {
        let Some(word) = word else { return Ok(()) };
        let may_read = match self.layout.rcu_nesting {
            _ if runs => true,
            Some(nesting) => self.word(task.wrapping_add(nesting))? & 0xffff_ffff != 0,
            None => false,
        };
        if may_read { Err(Why::Reads { word }) } else { Ok(()) }
    }

    /// What a walk needs, the task's return addresses in flight, where the scan alone does not say that all is clear.
    fn needs_walk(&self, task: Gva, finding: Finding) -> Result<Option<Vec<Hidden>>, Why> {
        if finding.is_clear() {
            return Ok(None);
        }
        Ok(Some(self.returns.of_task(self.view, task)?))
    }

    fn walk(&self, start: Start, stacks: &[Stack], hidden: &[Hidden]) -> Result<State, Why> {
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

    /// The old function that a frame is in, or will call.
    fn old_function(&self, frame: Frame) -> Option<&OldFunction> {
        let here = if frame.interrupted {
            self.old.at_instruction(frame.ip)
        } else {
            self.old.at_return(frame.ip)
        };
        here.or_else(|| self.code.calls_from_bpf(self.view, frame, self.old))
    }

    fn word(&self, at: Gva) -> Result<u64, UnwindError> {
        self.view
            .read_u64(at)
            .map_err(|source| UnwindError::Unreadable { at: at.0, source })
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
