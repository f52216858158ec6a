//! Every input that the fuzz targets keep, replayed: none makes them panic.

#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::path::Path;

/// Runs a target with every input of its corpus; there must be some.
fn replay(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut count = 0;
    for entry in fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = entry.unwrap().path();
        // Shown where the input makes the target panic.
        println!("{}", path.display());
        run(&fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count > 0, "no input in {}", folder.display());
}

#[test]
fn every_list_of_ram_blocks_of_the_corpus_is_read_or_refused() {
    replay("ramblock", targets::ramblock);
}

#[test]
fn every_memory_tree_of_the_corpus_is_read_or_refused() {
    replay("info_mtree", targets::info_mtree);
}

#[test]
fn every_dump_of_registers_of_the_corpus_is_read_or_refused() {
    replay("info_registers", targets::info_registers);
}

#[test]
fn every_message_of_the_corpus_is_read_or_refused() {
    replay("messages", targets::messages);
}

#[test]
fn every_packet_of_the_corpus_is_read_or_refused() {
    replay("gdb_packets", targets::gdb_packets);
}

#[test]
fn every_description_of_registers_of_the_corpus_is_read_or_refused() {
    replay("gdb_registers", targets::gdb_registers);
}

#[test]
fn every_packet_of_libvirt_s_of_the_corpus_is_read_or_refused() {
    replay("libvirt_packets", targets::libvirt_packets);
}
