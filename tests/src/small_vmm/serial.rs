//! A serial port that speaks and does not hear: as much of a 16450 as a kernel's console needs.

use std::io::{self, Write};
use std::sync::Mutex;

/// Its first I/O port, and how many it has.
pub(super) const PORT: u16 = 0x3f8;
pub(super) const PORTS: u16 = 8;

const DATA: u16 = 0;
const INTERRUPTS: u16 = 1;
const IDENTITY: u16 = 2;
const LINE_CONTROL: u16 = 3;
const MODEM_CONTROL: u16 = 4;
const LINE_STATUS: u16 = 5;
const MODEM_STATUS: u16 = 6;
const SCRATCH: u16 = 7;

/// In the line control: the first two registers are the divisor's.
const DIVISOR: u8 = 0x80;
/// In the modem control: what is sent comes back.
const LOOP: u8 = 0x10;
/// No interrupt is pending.
const NONE_PENDING: u8 = 1;
/// All is sent.
const EMPTY: u8 = 0x60;

/// Its registers.
#[derive(Debug, Default)]
pub(super) struct Serial(Mutex<[u8; 8]>);

impl Serial {
    /// Handles a write to a register. What is sent goes to standard output.
    pub fn write(&self, register: u16, value: u8) -> io::Result<()> {
        let mut registers = self.0.lock().expect("no thread panics with it");
        let is_divisor = registers[usize::from(LINE_CONTROL)] & DIVISOR != 0;
        match register {
            DATA if !is_divisor => {
                let mut out = io::stdout().lock();
                out.write_all(&[value])?;
                out.flush()
            }
            INTERRUPTS if !is_divisor => {
                registers[usize::from(INTERRUPTS)] = value & 0xf;
                Ok(())
            }
            LINE_CONTROL | MODEM_CONTROL | SCRATCH => {
                registers[usize::from(register)] = value;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// What a register holds.
    pub fn read(&self, register: u16) -> u8 {
        let registers = self.0.lock().expect("no thread panics with it");
        let modem = registers[usize::from(MODEM_CONTROL)];
        match register {
            INTERRUPTS | LINE_CONTROL | MODEM_CONTROL | SCRATCH => registers[usize::from(register)],
            IDENTITY => NONE_PENDING,
            LINE_STATUS => EMPTY,
            // Looped back: RTS is CTS, DTR is DSR, and the outputs are RI and DCD.
            MODEM_STATUS if modem & LOOP != 0 => {
                let [dtr, rts, out1, out2] = [1, 2, 4, 8].map(|bit| u8::from(modem & bit != 0));
                rts << 4 | dtr << 5 | out1 << 6 | out2 << 7
            }
            MODEM_STATUS => 0xb0,
            _ => 0,
        }
    }
}
