//! Text that has been rewritten in plain English keeps to the words of `docs/glossary.md`.

use crate::paths::prose;
use crate::repository;

/// Files, and folders with all files in them, whose prose has been rewritten: documents, and comments of code. This list only grows.
const REWRITTEN: &[&str] = &[
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/threat-model.md",
    "guest-core/examples",
    "guest-core/src/addr.rs",
    "guest-core/src/change.rs",
    "guest-core/src/commit",
    "guest-core/src/guest",
    "guest-core/src/guest_module",
    "guest-core/src/kernel",
    "guest-core/src/machine.rs",
    "guest-core/src/memory.rs",
    "guest-core/src/module",
    "guest-core/src/pattern.rs",
    "guest-core/src/per_cpu",
    "guest-core/src/plan",
    "guest-core/src/reads.rs",
    "guest-core/src/redirect.rs",
    "guest-core/src/registry",
    "guest-core/src/task",
    "guest-core/src/text.rs",
    "guest-core/src/transaction",
    "guest-core/src/unwind",
    "guest-core/src/vcpu.rs",
    "host-agent/src/chain.rs",
    "host-agent/src/find.rs",
    "host-agent/src/hypervisor",
    "host-agent/src/program/cli.rs",
    "host-agent/src/program/failure/exit_code.rs",
    "host-agent/src/program/failure/mod.rs",
    "host-agent/src/target.rs",
    "qmp/src/client",
    "qmp/src/cpu",
    "qmp/src/gdb",
    "qmp/src/machine",
    "qmp/src/memory",
    "qmp/src/migrate",
    "qmp/src/text.rs",
];

/// The words in the column "not" of the glossary.
fn avoided(glossary: &str) -> Vec<String> {
    let rows = glossary.lines().skip_while(|line| *line != "| say | not |").skip(2);
    let cells = rows.map_while(|line| line.strip_prefix('|')?.strip_suffix('|')?.split('|').nth(1));
    cells
        .flat_map(|cell| cell.split(',').map(|word| word.trim().to_owned()).collect::<Vec<_>>())
        .collect()
}

/// True where `text` has that word, or those words one after another, in whatever case.
fn has(text: &str, word: &str) -> bool {
    let text = text.to_lowercase();
    let is_of_word = |char: char| char.is_alphanumeric() || char == '_';
    text.match_indices(word).any(|(at, _)| {
        let (before, after) = (&text[..at], &text[at + word.len()..]);
        !before.ends_with(is_of_word) && !after.starts_with(is_of_word)
    })
}

/// True for a path of that file, or of a file in that folder.
fn is_in(path: &str, file_or_folder: &str) -> bool {
    let rest = path.strip_prefix(file_or_folder);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

#[test]
fn rewritten_text_has_none_of_the_words_to_avoid() {
    let avoided = avoided(&repository::text("docs/glossary.md"));
    assert!(avoided.iter().any(|word| word == "laid"), "{avoided:?}");
    let entries = repository::entries();
    let files = |one: &&str| {
        let of_one = entries
            .iter()
            .filter(|path| is_in(path, one) && repository::is_file(path));
        let of_one: Vec<_> = of_one.collect();
        assert!(!of_one.is_empty(), "{one} does not exist");
        of_one
    };
    let mut found = Vec::new();
    for path in REWRITTEN.iter().flat_map(files) {
        let text = repository::text(path);
        for (number, line) in prose(path, &text) {
            for word in avoided.iter().filter(|word| has(&line, word)) {
                found.push(format!("{path}:{number}: {word}"));
            }
        }
    }
    assert!(
        found.is_empty(),
        "words to avoid, see docs/glossary.md:\n{}",
        found.join("\n")
    );
}

#[test]
fn a_folder_has_the_files_below_it_and_no_others() {
    assert!(is_in("a/plan/mod.rs", "a/plan"));
    assert!(is_in("a/plan", "a/plan"));
    assert!(!is_in("a/planning/mod.rs", "a/plan"));
    assert!(!is_in("a", "a/plan"));
}

#[test]
fn a_word_is_found_whole_and_in_any_case() {
    assert!(has("It is Laid there", "laid"));
    assert!(has("what was taken back, later", "taken back"));
    assert!(!has("plaid, laid_out", "laid"));
}

#[test]
fn words_to_avoid_are_those_of_the_second_column() {
    let glossary = "| a | b |\n|---|---|\n| x | y |\n\n| say | not |\n|---|---|\n| stage | lay, laid |\n| paused | stands |\n\nlaid";
    assert_eq!(avoided(glossary), ["lay", "laid", "stands"]);
}
