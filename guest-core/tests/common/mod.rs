//! A guest made by hand: RAM in a byte array, page tables, a kernel image with the tables that vmpatch reads.
//! Everything in it is of our own making; nothing comes from a real kernel.
#![allow(dead_code)] // each test file uses its own part

#[path = "../../src/btf/builder.rs"]
pub mod btf;
pub mod guest;
pub mod kallsyms;
pub mod machine;
pub mod module;
pub mod patch;
pub mod ram;
pub mod tasks;
pub mod types;
