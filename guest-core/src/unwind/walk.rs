//! Walks a stack frame by frame, as the kernel's own unwinder does (arch/x86/kernel/unwind_orc.c, `unwind_next_frame`), with its rules for
//! a *reliable* trace (`arch_stack_walk_reliable`): a walk ends at registers saved in user mode, or at an ORC entry of the kind "end".
//! Anything else is an error. In addition, a frame whose code has no ORC entry is an error: the walk never assumes a frame pointer. For
//! BPF's code, [`super::bpf`] verifies it.
//!
//! An end is only accepted at the end of the stack. ORC is wrong for some instructions, from which the kernel never unwinds, but at which a
//! paused vCPU may be. Up to 6.3 this is the beginning of every retpoline (`UNWIND_HINT_EMPTY`, arch/x86/lib/retpoline.S), and so of every
//! indirect call: ORC has "end" there, and the calling function would be missed. Another such instruction is behind `call error_entry`
//! (arch/x86/entry/entry_64.S, 6.1): all registers are on the stack by then, but ORC has only the CPU's five, so that the interrupted code's
//! R13 would be taken for its code segment.

use super::code::CodeMap;
use super::error::UnwindError;
use super::hooked_returns::{HookedReturn, HookedReturns};
use super::orc::{Base, Kind, Register, Rule};
use super::stack::{Stack, Stacks};
use super::view::KernelView;
use crate::addr::Gva;
use crate::btf::{Btf, BtfError};

/// Most frames of a walk, more than a task's and a CPU's stacks hold in practice. Each frame must also be above the one before.
const FRAMES_MAX: usize = 2048;
/// Bytes that the CPU pushes at an interrupt: ip, cs, flags, sp, ss.
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
    /// Looks up the offsets.
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

/// A frame of a stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// The address at which its code continues: the interrupted instruction, or a return address.
    pub ip: Gva,
    /// The stack pointer at that address.
    pub sp: u64,
    /// True if the code was interrupted at `ip`, or is the running code itself.
    pub interrupted: bool,
}

impl Frame {
    /// The address whose stack layout the frame has. For a return address that is the call, because the layout may differ behind it.
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
    /// The frame's BP.
    pub bp: u64,
    /// All general registers in the instruction set's order, if they are known: those of a paused vCPU.
    pub general: Option<[u64; 16]>,
}

/// What a walk needs.
#[derive(Debug, Clone, Copy)]
pub struct Unwinder<'a> {
    /// The kernel's code.
    pub code: &'a CodeMap,
    /// Hooked returns.
    pub returns: &'a HookedReturns,
    /// Offsets in saved registers.
    pub regs: &'a PtRegs,
}

/// Where the values of registers come from.
#[derive(Debug, Clone, Copy)]
enum RegisterSource {
    Nothing,
    Live([u64; 16]),
    /// All of them are saved at an address on the stack.
    Saved(u64),
}

struct State {
    frame: Frame,
    bp: u64,
    /// The registers of this frame; of the frame before if this one has only the words that the CPU pushes.
    registers: RegisterSource,
}

enum Step {
    Frame(State),
    End,
}

impl Unwinder<'_> {
    /// Visits every frame from `start` to the end of the stack, innermost first. The walk may use `stacks`; `hidden` are the task's hooked
    /// returns ([`HookedReturns::of_task`]).
    ///
    /// # Errors
    ///
    /// The first thing that is not certain. The frames that were visited until then are only the beginning of the stack.
    pub fn walk(
        &self,
        view: &dyn KernelView,
        start: Start,
        stacks: &[Stack],
        hidden: &[HookedReturn],
        visit: &mut dyn FnMut(Frame),
    ) -> Result<(), UnwindError> {
        let mut stacks = Stacks::new(stacks);
        let registers = start.general.map_or(RegisterSource::Nothing, RegisterSource::Live);
        let mut state = State {
            frame: start.frame,
            bp: start.bp,
            registers,
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
        Err(UnwindError::TooMany {
            what: "frames",
            max: FRAMES_MAX,
        })
    }

    /// Steps from one frame to its caller's.
    fn step(
        &self,
        view: &dyn KernelView,
        state: &State,
        rule: Rule,
        stacks: &mut Stacks<'_>,
        hidden: &[HookedReturn],
    ) -> Result<Step, UnwindError> {
        let Frame { ip, sp: from, .. } = state.frame;
        let before = stacks.current();
        let padding = self.code.format().stack_padding_max();
        match rule.kind {
            Kind::Undefined => return Err(UnwindError::NoOrc { ip }),
            // The first code of a thread runs where its registers for user mode will be saved.
            Kind::End if stacks.is_near_end(from, self.regs.size + padding) => return Ok(Step::End),
            Kind::End => return Err(UnwindError::NotTheEnd { ip, at: from }),
            Kind::Call | Kind::Regs | Kind::RegsPartial => {}
        }
        let cfa = self.caller_sp(view, state, rule, stacks)?;
        let mut on_stack = |at: u64, len: u64| {
            let reached = stacks.reach(at, len);
            reached.then_some(at).ok_or(UnwindError::OffStack { ip, at })
        };
        let (frame, registers) = match rule.kind {
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
                    RegisterSource::Nothing,
                )
            }
            Kind::Regs | Kind::RegsPartial => {
                let partial = rule.kind == Kind::RegsPartial;
                // The address is computed as if the other registers were there, too.
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
                let registers = if partial {
                    state.registers
                } else {
                    RegisterSource::Saved(regs)
                };
                (
                    Frame {
                        ip: next,
                        sp,
                        interrupted: rule.signal,
                    },
                    registers,
                )
            }
            Kind::Undefined | Kind::End => return Err(UnwindError::NoOrc { ip }),
        };
        let bp = match rule.bp {
            Base::Undefined => match (rule.kind, registers) {
                (Kind::Regs, RegisterSource::Saved(regs)) => word(view, regs.wrapping_add(self.regs.bp))?,
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
        // The walk goes upwards on a stack, and never enters a stack again that it has left.
        if stacks.current() == before && stacks.is_on_current(frame.sp) && frame.sp <= from {
            return Err(UnwindError::WrongWay { ip, from, to: frame.sp });
        }
        Ok(Step::Frame(State { frame, bp, registers }))
    }

    /// The caller's stack pointer according to the rule, or the address of the saved registers.
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
        match state.registers {
            RegisterSource::Nothing => Err(missing),
            RegisterSource::Saved(regs) => word(view, regs.wrapping_add(self.regs.offset(register))),
            RegisterSource::Live(general) => {
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
    view.read_u64(Gva(at)).map_err(|source| UnwindError::Unreadable {
        what: "the stack",
        at,
        source,
    })
}
