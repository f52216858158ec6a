//! Follows the code of an init or exit function, and stops at the first thing that it may not do.

use super::Work;
use super::calls::{ENABLE, FENTRY, INDIRECT, NEVER_RETURN, RETURN, Rules};
use super::state::{State, Value};
use super::step::{Step, Target, is_per_cpu};
use crate::module::PatchModule;
use crate::module::sections::{SectionOffset, SymbolId, SymbolPlace};
use iced_x86::{FlowControl, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register, UsedMemory};
use std::collections::BTreeMap;

/// Most instructions that are followed, each time that more is learnt of what its registers may hold; kpatch-build's init has
/// some 300.
const STEPS_MAX: usize = 20_000;
/// Where the stack protector's value is, from the segment register.
const STACK_GUARD: u64 = 0x28;
/// Trampolines of the module's own static calls.
const STATIC_CALLS: &str = ".static_call.text";
/// Something that is not accepted, and where.
type Found = (Work, SectionOffset);

/// The code of one function, and of those of the module that it calls.
pub(super) struct Walk<'m, 'd> {
    module: &'m PatchModule<'d>,
    rules: Rules,
    /// The static `klp_patch`, which is the one to be enabled.
    patch: Option<SectionOffset>,
    /// What is known before each instruction that was followed.
    states: BTreeMap<SectionOffset, State>,
    queue: Vec<SectionOffset>,
    info: InstructionInfoFactory,
    enables: bool,
    /// Where a `klp_patch` has `replace`, and what a tool's code writes there: a constant, or something else.
    replace_at: Option<u64>,
    replace: Vec<Option<bool>>,
    /// The first branch that matters. What is done behind it says more about the module, if there is something.
    decides: Option<Found>,
}

impl<'m, 'd> Walk<'m, 'd> {
    pub fn new(module: &'m PatchModule<'d>, rules: Rules, patch: Option<SectionOffset>) -> Self {
        Self {
            module,
            rules,
            patch,
            states: BTreeMap::new(),
            queue: Vec::new(),
            info: InstructionInfoFactory::new(),
            enables: false,
            replace_at: None,
            replace: Vec::new(),
            decides: None,
        }
    }

    /// The same, which also looks for what is written to `klp_patch.replace`, at that offset.
    pub fn with_replace_at(self, replace_at: Option<u64>) -> Self {
        Self { replace_at, ..self }
    }

    /// The value of `klp_patch.replace` in a patch that the code has allocated, which is zero where nothing is written. `None` where that is not
    /// known, or the kernel has no such member.
    pub fn replace(&self) -> Option<bool> {
        self.replace_at?;
        let first = self.replace.first().copied().unwrap_or(Some(false));
        first.filter(|_| self.replace.iter().all(|value| *value == first))
    }

    /// Follows the function at `entry` to all its ends.
    pub fn follow(&mut self, entry: SectionOffset) -> Result<(), Found> {
        self.reach(entry, State::new());
        for _ in 0..STEPS_MAX {
            let Some(at) = self.queue.pop() else {
                return self.decides.take().map_or(Ok(()), Err);
            };
            let step = Step::decode(self.module, at).ok_or((Work::NoCode, at))?;
            let state = self.states.get(&at).copied().unwrap_or_else(State::new);
            self.step(&step, state).map_err(|work| (work, at))?;
        }
        Err((Work::TooLong, entry))
    }

    /// True where `klp_enable_patch` is called somewhere.
    pub fn enables(&self) -> bool {
        self.enables
    }

    /// True where an instruction at `at` was followed.
    pub fn has_visited(&self, at: SectionOffset) -> bool {
        self.states.contains_key(&at)
    }

    /// Follows the code at `at` with this state, too.
    fn reach(&mut self, at: SectionOffset, state: State) {
        let known = self.states.get(&at).copied();
        let joined = known.map_or(state, |known| known.join(state));
        if known != Some(joined) {
            self.states.insert(at, joined);
            self.queue.push(at);
        }
    }

