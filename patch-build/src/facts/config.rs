//! A kernel's configuration.

use std::collections::HashMap;

/// The settings of a `.config`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config(HashMap<String, String>);

impl Config {
    /// Reads the text of a `.config`; what is not set is left out.
    pub fn parse(text: &str) -> Self {
        let setting = |line: &str| {
            let (name, value) = line.strip_prefix("CONFIG_")?.split_once('=')?;
            Some((name.to_owned(), value.trim_matches('"').to_owned()))
        };
        Self(text.lines().filter_map(setting).collect())
    }

    /// The value of a setting (`CC_VERSION_TEXT`, without `CONFIG_`), strings without their quotes.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// Whether a setting is `y`.
    pub fn enabled(&self, name: &str) -> bool {
        self.value(name) == Some("y")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_on_a_value_or_not_there() {
        let config = Config::parse("CONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_D=\"a b\"\n");
        assert!(config.enabled("A") && !config.enabled("B") && !config.enabled("C"));
        assert_eq!((config.value("D"), config.value("C")), (Some("a b"), None));
    }
}
