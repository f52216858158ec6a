//! QEMU's `key=value,key=value` strings.
//!
//! Format: QEMU's `util/qemu-option.c` (10.0; the same rules since 1.0, but that QEMU before 6.0 took only `on` and
//! `off` for a boolean).

/// One such string, taken apart. A key may be there several times; the last one counts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Params(Vec<(Vec<u8>, Vec<u8>)>);

impl Params {
    /// Takes `text` apart. `implied` is the key of a first word that has none, as `guest` is in `-name vm42`.
    pub(crate) fn parse(text: &[u8], implied: Option<&str>) -> Self {
        let mut params = Self::default();
        let mut rest = text;
        let mut implied = implied;
        while !rest.is_empty() {
            let end = rest
                .iter()
                .position(|&byte| byte == b'=' || byte == b',')
                .unwrap_or(rest.len());
            let (word, after) = rest.split_at(end);
            rest = match (after.strip_prefix(b"="), implied) {
                (Some(value), _) => params.push_value(word, value),
                (None, Some(key)) => params.push_value(key.as_bytes(), rest),
                (None, None) => {
                    params.push_flag(word);
                    after
                }
            };
            rest = rest.strip_prefix(b",").unwrap_or(rest);
            implied = None;
        }
        params
    }

    /// Adds a key, over an earlier one of the same name.
    pub(crate) fn set(&mut self, key: &[u8], value: &[u8]) {
        self.0.push((key.to_vec(), value.to_vec()));
    }

    /// The value of `key`.
    pub(crate) fn get(&self, key: &str) -> Option<&[u8]> {
        let mut all = self.0.iter().rev();
        all.find(|(name, _)| name == key.as_bytes())
            .map(|(_, value)| value.as_slice())
    }

    /// The value of `key`, for people.
    pub(crate) fn text(&self, key: &str) -> Option<String> {
        self.get(key).map(|value| String::from_utf8_lossy(value).into_owned())
    }

    /// The value of a switch. QEMU does not start with one that is neither on nor off, so that case does not matter.
    pub(crate) fn is_on(&self, key: &str, default: bool) -> bool {
        match self.get(key) {
            Some(b"on" | b"yes" | b"true" | b"y") => true,
            Some(b"off" | b"no" | b"false" | b"n") => false,
            _ => default,
        }
    }

    /// Removes a key, at any place, and gives the value that counted.
    pub(crate) fn remove(&mut self, key: &str) -> Option<Vec<u8>> {
        let found = self.get(key).map(<[u8]>::to_vec);
        self.0.retain(|(name, _)| name != key.as_bytes());
        found
    }

    /// Gives a key this value and no other, where it stood first, or at the end.
    pub(crate) fn replace(&mut self, key: &str, value: &[u8]) {
        let first = self.0.iter().position(|(name, _)| name == key.as_bytes());
        let at = first.unwrap_or(self.0.len());
        self.remove(key);
        self.0
            .insert(at.min(self.0.len()), (key.as_bytes().to_vec(), value.to_vec()));
    }

    /// The keys, in the order given.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|(key, _)| key.as_slice())
    }

    /// The values, in the order given.
    pub(crate) fn values(&self) -> impl Iterator<Item = &[u8]> {
        self.0.iter().map(|(_, value)| value.as_slice())
    }

    /// As one string again, with every key written out.
    pub(crate) fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (key, value) in &self.0 {
            if !text.is_empty() {
                text.push(b',');
            }
            text.extend_from_slice(key);
            text.push(b'=');
            for byte in value {
                // A comma in a value is doubled.
                text.extend(std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 }));
            }
        }
        text
    }

    fn push_value<'a>(&mut self, key: &[u8], text: &'a [u8]) -> &'a [u8] {
        let (value, rest) = take_value(text);
        self.0.push((key.to_vec(), value));
        rest
    }

    /// A word alone is a switch: `server` is `server=on`, and `nowait` is `wait=off`.
    fn push_flag(&mut self, word: &[u8]) {
        match word.strip_prefix(b"no") {
            Some(key) => self.set(key, b"off"),
            None => self.set(word, b"on"),
        }
    }
}

/// A value ends at a comma; two commas stand for one in the value. Gives the value and what follows it.
fn take_value(text: &[u8]) -> (Vec<u8>, &[u8]) {
    let mut value = Vec::new();
    let mut rest = text;
    loop {
        let end = rest.iter().position(|&byte| byte == b',').unwrap_or(rest.len());
        let (piece, after) = rest.split_at(end);
        value.extend_from_slice(piece);
        match after.strip_prefix(b",,") {
            Some(more) => {
                value.push(b',');
                rest = more;
            }
            None => return (value, after),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Params;

    fn guest(text: &str) -> Option<String> {
        Params::parse(text.as_bytes(), Some("guest")).text("guest")
    }

    #[test]
    fn a_first_word_without_a_key_has_the_implied_one() {
        assert_eq!(guest("vm42").as_deref(), Some("vm42"));
        assert_eq!(guest("vm42,process=x").as_deref(), Some("vm42"));
        assert_eq!(guest("process=x,vm42"), None, "only the first word");
    }

    #[test]
    fn doubled_commas_stand_for_one() {
        assert_eq!(guest("a,,b").as_deref(), Some("a,b"));
        assert_eq!(guest("guest=a,,,,b,,,debug-threads=on").as_deref(), Some("a,,b,"));
        assert_eq!(guest("guest=,,").as_deref(), Some(","));
    }

    #[test]
    fn the_last_of_two_values_counts() {
        assert_eq!(guest("a,guest=b").as_deref(), Some("b"));
    }

    #[test]
    fn switches_are_read_in_the_short_and_in_the_long_form() {
        let params = Params::parse(b"p,server,nowait,tight=off,abstract=yes", Some("path"));
        let read = |key| params.is_on(key, key == "wait");
        assert!(read("server") && !read("wait") && !read("tight") && read("abstract") && !read("telnet"));
    }

    #[test]
    fn empty_and_odd_strings_have_an_end() {
        assert_eq!(Params::parse(b"", Some("guest")).get("guest"), None);
        assert_eq!(guest("guest=").as_deref(), Some(""));
        assert_eq!(guest(",").as_deref(), Some(""));
        assert_eq!(Params::parse(b",,,", None).get("guest"), None);
        assert_eq!(guest("x=a=b,guest=c=d").as_deref(), Some("c=d"));
    }

    #[test]
    fn a_string_that_was_changed_is_written_out_again() {
        let mut params = Params::parse(b"socket,id=m,path=/a,,b,server,nowait,path=/c", Some("backend"));
        params.replace("path", b"/d,e");
        params.replace("wait", b"off");
        assert_eq!(params.remove("id").as_deref(), Some(&b"m"[..]));
        assert_eq!(params.render(), b"backend=socket,path=/d,,e,server=on,wait=off");
        params.replace("new", b"1");
        assert_eq!(params.keys().last(), Some(&b"new"[..]));
    }
}
