//! Walking up a stack, frame by frame, as the kernel's own unwinder does (arch/x86/kernel/unwind_orc.c,
//! `unwind_next_frame`), with its rules for a *reliable* trace (`arch_stack_walk_reliable`): a walk ends at registers
//! saved in user mode or at an ORC entry that says "end"; anything else is an error. Here, unlike there, a frame whose
//! code has no ORC entry is an error too, and never guessed from the frame pointer; in code of BPF it is shown that there is one.
//!
//! Nor is an end believed that is not at the end of the stack. The kernel never unwinds from some instructions, for which ORC is
//! wrong; a stopped vCPU may be at any. Up to 6.3 that is the beginning of every retpoline (`UNWIND_HINT_EMPTY`,
//! arch/x86/lib/retpoline.S), so of every indirect call: ORC says "end", and whoever believes it finds nobody in the function that
//! is called from. Another is behind `call error_entry` (arch/x86/entry/entry_64.S, 6.1): all registers lie on the stack by then,
//! of which ORC knows only the CPU's five, so that the interrupted code's R13 is taken for its code segment.

use super::code::CodeMap;
use super::error::UnwindError;
use super::orc::{Base, Kind, Register, Rule};
use super::returns::{Hidden, Returns};
use super::stack::{Stack, Stacks};
use super::view::KernelView;
use crate::addr::Gva;
use crate::btf::{Btf, BtfError};

/// More frames than fit on a task's and a CPU's stacks in practice; each also has to lie above the one before.
const FRAMES_MAX: usize = 2048;
/// Bytes of what the CPU pushes at an interrupt: ip, cs, flags, sp, ss.
const IRET_BYTES: u64 = 40;
/// `__KERNEL_CS`, `__USER_CS` and `__USER32_CS` (arch/x86/include/asm/segment.h): a saved code segment is one of these.
const KERNEL_CS: u64 = 0x10;
const USER_CS: [u64; 2] = [0x33, 0x23];

/// Offsets in `struct pt_regs`.
#[derive(Debug, Clone)]
pub struct PtRegs {
    size: u64,
    ip: u64,
    cs: u64,
    sp: u64,
    bp: u64,
    ax: u64,
    dx: u64,
    di: u64,
    r10: u64,
    r13: u64,
}

impl PtRegs {
    /// Looks the offsets up.
    pub fn read(btf: &Btf) -> Result<Self, BtfError> {
        let regs = btf.structure("pt_regs")?;
        let at = |name| regs.offset(name);
        let (ip, cs, sp, bp, ax) = (at("ip")?, at("cs")?, at("sp")?, at("bp")?, at("ax")?);
        let (dx, di, r10, r13) = (at("dx")?, at("di")?, at("r10")?, at("r13")?);
        Ok(Self {
            size: regs.size(),
            ip,
            cs,
            sp,
            bp,
            ax,
            dx,
            di,
            r10,
            r13,
        })
    }

    fn offset(&self, register: Register) -> u64 {
        match register {
            Register::Ax => self.ax,
            Register::Dx => self.dx,
            Register::Di => self.di,
            Register::R10 => self.r10,
            Register::R13 => self.r13,
        }
    }
}

/// One frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Where its code goes on: an instruction where it was interrupted, else a return address.
    pub ip: Gva,
    /// Its stack pointer at that point.
    pub sp: u64,
    /// True where it was interrupted at `ip`, or is the running code itself.
    pub interrupted: bool,
}

impl Frame {
    /// The address whose code the frame stands for: where it called, that is the call, whose stack layout may differ from that of
    /// what follows it.
    pub fn code(&self) -> Gva {
        if self.interrupted {
            self.ip
        } else {
            Gva(self.ip.0.wrapping_sub(1))
        }
    }
}

/// Where a walk starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Start {
    /// The first frame.
    pub frame: Frame,
    /// BP in it.
    pub bp: u64,
    /// All general registers in the instruction set's order, where they are known: a stopped vCPU's.
    pub general: Option<[u64; 16]>,
}

