//! Character devices: sockets that the process serves get temporary names, files are not emptied, and what belongs to one process
//! alone is refused.

use super::words::Word;
use super::{Refused, Rewriter, written};
use crate::domains::params::Params;

impl Rewriter<'_> {
    /// A `-chardev`.
    pub(super) fn chardev(&mut self, option: &str, text: &[u8]) -> Result<Vec<u8>, Refused> {
        let mut params = Params::parse(text, Some("backend"));
        let refuse = |reason: &str| Err(Refused::new(option, text, reason));
        match params.text("backend").unwrap_or_default().as_str() {
            "socket" => params = self.socket(option, text, params)?,
            // Without this QEMU empties the file when it opens it.
            "file" => params.replace("append", b"on"),
            "stdio" | "console" | "serial" | "tty" | "parallel" | "parport" => {
                return refuse("the old process has the terminal or device");
            }
            "pty" => return refuse("the new process would have another terminal; use a Unix socket"),
            "pipe" => return refuse("both processes would read from the pipe; use a Unix socket"),
            "spicevmc" | "spiceport" | "null" | "vc" | "ringbuf" | "memory" | "mux" | "hub" | "udp" | "msmouse"
            | "wctablet" | "testdev" => {}
            _ => return refuse("this kind of device is not known"),
        }
        written::keep_log(&mut params);
        Ok(params.render())
    }

    fn socket(&mut self, option: &str, text: &[u8], mut params: Params) -> Result<Params, Refused> {
        let refuse = |reason: &str| Err(Refused::new(option, text, reason));
        let serves = params.is_on("server", false);
        let (path, number) = (params.get("path").map(<[u8]>::to_vec), params.text("fd"));
        match (serves, path, number) {
            (true, Some(_), _) if params.is_on("abstract", false) => {
                return refuse("an abstract name can't be taken over; use a path");
            }
            (true, Some(path), _) => {
                let temporary = self.name(option, text, &path)?;
                params.replace("path", &temporary);
            }
            // Both listen at the same socket: whoever connects meanwhile may be served by either.
            (true, None, Some(number)) => self.hand_on(option, text, &number)?,
            (false, _, Some(_)) => return refuse("the connection belongs to the old process"),
            (true, None, None) => return refuse("the old process has the TCP port; use a Unix socket"),
            // A client connects once more.
            (false, _, None) => return Ok(params),
        }
        // The new process must not wait for somebody to connect.
        params.replace("wait", b"off");
        Ok(params)
    }

    /// The old form of a device, as in `-serial unix:PATH,server=on`. Parsing: QEMU's `chardev/char.c`,
    /// `qemu_chr_parse_compat`.
    pub(super) fn device_text(&mut self, option: &str, text: &[u8]) -> Result<Vec<u8>, Refused> {
        let (mux, device) = match text.strip_prefix(b"mon:") {
            Some(device) => (&b"mon:"[..], device),
            None => (&b""[..], text),
        };
        let refuse = |reason: &str| Err(Refused::new(option, text, reason));
        let colon = device.iter().position(|byte| *byte == b':').unwrap_or(device.len());
        let (kind, rest) = device.split_at(colon);
        let rest = rest.strip_prefix(b":").unwrap_or(rest);
        match kind {
            b"unix" => {
                let mut params = Params::parse(rest, Some("path"));
                params.replace("backend", b"socket");
                let mut params = self.socket(option, text, params)?;
                params.remove("backend");
                Ok([mux, b"unix:", &params.render()].concat())
            }
            b"file" if mux.is_empty() => {
                // This form knows no `append`.
                let id = format!("vmpatch-{option}-{}", self.words.len());
                let mut params = Params::default();
                params.set(b"backend", b"file");
                params.set(b"id", id.as_bytes());
                params.set(b"path", rest);
                params.set(b"append", b"on");
                self.words.push(Word::with("chardev", params.render()));
                Ok(format!("chardev:{id}").into_bytes())
            }
            b"none" | b"null" | b"vc" | b"chardev" | b"udp" | b"msmouse" => Ok(text.to_vec()),
            b"tcp" | b"telnet" | b"websocket" | b"tn3270" => {
                refuse("the old process has the TCP port; use a Unix socket")
            }
            b"pty" => refuse("the new process would have another terminal; use a Unix socket"),
            b"pipe" => refuse("both processes would read from the pipe; use a Unix socket"),
            b"stdio" => refuse("the old process has the terminal"),
            _ => refuse("this kind of device is not known"),
        }
    }
}
