//! An option's argument in either of QEMU's two forms: `key=value,…`, or JSON.

use crate::domains::params::Params;
use serde_json::{Map, Value};

/// An argument that can be asked and changed key by key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Keyed {
    /// `key=value,…`
    Params(Params),
    /// `{…}`
    Json(Map<String, Value>),
}

impl Keyed {
    /// Reads an argument; `implied` is the key of a first word without one.
    pub(super) fn parse(text: &[u8], implied: &str) -> Self {
        match serde_json::from_slice(text) {
            Ok(Value::Object(map)) => Self::Json(map),
            _ => Self::Params(Params::parse(text, Some(implied))),
        }
    }

    /// The value of a key, for people and for comparing.
    pub(super) fn text(&self, key: &str) -> Option<String> {
        match self {
            Self::Params(params) => params.text(key),
            Self::Json(map) => map.get(key).map(|value| match value {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            }),
        }
    }

    /// The value of a switch.
    pub(super) fn is_on(&self, key: &str) -> bool {
        match self {
            Self::Params(params) => params.is_on(key, false),
            Self::Json(map) => map.get(key) == Some(&Value::Bool(true)),
        }
    }

    /// Gives a key a value.
    pub(super) fn set(&mut self, key: &str, value: &str) {
        match self {
            Self::Params(params) => params.replace(key, value.as_bytes()),
            Self::Json(map) => drop(map.insert(key.to_owned(), Value::from(value))),
        }
    }

    /// Takes a key out.
    pub(super) fn remove(&mut self, key: &str) {
        match self {
            Self::Params(params) => drop(params.remove(key)),
            Self::Json(map) => drop(map.remove(key)),
        }
    }

    /// All keys.
    pub(super) fn keys(&self) -> Vec<String> {
        match self {
            Self::Params(params) => params
                .keys()
                .map(|key| String::from_utf8_lossy(key).into_owned())
                .collect(),
            Self::Json(map) => map.keys().cloned().collect(),
        }
    }

    /// As an argument again.
    pub(super) fn render(&self) -> Vec<u8> {
        match self {
            Self::Params(params) => params.render(),
            Self::Json(map) => Value::Object(map.clone()).to_string().into_bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_asked_and_changed_alike() {
        for (text, changed) in [
            (
                &b"tap,id=n0,ifname=tap0,vhost=on"[..],
                &b"type=tap,id=n0,vhost=on,fd=9"[..],
            ),
            (
                br#"{"type":"tap","id":"n0","ifname":"tap0","vhost":true}"#,
                br#"{"fd":"9","id":"n0","type":"tap","vhost":true}"#,
            ),
        ] {
            let mut keyed = Keyed::parse(text, "type");
            assert_eq!(keyed.text("type").as_deref(), Some("tap"));
            assert!(keyed.is_on("vhost") && !keyed.is_on("script"));
            keyed.remove("ifname");
            keyed.set("fd", "9");
            assert_eq!(keyed.render(), changed, "{}", String::from_utf8_lossy(changed));
        }
    }
}
