//! The registers of vCPUs while they run.

pub mod info_registers;
