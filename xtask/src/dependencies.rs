//! What is depended on keeps to `deny.toml`, also where cargo-deny is not installed.

use crate::repository;
use serde_json::Value;
use std::process::Command;

/// A list of strings in a TOML file: `key = ["…", "…"]` on one line.
fn list(text: &str, key: &str) -> Vec<String> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.trim_start().strip_prefix('='));
    let line = line.unwrap_or_else(|| panic!("no {key}"));
    line.split('"').skip(1).step_by(2).map(str::to_owned).collect()
}

/// True where each part of an SPDX expression offers a licence that is allowed. `A OR B AND C` is read as `(A OR B) AND C`, which is
/// stricter than it is meant.
fn is_allowed(expression: &str, allowed: &[String]) -> bool {
    let expression = expression.replace('/', " OR ").replace(['(', ')'], "");
    let offers = |part: &str| {
        part.split(" OR ")
            .any(|one| allowed.iter().any(|allowed| allowed == one.trim()))
    };
    expression.split(" AND ").all(offers)
}

fn packages() -> Vec<Value> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["metadata", "--format-version=1", "--locked", "--offline"]);
    cargo
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(repository::root());
    let output = cargo.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    found["packages"].as_array().unwrap().clone()
}

#[test]
fn dependencies_have_licences_and_sources_that_are_allowed() {
    let rules = repository::text("deny.toml");
    let (licences, registries) = (list(&rules, "allow"), list(&rules, "allow-registry"));
    let packages = packages();
    assert!(packages.len() > 20, "{}", packages.len());
    for package in packages {
        let text = |member: &str| package[member].as_str().unwrap_or_default().to_owned();
        assert!(
            is_allowed(&text("license"), &licences),
            "{}: licence {:?}",
            text("name"),
            text("license")
        );
        let source = text("source");
        let is_known = source.is_empty()
            || source
                .strip_prefix("registry+")
                .is_some_and(|at| registries.iter().any(|one| one == at));
        assert!(is_known, "{}: from {source}", text("name"));
    }
}

#[test]
fn no_dependency_has_two_versions_but_those_that_are_listed() {
    let rules = repository::text("deny.toml");
    let listed = list(&rules, "skip");
    let names: Vec<_> = packages()
        .iter()
        .map(|package| package["name"].as_str().unwrap_or_default().to_owned())
        .collect();
    for name in &names {
        let count = names.iter().filter(|other| *other == name).count();
        assert!(count == 1 || listed.contains(name), "{count} versions of {name}");
    }
}

#[test]
fn an_expression_is_allowed_where_each_part_offers_a_licence_that_is() {
    let allowed = ["MIT".to_owned(), "Unicode-3.0".to_owned()];
    for expression in [
        "MIT",
        "GPL-2.0 OR MIT",
        "MIT/Apache-2.0",
        "(MIT OR Apache-2.0) AND Unicode-3.0",
    ] {
        assert!(is_allowed(expression, &allowed), "{expression}");
    }
    for expression in [
        "",
        "GPL-2.0",
        "MIT AND GPL-2.0",
        "Apache-2.0 WITH MIT",
        "MIT OR Apache-2.0 AND GPL-2.0",
    ] {
        assert!(!is_allowed(expression, &allowed), "{expression}");
    }
}