    fn step(&mut self, step: &Step<'_, '_>, mut state: State) -> Result<(), Work> {
        let instruction = &step.instruction;
        if !step.is_of_accepted_kind() {
            return Err(Work::Executes(format!("{:?}", instruction.mnemonic()).to_uppercase()));
        }
        self.check_uses(step, &state)?;
        self.check_writes(step, &state)?;
        let next = step.at.plus(instruction.len() as u64);
        match instruction.flow_control() {
            FlowControl::Next => {
                self.transfer(step, &mut state);
                self.reach(next, state);
            }
            FlowControl::ConditionalBranch => {
                if self.rules.branches_count && !state.enabled {
                    let work = Work::Decides(self.describe(state.compared));
                    self.decides.get_or_insert((work, step.at));
                }
                self.go(step, state)?;
                self.reach(next, state);
            }
            FlowControl::UnconditionalBranch => self.go(step, state)?,
            FlowControl::Call => {
                if self.call(step, &mut state)? {
                    self.reach(next, state);
                }
            }
            FlowControl::Return | FlowControl::Interrupt | FlowControl::Exception => {}
            FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::XbeginXabortXend => {
                return Err(Work::CallsPointer);
            }
        }
        Ok(())
    }

    /// Where a jump or call leads. The module's own static calls may lead elsewhere than the file says.
    fn target_of(&self, step: &Step<'_, '_>) -> Result<Target, Work> {
        match step.branch_target().ok_or(Work::NoCode)? {
            Target::Own(at) if self.module.section_name(at.section) == STATIC_CALLS => Err(Work::CallsPointer),
            target => Ok(target),
        }
    }

    /// Goes where a jump leads.
    fn go(&mut self, step: &Step<'_, '_>, mut state: State) -> Result<(), Work> {
        match self.target_of(step)? {
            Target::Own(target) => {
                self.reach(target, state);
                Ok(())
            }
            Target::Outside(symbol) => self.call_outside(symbol, &mut state).map(drop),
        }
    }

    /// Calls; false where that never returns.
    fn call(&mut self, step: &Step<'_, '_>, state: &mut State) -> Result<bool, Work> {
        match self.target_of(step)? {
            Target::Own(target) => {
                self.reach(target, *state);
                state.call();
                Ok(true)
            }
            Target::Outside(symbol) => self.call_outside(symbol, state),
        }
    }

    fn call_outside(&mut self, symbol: SymbolId, state: &mut State) -> Result<bool, Work> {
        let name = self.outside(symbol);
        if name == FENTRY || name == RETURN {
            return Ok(true);
        }
        if name.starts_with(INDIRECT) {
            return Err(Work::CallsPointer);
        }
        if !self.rules.may_call(&name) {
            return Err(Work::Calls(name));
        }
        if name == ENABLE {
            let argument = state.get(Register::RDI);
            let is_other = |patch| argument != Value::Address(Target::Own(patch));
            if self.patch.is_some_and(is_other) {
                return Err(Work::OtherPatch);
            }
            (state.enabled, self.enables) = (true, true);
        }
        state.call();
        Ok(!NEVER_RETURN.contains(&name.as_str()))
    }

    /// Refuses variables that the code has no business with.
    fn check_uses(&self, step: &Step<'_, '_>, state: &State) -> Result<(), Work> {
        let instruction = &step.instruction;
        let is_guard = |at: u64| at == STACK_GUARD;
        if is_per_cpu(instruction.memory_segment()) && step.in_memory(state) == Value::Unknown {
            return match is_guard(instruction.memory_displacement64()) {
                true => Ok(()),
                false => Err(Work::Uses("a per-CPU variable".to_owned())),
            };
        }
        for relocation in step.relocations {
            let Some(target) = step.target(relocation) else {
                continue;
            };
            let name = self.name(target);
            let is_mine = match target {
                Target::Outside(_) if step.is_branch() => true,
                Target::Outside(_) => self.rules.may_use(&name),
                Target::Own(at) => {
                    let section = self.module.section(at.section);
                    !self.rules.is_tool
                        || section.is_none_or(|section| !section.is_writable())
                        || self.rules.variables.contains(&name.as_str())
                        || is_known_section(self.module.section_name(at.section))
                }
            };
            if !is_mine {
                return Err(Work::Uses(name));
            }
        }
        Ok(())
    }

