//! Reading vmpatch's JSON reports (`docs/json.md`).

use serde_json::Value;

/// Each patch of a report: its id, its state, and the states of its functions.
pub fn states(report: &Value) -> Vec<(&str, &str, Vec<&str>)> {
    let functions = |patch| {
        list(patch, "functions")
            .iter()
            .map(|function| text(function, "state"))
            .collect()
    };
    list(report, "patches")
        .iter()
        .map(|patch| (text(patch, "id"), text(patch, "state"), functions(patch)))
        .collect()
}

/// Each function of all patches of a report: its name, and how it is redirected.
pub fn redirects(report: &Value) -> Vec<(&str, &str)> {
    let functions = list(report, "patches")
        .iter()
        .flat_map(|patch| list(patch, "functions"));
    functions
        .map(|function| (text(function, "name"), text(function, "redirect")))
        .collect()
}

/// A member of the pause of a report's first patch, in microseconds.
///
/// # Panics
///
/// If there is none.
pub fn pause_us(report: &Value, member: &str) -> u64 {
    let value = report
        .pointer(&format!("/patches/0/pause/{member}"))
        .and_then(Value::as_u64);
    value.unwrap_or_else(|| panic!("no pause with {member} in {report}"))
}

/// The address, in hex text, at a JSON pointer.
///
/// # Panics
///
/// If there is none.
pub fn address(report: &Value, pointer: &str) -> u64 {
    let text = report
        .pointer(pointer)
        .and_then(Value::as_str)
        .unwrap_or_else(|| panic!("no {pointer} in {report}"));
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// Text, empty where there is none.
fn text<'a>(value: &'a Value, member: &str) -> &'a str {
    value.get(member).and_then(Value::as_str).unwrap_or_default()
}

/// A list, empty where there is none.
fn list<'a>(value: &'a Value, member: &str) -> &'a [Value] {
    value
        .get(member)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_report_is_read_patch_by_patch() {
        let function = json!({ "name": "f", "redirect": "body", "state": "patched" });
        let patch = json!({ "id": "p", "state": "applied", "functions": [function], "pause": { "total_us": 7 } });
        let report = json!({ "patches": [patch], "at": "0xffff000012345678" });
        assert_eq!(states(&report), [("p", "applied", vec!["patched"])]);
        assert_eq!(redirects(&report), [("f", "body")]);
        assert_eq!(pause_us(&report, "total_us"), 7);
        assert_eq!(address(&report, "/at"), 0xffff_0000_1234_5678);
    }
}
