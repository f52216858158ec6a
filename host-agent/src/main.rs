//! The `vmpatch` program.
fn main() {}