    /// Refuses writes to anywhere but the stack; a tool's code may also write its own variables and what it has allocated.
    fn check_writes(&mut self, step: &Step<'_, '_>, state: &State) -> Result<(), Work> {
        let is_write = |used: &&UsedMemory| {
            !matches!(
                used.access(),
                OpAccess::None | OpAccess::NoMemAccess | OpAccess::Read | OpAccess::CondRead
            )
        };
        let written: Vec<UsedMemory> = self
            .info
            .info(&step.instruction)
            .used_memory()
            .iter()
            .filter(is_write)
            .copied()
            .collect();
        for used in written {
            let address = match step.instruction.mnemonic() {
                Mnemonic::Push | Mnemonic::Call => state.get(Register::RSP),
                _ if step.has_memory_operand() => step.in_memory(state),
                // Copying and filling go where the destination index points.
                _ => state.get(used.base()),
            };
            match address {
                Value::Stack => {}
                Value::Address(target) if self.rules.variables.contains(&self.name(target).as_str()) => {}
                Value::Address(target) => return Err(Work::Writes(self.name(target))),
                Value::Unknown | Value::Read(_) if self.rules.is_tool => {
                    if used.memory_size().size() == 1 && self.replace_at == Some(used.displacement()) {
                        let instruction = &step.instruction;
                        let is_constant =
                            instruction.mnemonic() == Mnemonic::Mov && instruction.op1_kind() == OpKind::Immediate8;
                        self.replace.push(is_constant.then(|| instruction.immediate8() != 0));
                    }
                }
                Value::Unknown | Value::Read(_) => return Err(Work::WritesPointer),
            }
        }
        Ok(())
    }

    /// What an instruction makes of the registers.
    fn transfer(&mut self, step: &Step<'_, '_>, state: &mut State) {
        let (before, instruction) = (*state, &step.instruction);
        let source = |operand: u32| match instruction.op_kind(operand) {
            OpKind::Register => before.get(instruction.op_register(operand)),
            OpKind::Memory => match step.in_memory(&before) {
                Value::Address(target) => Value::Read(target),
                _ => Value::Unknown,
            },
            _ => step.immediate().map_or(Value::Unknown, Value::Address),
        };
        let destination = (instruction.op0_kind() == OpKind::Register).then(|| instruction.op0_register());
        let value = match instruction.mnemonic() {
            Mnemonic::Lea => step.in_memory(&before),
            Mnemonic::Mov | Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => source(1),
            // The stack is made larger, smaller, or aligned.
            Mnemonic::Add | Mnemonic::Sub | Mnemonic::And if source(0) == Value::Stack => Value::Stack,
            Mnemonic::Add | Mnemonic::Sub | Mnemonic::And | Mnemonic::Or | Mnemonic::Shr
                if matches!(source(0), Value::Read(_)) =>
            {
                source(0)
            }
            Mnemonic::Cmp | Mnemonic::Test => {
                let known = [source(0), source(1)]
                    .into_iter()
                    .find(|value| matches!(value, Value::Read(_)));
                state.compared = known.unwrap_or(Value::Unknown);
                return;
            }
            _ => Value::Unknown,
        };
        let written: Vec<Register> = self
            .info
            .info(instruction)
            .used_registers()
            .iter()
            .filter(|used| !matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None))
            .map(|used| used.register().full_register())
            .collect();
        for register in written {
            // Pushing, popping and leaving keep the stack pointer in the stack.
            if register != Register::RSP {
                state.set(register, Value::Unknown);
            }
        }
        if instruction.mnemonic() == Mnemonic::Leave {
            state.set(Register::RSP, before.get(Register::RBP));
        }
        match destination {
            Some(register) if instruction.mnemonic() != Mnemonic::Push => state.set(register, value),
            _ => {}
        }
    }

    fn describe(&self, value: Value) -> String {
        match value {
            Value::Read(target) | Value::Address(target) => self.name(target),
            Value::Unknown | Value::Stack => "what it finds".to_owned(),
        }
    }

    fn name(&self, target: Target) -> String {
        match target {
            Target::Own(at) => self.module.owner(at),
            Target::Outside(symbol) => self.outside(symbol),
        }
    }

    /// The name of a symbol that is elsewhere, as its owner has it.
    fn outside(&self, symbol: SymbolId) -> String {
        match self
            .module
            .elf
            .symbols
            .get(symbol.0)
            .map(|symbol| (symbol.place, symbol.name))
        {
            Some((SymbolPlace::Livepatch { name, .. }, _)) => name.to_owned(),
            Some((_, name)) => name.to_owned(),
            None => String::new(),
        }
    }
}

/// Sections of the tools' tables, of the module itself, and of what a WARN hands over.
fn is_known_section(name: &str) -> bool {
    name.starts_with(".kpatch.") || name.starts_with(".init.") || [super::THIS_MODULE, "__bug_table"].contains(&name)
}
