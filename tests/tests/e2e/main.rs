//! End-to-end tests on real guests, all of them in one program: it is linked once, and its tests share guests ([`e2e::bed`]) and the
//! modules that were built for them.
//!
//! `cargo xtask e2e NAME…` runs the tests of single modules.

mod any_vmm;
mod asleep;
mod bad_input;
mod build;
mod build_again;
mod build_gcc_14;
mod build_headers;
mod build_reach;
mod consistency;
mod cve;
mod diffs;
mod formats;
mod guards;
mod host_box;
mod hotplug;
mod hybrid;
mod killed;
mod known;
mod libvirt;
mod matrix;
mod meddling;
mod memory_kinds;
mod models;
mod module_storm;
mod modules;
mod nested;
mod outlives;
mod per_cpu;
mod refusals;
mod registry;
mod replace;
mod reports;
mod rules;
mod sandbox;
mod selfcheck;
mod silent;
mod static_keys;
mod storms;
mod this_module;
mod tracing;
mod upgrade;
mod upgrade_cards;
mod upgrade_faults;
mod upgrade_held;
mod upgrade_host;
mod upgrade_kill;
mod upgrade_rights;
mod upgrade_set;
