//! What the registers hold while init or exit run, as far as that is known from the code alone.

use super::step::Target;
use iced_x86::Register;

/// Registers that a function may change (System V ABI, x86-64 supplement).
const CALLERS: [Register; 9] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
];

/// What is known of a register's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Value {
    /// Nothing.
    Unknown,
    /// An address in the function's own stack.
    Stack,
    /// This address.
    Address(Target),
    /// What was read from this address.
    Read(Target),
}

/// The general registers, and what was compared last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct State {
    registers: [Value; 16],
    /// What the flags tell of.
    pub compared: Value,
    /// True once the patch has been enabled.
    pub enabled: bool,
}

impl State {
    /// At a function's start.
    pub fn new() -> Self {
        let mut state = Self {
            registers: [Value::Unknown; 16],
            compared: Value::Unknown,
            enabled: false,
        };
        state.set(Register::RSP, Value::Stack);
        state
    }

    pub fn get(&self, register: Register) -> Value {
        let index = index(register);
        index
            .and_then(|index| self.registers.get(index).copied())
            .unwrap_or(Value::Unknown)
    }

    pub fn set(&mut self, register: Register, value: Value) {
        if let Some(slot) = index(register).and_then(|index| self.registers.get_mut(index)) {
            *slot = value;
        }
    }

    /// After a call of a function that is not followed here.
    pub fn call(&mut self) {
        for register in CALLERS {
            self.set(register, Value::Unknown);
        }
        self.compared = Value::Unknown;
    }

    /// What is true on both ways to one instruction.
    pub fn join(self, other: Self) -> Self {
        let both = |a: Value, b: Value| if a == b { a } else { Value::Unknown };
        let mut joined = self;
        for (slot, theirs) in joined.registers.iter_mut().zip(other.registers) {
            *slot = both(*slot, theirs);
        }
        joined.compared = both(self.compared, other.compared);
        joined.enabled = self.enabled && other.enabled;
        joined
    }
}

/// The number of a general register, or of that which it is a part of.
fn index(register: Register) -> Option<usize> {
    let full = register.full_register();
    full.is_gpr64().then(|| full.number())
}
