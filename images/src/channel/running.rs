//! A command in the guest: how to ask for one, and one that was started.

use std::process::{ExitStatus, Output};
use std::time::Duration;

use super::Error;
use super::client::{Client, End, Progress};
use super::frame::{CHUNK, Frame};

/// How long a command may run if nothing else is said. Commands of tests end within a second on an idle host; this is for
/// an emulated guest on a host that is busy.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);
/// How long the guest may take to say that a command has started, or that it was killed.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A command to run in the guest.
#[derive(Clone, Debug)]
#[must_use = "nothing runs before `run` or `spawn`"]
pub struct Request {
    client: Client,
    args: Vec<String>,
    uid: u32,
    stdin: Vec<u8>,
    limit: Duration,
}

impl Request {
    /// A request for the program `args[0]` with its arguments, as root, without input.
    pub fn new(client: &Client, args: &[&str]) -> Self {
        let args = args.iter().map(|&arg| arg.to_owned()).collect();
        Self {
            client: client.clone(),
            args,
            uid: 0,
            stdin: Vec::new(),
            limit: DEFAULT_LIMIT,
        }
    }

    /// With one more argument.
    pub fn arg(mut self, arg: &str) -> Self {
        self.args.push(arg.to_owned());
        self
    }

    /// Runs it as this user, with a group of the same number and no capability.
    pub fn uid(mut self, uid: u32) -> Self {
        self.uid = uid;
        self
    }

    /// Gives it this input, of any length.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Lets [`Request::run`] wait so long.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Runs the command to its end. An exit status other than 0 is not an error. A command that is not through in time is
    /// killed.
    pub fn run(self) -> Result<Output, Error> {
        let limit = self.limit;
        let running = self.spawn()?;
        let output = running.wait(limit);
        if let Err(Error::Timeout { .. }) = &output {
            running.kill()?;
        }
        output
    }

    /// Runs the command to its end and gives its output, without the line break at its end; an exit status other than 0 is
    /// an error.
    pub fn text(self) -> Result<String, Error> {
        let command = self.args.join(" ");
        let output = self.run()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned());
        }
        let stderr = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        Err(Error::Failed {
            command,
            status: output.status,
            stderr,
        })
    }

    /// Starts the command and returns when it runs.
    pub fn spawn(self) -> Result<Running, Error> {
        let running = self.start()?;
        running.send(&[])?;
        running.wait_for_start()
    }

    /// Starts the command and leaves its input open.
    pub(super) fn spawn_open(self) -> Result<Running, Error> {
        self.start()?.wait_for_start()
    }

    fn start(self) -> Result<Running, Error> {
        let command = self.client.register();
        let running = Running {
            client: self.client,
            command,
            spelled: self.args.join(" "),
            pid: 0,
        };
        running.client.send(&Frame::Start {
            command,
            uid: self.uid,
            args: self.args,
        })?;
        for bytes in self.stdin.chunks(CHUNK) {
            running.send(bytes)?;
        }
        Ok(running)
    }
}

/// A command that was started. Dropped, it is left to run.
#[derive(Debug)]
pub struct Running {
    client: Client,
    command: u32,
    /// For messages.
    spelled: String,
    pid: u32,
}

impl Running {
    fn wait_for_start(mut self) -> Result<Self, Error> {
        let waiting_for = format!("the start of {:?}", self.spelled);
        let started = self
            .client
            .wait_on(self.command, &waiting_for, START_LIMIT, |progress| {
                match (&progress.end, progress.pid) {
                    (Some(End::NotStarted(reason)), _) => Some(Err(Error::NotStarted { reason: reason.clone() })),
                    (_, Some(pid)) => Some(Ok(pid)),
                    (Some(End::Rebooted), None) => Some(Err(Error::Rebooted {
                        command: self.spelled.clone(),
                    })),
                    (_, None) => None,
                }
            })?;
        self.pid = started?;
        Ok(self)
    }

    /// Gives it more input; none at all ends its input.
    pub(super) fn send(&self, bytes: &[u8]) -> Result<(), Error> {
        self.client.send(&Frame::Stdin {
            command: self.command,
            bytes: bytes.to_vec(),
        })
    }

    /// Takes what it has written to standard output since it was last taken, and whether it has ended; waits for either.
    pub(super) fn take_stdout(&self, limit: Duration) -> Result<(Vec<u8>, bool), Error> {
        self.client.wait_on(self.command, &self.spelled, limit, |progress| {
            let ended = progress.end.is_some();
            (ended || !progress.stdout.is_empty()).then(|| (std::mem::take(&mut progress.stdout), ended))
        })
    }

