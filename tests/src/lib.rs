//! What the end-to-end tests, the demo and the benchmark share: real guests, real patch modules, and the `vmpatch` program,
//! run as an operator runs it.
//!
//! - [`vmpatch`] builds the program, runs it on a guest and holds what it answered;
//! - [`report`] reads that answer's JSON;
//! - [`kit`] has the programs that go into a guest, and the livepatch modules for each kernel;
//! - [`fixes`] are published fixes for `vmpatch build` to make modules of;
//! - [`bed`] lends guests to tests: booted once for many, checked and cleaned after each;
//! - [`consistency`] applies and reverts while all vCPUs call what is patched;
//! - [`cut`] stops a program at a chosen system call;
//! - [`probe`] runs a program in a guest that sees which kernel function is in force;
//! - [`ftrace`] turns the guest's own tracing on and off;
//! - [`matrix`] is what is shown on a guest of every kind;
//! - [`own_livepatch`] loads livepatches as the guest's own;
//! - [`spoil`] damages modules where it hurts;
//! - [`stable`] chooses fixes of stable updates by a rule;
//! - [`storm`] applies and reverts while the guest changes all that vmpatch reads and writes;
//! - [`other_vmm`] is a guest in a box that is not QEMU's, and [`small_vmm`] a program that runs one;
//! - [`sleeper`] is a task that sleeps inside a function;
//! - [`health`] finds the guest kernel's own complaints;
//! - [`huge_pages`] has the host set some aside for a guest;
//! - [`boxed`] is a guest under KVM in a host in a box, [`in_box`] what a program of the tests does there beside it, and [`figures`] what is
//!   said of many times;
//! - [`killing`] kills vmpatch or its supervisor at a chosen moment, and looks at the guest;
//! - [`libvirt`] has guests that libvirt runs;
//! - [`load`] keeps a guest busy, and talks to it over the network;
//! - [`monitor`] talks to QEMU behind vmpatch's back;
//! - [`moving`] is what the tests of moves into another QEMU share, and [`bare`] such a move without vmpatch;
//! - [`processes`] finds processes of the host and signals them;
//! - [`rules`] are changes that show what `vmpatch build` does with each kind;
//! - [`session`] is vmpatch's library on a guest, without the program;
//! - [`selfcheck`] compares compiled source files with what a guest runs;
//! - [`ram`] compares all of a guest's memory, or its kernel, before and after.

pub mod bare;
pub mod bed;
pub mod boxed;
pub mod builds;
pub mod consistency;
pub mod cut;
pub mod figures;
pub mod fixes;
pub mod ftrace;
pub mod health;
pub mod huge_pages;
pub mod in_box;
pub mod killing;
pub mod kit;
pub mod libvirt;
pub mod load;
pub mod matrix;
pub mod monitor;
pub mod moving;
pub mod other_vmm;
pub mod own_livepatch;
pub mod probe;
pub mod processes;
pub mod ram;
pub mod report;
pub mod rules;
pub mod selfcheck;
pub mod session;
pub mod sleeper;
pub mod small_vmm;
pub mod spoil;
pub mod stable;
pub mod storm;
pub mod vmpatch;
