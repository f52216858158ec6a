//! A QMP connection of the test's own, to do what an operator, a manager or a hostile neighbour does beside vmpatch.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use images::guest::Guest;
use serde_json::{Value, json};

/// How long QEMU may take to answer; saving all of a guest's memory takes a second on a busy host.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);

/// A QMP session on one socket; as long as it lives, nobody else can use that socket.
#[derive(Debug)]
pub struct Monitor {
    stream: BufReader<UnixStream>,
    /// The events that have come and were not asked for yet: their names, and when they were, as QEMU says.
    events: Vec<(String, Duration)>,
}

impl Monitor {
    /// On the guest's second socket, which leaves the first to vmpatch.
    ///
    /// # Panics
    ///
    /// If the guest has no second socket, or it is in use.
    pub fn second(guest: &Guest) -> Self {
        let paths = guest.qmp_paths();
        let path = paths.get(1).expect("the guest has two QMP sockets");
        let stream = guest.host().connect(path).expect("its second QMP socket is there");
        Self::over(stream).expect("its second QMP socket is free")
    }

    /// On that socket.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::over(UnixStream::connect(path)?)
    }

    fn over(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let mut monitor = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        monitor.line()?;
        monitor.call("qmp_capabilities", json!({})).map_err(io::Error::other)?;
        Ok(monitor)
    }

    /// Runs a command and gives what it returns, or QEMU's words why not.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value, String> {
        let request = json!({ "execute": command, "arguments": arguments });
        let failed = |error: io::Error| format!("{command}: {error}");
        self.stream
            .get_mut()
            .write_all(format!("{request}\n").as_bytes())
            .map_err(failed)?;
        loop {
            let answer = self.line().map_err(failed)?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                return Err(format!("{command}: {error}"));
            }
            self.note(&answer);
        }
    }

    /// Forgets the events up to now.
    ///
    /// # Panics
    ///
    /// If QEMU does not answer.
    pub fn forget_events(&mut self) {
        self.run_state();
        self.events.clear();
    }

    /// Waits for an event, and forgets it and those before it. False where there was none in that time.
    ///
    /// # Panics
    ///
    /// If the connection breaks.
    pub fn wait_for_event(&mut self, name: &str, limit: Duration) -> bool {
        self.time_of_event(name, limit).is_some()
    }

    /// Waits for an event, forgets it and those before it, and gives the time since 1970 when QEMU says it was.
    ///
    /// # Panics
    ///
    /// If the connection breaks.
    pub fn time_of_event(&mut self, name: &str, limit: Duration) -> Option<Duration> {
        let end = Instant::now() + limit;
        loop {
            if let Some(index) = self.events.iter().position(|(event, _)| event == name) {
                return self.events.drain(..=index).next_back().map(|(_, at)| at);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            self.limit_answers(left);
            let line = self.line();
            self.limit_answers(ANSWER_LIMIT);
            match line {
                Ok(event) => self.note(&event),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
                Err(error) => panic!("waiting for {name}: {error}"),
            }
        }
    }

    fn limit_answers(&self, limit: Duration) {
        let stream = self.stream.get_ref();
        stream
            .set_read_timeout(Some(limit))
            .expect("a limit that is not zero is taken");
    }

    fn note(&mut self, message: &Value) {
        let name = message.get("event").and_then(Value::as_str);
        let number = |pointer| message.pointer(pointer).and_then(Value::as_u64).unwrap_or(0);
        let at = Duration::from_secs(number("/timestamp/seconds"))
            + Duration::from_micros(number("/timestamp/microseconds"));
        self.events.extend(name.map(|name| (name.to_owned(), at)));
    }

    /// `running`, `paused`, …
    ///
    /// # Panics
    ///
    /// If QEMU does not say.
    pub fn run_state(&mut self) -> String {
        let status = self.call("query-status", json!({})).expect("QEMU tells its state");
        status
            .get("status")
            .and_then(Value::as_str)
            .expect("it is a word")
            .to_owned()
    }

    /// Stops the vCPUs.
    ///
    /// # Panics
    ///
    /// If QEMU refuses.
    pub fn stop(&mut self) {
        self.call("stop", json!({})).expect("QEMU stops the guest");
    }

    /// Lets the vCPUs run.
    ///
    /// # Panics
    ///
    /// If QEMU refuses.
    pub fn cont(&mut self) {
        self.call("cont", json!({})).expect("QEMU lets the guest run");
    }

    fn line(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::Error::other("QEMU closed the connection"));
        }
        Ok(serde_json::from_str(&line)?)
    }
}
