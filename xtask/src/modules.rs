//! The modules of host-agent import one another in one direction: in no folder do they form a circle.

use crate::repository;
use std::collections::{BTreeMap, BTreeSet};

/// The folder of the crate's sources.
const SOURCES: &str = "host-agent/src/";

/// A module, by the names that lead to it.
type Module = Vec<String>;
/// Imports among the modules of one parent.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// The module of a file, by its path below the sources; none for a crate's root.
fn module(path: &str) -> Option<Module> {
    let mut names: Module = path.strip_suffix(".rs")?.split('/').map(str::to_owned).collect();
    if names.last().is_some_and(|name| name == "mod") {
        names.pop();
    }
    (!matches!(names.join("/").as_str(), "lib" | "main")).then_some(names)
}

/// Code without comments, and without the tests at a file's end.
fn code(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
    let line = |line: &str| line.split("//").next().unwrap_or_default().to_owned() + "\n";
    text.lines().map(line).collect()
}

/// The paths that begin at the start of `text`, each as its names: a `use` with braces has several.
fn paths(text: &str) -> Vec<Module> {
    let name: String = text
        .chars()
        .take_while(|char| char.is_alphanumeric() || *char == '_')
        .collect();
    let rest = &text[name.len()..];
    if name.is_empty() {
        return group(text).into_iter().flat_map(paths).collect();
    }
    let Some(rest) = rest.strip_prefix("::") else {
        return vec![vec![name]];
    };
    let further = paths(rest);
    let with_name = |path: Module| [vec![name.clone()], path].concat();
    match further.is_empty() {
        true => vec![vec![name]],
        false => further.into_iter().map(with_name).collect(),
    }
}

/// The parts of a group in braces, which `text` begins with.
fn group(text: &str) -> Vec<&str> {
    let Some(inner) = text.strip_prefix('{') else {
        return Vec::new();
    };
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, char) in inner.char_indices() {
        match char {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                parts.push(inner[start..at].trim());
                start = at + 1;
                if char == '}' {
                    return parts;
                }
            }
            _ => {}
        }
    }
    parts
}

/// What a file's code names of its own crate, each from the crate's root.
fn named(own: &Module, code: &str) -> Vec<Module> {
    let starts_word =
        |at: usize| !code[..at].ends_with(|char: char| char.is_alphanumeric() || char == '_' || char == ':');
    let after = |word: &'static str| {
        let found = code.match_indices(word).filter(move |(at, _)| starts_word(*at));
        found.map(move |(at, _)| &code[at + word.len()..])
    };
    let from_root = after("crate::").flat_map(paths);
    let from_parent = after("super::").flat_map(|mut rest| {
        let mut up = 1;
        while let Some(further) = rest.strip_prefix("super::") {
            (rest, up) = (further, up + 1);
        }
        let parent = own[..own.len().saturating_sub(up)].to_vec();
        paths(rest).into_iter().map(move |path| [parent.clone(), path].concat())
    });
    from_root.chain(from_parent).collect()
}

/// For each parent, which of its modules imports which.
fn imports(files: &[(Module, String)]) -> BTreeMap<Module, Imports> {
    let known: BTreeSet<&[String]> = files
        .iter()
        .flat_map(|(module, _)| (1..=module.len()).map(|len| &module[..len]))
        .collect();
    let mut found: BTreeMap<Module, Imports> = BTreeMap::new();
    for (own, text) in files {
        for target in named(own, &code(text)) {
            let common = own.iter().zip(&target).take_while(|(a, b)| a == b).count();
            let (Some(from), Some(to)) = (own.get(common), target.get(common)) else {
                continue;
            };
            if known.contains(&target[..=common]) {
                let imports = found.entry(own[..common].to_vec()).or_default();
                imports.entry(from.clone()).or_default().insert(to.clone());
            }
        }
    }
    found
}

/// A circle of imports, if there is one: modules, each of which imports the next, and the last the first.
fn circle(imports: &Imports) -> Option<Vec<String>> {
    let mut done = BTreeSet::new();
    imports
        .keys()
        .find_map(|name| follow(imports, &mut vec![name.clone()], &mut done))
}

fn follow(imports: &Imports, path: &mut Vec<String>, done: &mut BTreeSet<String>) -> Option<Vec<String>> {
    let here = path.last()?.clone();
    for next in imports.get(&here).into_iter().flatten() {
        if let Some(at) = path.iter().position(|name| name == next) {
            return Some(path[at..].to_vec());
        }
        if !done.contains(next) {
            path.push(next.clone());
            if let Some(circle) = follow(imports, path, done) {
                return Some(circle);
            }
            path.pop();
        }
    }
    done.insert(here);
    None
}

#[test]
fn modules_of_host_agent_import_one_another_in_one_direction() {
    let files: Vec<(Module, String)> = repository::entries()
        .iter()
        .filter_map(|path| Some((path, module(path.strip_prefix(SOURCES)?)?)))
        .map(|(path, module)| (module, repository::text(path)))
        .collect();
    let imports = imports(&files);
    let root = &imports[&Vec::new()];
    assert!(root["upgrade"].contains("session"), "{root:?}");
    let circles: Vec<String> = imports
        .iter()
        .filter_map(|(parent, imports)| Some(format!("{}: {}", parent.join("::"), circle(imports)?.join(" -> "))))
        .collect();
    assert!(
        circles.is_empty(),
        "modules that import one another:\n{}",
        circles.join("\n")
    );
}

#[test]
fn a_circle_is_found_whatever_way_its_modules_are_named() {
    let file = |module: &[&str], text: &str| (module.iter().map(|name| (*name).to_owned()).collect(), text.to_owned());
    let one_way = [
        file(&["a"], "use crate::b::{c::D, E};"),
        file(&["b"], "// use crate::a::X;\n"),
        file(&["b", "c"], ""),
    ];
    assert_eq!(imports(&one_way).values().find_map(circle), None);
    for text in [
        "use crate::a::X;",
        "use crate::{e, a};",
        "use super::super::a;",
        "fn f() -> super::super::a::X {}",
    ] {
        let circular = [file(&["a"], "use super::b;"), file(&["b", "c"], text)];
        assert_eq!(
            imports(&circular).values().find_map(circle).unwrap(),
            ["a", "b"],
            "{text}"
        );
    }
    let tests = [
        file(&["a"], "use super::b;"),
        file(&["b"], "#[cfg(test)]\nmod tests {\n    use crate::a;\n}"),
    ];
    assert_eq!(imports(&tests).values().find_map(circle), None);
}
