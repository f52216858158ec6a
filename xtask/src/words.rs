//! Documents, and comments in code, keep to the words of `docs/glossary.md`.

use crate::paths::{is_prose, prose};
use crate::repository;

/// Files, and folders with all files in them, whose prose may have words to avoid. This list only gets shorter.
const EXEMPT: &[&str] = &[
    // Names as they were.
    "CHANGELOG.md",
    "docs/glossary.md",
    "host-agent/src/supervisor.rs",
    "patch-build",
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
fn prose_has_none_of_the_words_to_avoid() {
    let avoided = avoided(&repository::text("docs/glossary.md"));
    assert!(avoided.iter().any(|word| word == "laid"), "{avoided:?}");
    let entries = repository::entries();
    for one in EXEMPT {
        assert!(entries.iter().any(|path| path == one), "{one} does not exist");
    }
    let is_exempt = |path: &str| EXEMPT.iter().any(|one| is_in(path, one));
    let files = entries
        .iter()
        .filter(|path| repository::is_file(path) && is_prose(path) && !is_exempt(path));
    let mut found = Vec::new();
    for path in files {
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
