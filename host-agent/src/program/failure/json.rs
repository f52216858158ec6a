//! A failure in JSON.

use super::{Failure, exit_code, guest};
use serde_json::{Map, Value};

/// What a report says of a failure, see `docs/json.md`.
pub fn members(failure: &Failure) -> Map<String, Value> {
    let (chain, state) = (failure.chain(), failure.guest_state());
    let mut members = Map::new();
    let mut add = |name: &str, value: Value| members.insert(name.to_owned(), value);
    add("error", chain.join(": ").into());
    add("causes", chain.into());
    add("exit_code", exit_code::of(failure).into());
    add("guest_state", guest::name(state).into());
    if let Some(change) = guest::change(state) {
        add("change", change.into());
    }
    members
}