/// What walks rest on.
#[derive(Debug, Clone, Copy)]
pub struct Unwinder<'a> {
    /// Known code.
    pub code: &'a CodeMap,
    /// Tracers' trampolines.
    pub returns: &'a Returns,
    /// Offsets in saved registers.
    pub regs: &'a PtRegs,
}

/// Where the values of registers are known from.
#[derive(Debug, Clone, Copy)]
enum Known {
    Nothing,
    Live([u64; 16]),
    /// At an address on the stack, all of them.
    Saved(u64),
}

struct State {
    frame: Frame,
    bp: u64,
    /// Of this frame, or of the one before it where this one has only the words that the CPU pushes.
    known: Known,
}

enum Step {
    Frame(State),
    End,
}

impl Unwinder<'_> {
    /// Visits every frame from `start` to the end of the stack, innermost first. `stacks`: those that the walk may
    /// use; `hidden`: the task's return addresses in flight ([`Returns::of_task`]).
    ///
    /// Errors: the first thing that is not certain. What was visited until then is a beginning, not the whole.
    pub fn walk(
        &self,
        view: &dyn KernelView,
        start: Start,
        stacks: &[Stack],
        hidden: &[Hidden],
        visit: &mut dyn FnMut(Frame),
    ) -> Result<(), UnwindError> {
        let mut stacks = Stacks::new(stacks);
        let known = start.general.map_or(Known::Nothing, Known::Live);
        let mut state = State {
            frame: start.frame,
            bp: start.bp,
            known,
        };
        if !stacks.reach(state.frame.sp, 0) {
            return Err(UnwindError::OffStack {
                ip: state.frame.ip,
                at: state.frame.sp,
            });
        }
        for _ in 0..FRAMES_MAX {
            visit(state.frame);
            if self.returns.is_returning(state.frame.code()) {
                return Err(UnwindError::Returning { ip: state.frame.ip });
            }
            let rule = self.code.rule(view, state.frame, state.bp)?;
            match self.step(view, &state, rule, &mut stacks, hidden)? {
                Step::End => return Ok(()),
                Step::Frame(next) => state = next,
            }
        }
        Err(UnwindError::TooMany(FRAMES_MAX))
    }

    /// From one frame to its caller's.
    fn step(
        &self,
        view: &dyn KernelView,
        state: &State,
        rule: Rule,
        stacks: &mut Stacks<'_>,
        hidden: &[Hidden],
    ) -> Result<Step, UnwindError> {
        let Frame { ip, sp: from, .. } = state.frame;
        let before = stacks.current();
        let padding = self.code.format().stack_padding_max();
        match rule.kind {
            Kind::Undefined => return Err(UnwindError::NoOrc { ip }),
            // the first code of a thread runs where its registers for user mode belong
            Kind::End if stacks.is_near_end(from, self.regs.size + padding) => return Ok(Step::End),
            Kind::End => return Err(UnwindError::NotTheEnd { ip, at: from }),
            Kind::Call | Kind::Regs | Kind::RegsPartial => {}
        }
        let cfa = self.caller_sp(view, state, rule, stacks)?;
        let mut on_stack = |at: u64, len: u64| {
            let reached = stacks.reach(at, len);
            reached.then_some(at).ok_or(UnwindError::OffStack { ip, at })
        };
        let (frame, known) = match rule.kind {
            Kind::Call => {
                let slot = on_stack(cfa.wrapping_sub(8), 8)?;
                let mut next = Gva(word(view, slot)?);
                if self.returns.is_trampoline(next) {
                    next = self.returns.resolve(hidden, slot)?;
                }
                (
                    Frame {
                        ip: next,
                        sp: cfa,
                        interrupted: rule.signal,
                    },
                    Known::Nothing,
                )
            }
            Kind::Regs | Kind::RegsPartial => {
                let partial = rule.kind == Kind::RegsPartial;
                // as if the other registers were there, too
                let regs = if partial { cfa.wrapping_sub(self.regs.ip) } else { cfa };
                on_stack(cfa, if partial { IRET_BYTES } else { self.regs.size })?;
                let cs = word(view, regs.wrapping_add(self.regs.cs))?;
                if USER_CS.contains(&cs) {
                    let end = regs.wrapping_add(self.regs.size);
                    return match stacks.is_near_end(end, padding) {
                        true => Ok(Step::End),
                        false => Err(UnwindError::NotTheEnd { ip, at: end }),
                    };
                }
                if cs != KERNEL_CS {
                    return Err(UnwindError::BadSegment { ip, found: cs });
                }
                let next = Gva(word(view, regs.wrapping_add(self.regs.ip))?);
                let sp = word(view, regs.wrapping_add(self.regs.sp))?;
                let known = if partial { state.known } else { Known::Saved(regs) };
                (
                    Frame {
                        ip: next,
                        sp,
                        interrupted: rule.signal,
                    },
                    known,
                )
            }
            Kind::Undefined | Kind::End => return Err(UnwindError::NoOrc { ip }),
        };
        let bp = match rule.bp {
            Base::Undefined => match (rule.kind, known) {
                (Kind::Regs, Known::Saved(regs)) => word(view, regs.wrapping_add(self.regs.bp))?,
                _ => state.bp,
            },
            Base::PrevSp => word(view, on_stack(cfa.wrapping_add_signed(rule.bp_offset), 8)?)?,
            Base::Bp => word(view, on_stack(state.bp.wrapping_add_signed(rule.bp_offset), 8)?)?,
            _ => {
                return Err(UnwindError::BadOrc {
                    ip,
                    what: "bp_reg",
                    found: 0,
                });
            }
        };
        // upwards on the same stack; a stack that was left is never entered again
        if stacks.current() == before && stacks.is_on_current(frame.sp) && frame.sp <= from {
            return Err(UnwindError::WrongWay { ip, from, to: frame.sp });
        }
        Ok(Step::Frame(State { frame, bp, known }))
    }

    /// The address that the entry calls the caller's stack pointer, or at which it has saved registers.
    fn caller_sp(
        &self,
        view: &dyn KernelView,
        state: &State,
        rule: Rule,
        stacks: &mut Stacks<'_>,
    ) -> Result<u64, UnwindError> {
        let ip = state.frame.ip;
        let (sp, bp) = (state.frame.sp, state.bp);
        let mut dereference = |at: u64| {
            let reached = stacks.reach(at, 8);
            reached.then_some(()).ok_or(UnwindError::OffStack { ip, at })?;
            word(view, at)
        };
        let add = |base: u64| base.wrapping_add_signed(rule.sp_offset);
        match rule.sp {
            Base::Sp => Ok(add(sp)),
            Base::Bp => Ok(add(bp)),
            Base::SpIndirect if self.code.format().adds_before_dereference() => dereference(add(sp)),
            Base::SpIndirect => dereference(sp).map(add),
            Base::BpIndirect => dereference(add(bp)),
            Base::Register(register) => self.register(view, state, register),
            Base::Undefined | Base::PrevSp => Err(UnwindError::BadOrc {
                ip,
                what: "sp_reg",
                found: 0,
            }),
        }
    }

    fn register(&self, view: &dyn KernelView, state: &State, register: Register) -> Result<u64, UnwindError> {
        let missing = UnwindError::MissingRegister {
            ip: state.frame.ip,
            register: register.name(),
        };
        match state.known {
            Known::Nothing => Err(missing),
            Known::Saved(regs) => word(view, regs.wrapping_add(self.regs.offset(register))),
            Known::Live(general) => {
                let index = match register {
                    Register::Ax => 0,
                    Register::Dx => 2,
                    Register::Di => 7,
                    Register::R10 => 10,
                    Register::R13 => 13,
                };
                general.get(index).copied().ok_or(missing)
            }
        }
    }
}

fn word(view: &dyn KernelView, at: u64) -> Result<u64, UnwindError> {
    view.read_u64(Gva(at))
        .map_err(|source| UnwindError::Unreadable { at, source })
}
