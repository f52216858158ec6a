//! Every input that the fuzz targets keep, replayed: none makes them panic or run on.

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
fn every_symbol_table_of_the_corpus_is_read_or_refused() {
    replay("kallsyms", targets::kallsyms::run);
}

#[test]
fn every_type_information_of_the_corpus_is_read_or_refused() {
    replay("btf", targets::btf::run);
}

#[test]
fn every_module_of_the_corpus_is_planned_or_refused() {
    replay("module", targets::module::run);
}

#[test]
fn every_page_table_of_the_corpus_is_walked_to_an_end() {
    replay("page_tables", targets::page_tables::run);
}

#[test]
fn every_spoilt_guest_of_the_corpus_is_found_or_refused() {
    replay("find", targets::find::run);
}

#[test]
fn every_guest_of_the_corpus_that_is_spoilt_later_is_read_or_refused() {
    replay("live", targets::live::run);
}

#[test]
fn every_registry_of_the_corpus_is_read_or_refused() {
    replay("registry", targets::registry::run);
}