    /// Its process in the guest, which leads a process group of its own.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it ended, or `None` while it runs.
    pub fn status(&self) -> Result<Option<ExitStatus>, Error> {
        let ended = |progress: &mut Progress| Some(progress.end.clone());
        let end = self
            .client
            .wait_on(self.command, &self.spelled, Duration::ZERO, ended)?;
        end.map(|end| self.exit_status(end)).transpose()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> Result<Vec<u8>, Error> {
        let stdout = |progress: &mut Progress| Some(progress.stdout.clone());
        self.client.wait_on(self.command, &self.spelled, Duration::ZERO, stdout)
    }

    /// Waits until it has written `text` to standard output; that it has ended without doing so is an error.
    pub fn wait_for_stdout(&self, text: &str, limit: Duration) -> Result<(), Error> {
        let waiting_for = format!("{text:?} in the output of {:?}", self.spelled);
        let found = self.client.wait_on(self.command, &waiting_for, limit, |progress| {
            let written = progress
                .stdout
                .windows(text.len().max(1))
                .any(|window| window == text.as_bytes());
            if written {
                Some(None)
            } else {
                progress.end.clone().map(|end| Some((end, progress.stderr.clone())))
            }
        })?;
        let Some((end, stderr)) = found else {
            return Ok(());
        };
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        Err(Error::Failed {
            command: self.spelled.clone(),
            status: self.exit_status(end)?,
            stderr,
        })
    }

    /// Waits for its end and gives all that it wrote. It has ended when nobody holds its output any more: a command that
    /// leaves a process in the background must redirect that one's output.
    pub fn wait(&self, limit: Duration) -> Result<Output, Error> {
        let waiting_for = format!("the end of {:?}", self.spelled);
        let (end, stdout, stderr) = self.client.wait_on(self.command, &waiting_for, limit, |progress| {
            Some((progress.end.clone()?, progress.stdout.clone(), progress.stderr.clone()))
        })?;
        Ok(Output {
            status: self.exit_status(end)?,
            stdout,
            stderr,
        })
    }

    /// Kills it, with all processes of its group, and waits for its end.
    pub fn kill(&self) -> Result<Output, Error> {
        let group = format!("-{}", self.pid);
        // That it has ended already is what was wanted.
        drop(
            Request::new(&self.client, &["kill", "-KILL", "--", &group])
                .limit(START_LIMIT)
                .spawn()?,
        );
        self.wait(START_LIMIT)
    }

    fn exit_status(&self, end: End) -> Result<ExitStatus, Error> {
        match end {
            End::Exited(status) => Ok(status),
            End::NotStarted(reason) => Err(Error::NotStarted { reason }),
            End::Rebooted => Err(Error::Rebooted {
                command: self.spelled.clone(),
            }),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.client.forget(self.command);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::super::serve::Agent;
    use super::*;

    /// The real agent, on this machine instead of in a guest.
    fn client() -> Client {
        let (host, guest) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut input = guest.try_clone().unwrap();
            let mut agent = Agent::new("boot".into(), guest);
            agent.hello().unwrap();
            agent.serve(&mut input).unwrap();
        });
        let client = Client::new(host).unwrap();
        client.wait_for_boot(1, Duration::from_secs(10)).unwrap();
        client
    }

    #[test]
    fn output_error_output_and_exit_status_come_back() {
        let output = Request::new(&client(), &["sh", "-c", "echo out; echo err >&2; exit 7"])
            .run()
            .unwrap();
        assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
        assert_eq!(output.status.code(), Some(7));
    }

    #[test]
    fn a_megabyte_of_binary_input_comes_back_unchanged() {
        let bytes: Vec<u8> = (0..1_u32 << 20)
            .map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0])
            .collect();
        let output = Request::new(&client(), &["cat"]).stdin(bytes.clone()).run().unwrap();
        assert!(output.stdout == bytes);
    }

    #[test]
    fn input_that_a_command_does_not_read_is_dropped() {
        let output = Request::new(&client(), &["true"])
            .stdin(vec![0; 1 << 20])
            .run()
            .unwrap();
        assert!(output.status.success());
    }

    #[test]
    fn commands_run_at_the_same_time() {
        let client = client();
        let long = Request::new(&client, &["sh", "-c", "echo ready; sleep 1000"])
            .spawn()
            .unwrap();
        long.wait_for_stdout("ready", Duration::from_secs(10)).unwrap();
        assert_eq!(Request::new(&client, &["echo", "short"]).text().unwrap(), "short");
        assert_eq!(long.status().unwrap(), None);
        let output = long.kill().unwrap();
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&output.status), Some(9));
    }

    #[test]
    fn a_command_that_takes_too_long_is_named_and_killed() {
        let error = Request::new(&client(), &["sleep", "1000"])
            .limit(Duration::from_millis(100))
            .run()
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "the end of \"sleep 1000\" did not happen within 0.1 s"
        );
    }

    #[test]
    fn a_program_that_does_not_exist_is_named() {
        let error = Request::new(&client(), &["no-such-program"]).run().unwrap_err();
        assert!(
            error.to_string().starts_with("the guest can't run no-such-program: "),
            "{error}"
        );
    }

    #[test]
    fn a_channel_that_ends_wakes_whoever_waits() {
        let client = client();
        let long = Request::new(&client, &["sleep", "5"]).spawn().unwrap();
        let closer = client.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            closer.close();
        });
        assert!(matches!(long.wait(Duration::from_secs(10)), Err(Error::Lost { .. })));
    }
}
