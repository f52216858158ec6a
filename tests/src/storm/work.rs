//! One activity of a storm while it runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use images::channel::Running;

use super::{Result, Scene};

/// How long a program in the guest may take to start, on a guest that is all busy.
const START_LIMIT: Duration = Duration::from_secs(120);
/// How long it may take to end its last round: a CPU that is taken offline, or a livepatch that is disabled, takes its time.
const END_LIMIT: Duration = Duration::from_secs(180);
/// Around a shell loop's round: counts as the programs do (`images/programs/rounds.h`).
const LOOP: [&str; 2] = [
    "rounds=0 wrong=0 ended=\ntrap ended=1 TERM\necho started\nwhile [ -z \"$ended\" ]; do\n(set -e\n",
    "\n) 2>/tmp/wrong.$$ || { [ -n \"$ended\" ] || { wrong=$((wrong + 1)); [ $wrong -gt 1 ] || cat /tmp/wrong.$$; }; }\n\
     rounds=$((rounds + 1))\ndone\necho \"rounds $rounds wrong $wrong\"",
];

/// What an activity did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rounds {
    /// Rounds that it made.
    pub rounds: u64,
    /// Those that did not go as they must.
    pub wrong: u64,
    /// What it said beside that.
    pub said: String,
}

impl Rounds {
    /// Out of a program's output, whose last line is `rounds N wrong N`.
    fn of(output: &str) -> Option<Self> {
        let (said, last) = output.trim_end().rsplit_once('\n').unwrap_or(("", output.trim_end()));
        let words: Vec<&str> = last.split(' ').collect();
        let ["rounds", rounds, "wrong", wrong] = words[..] else {
            return None;
        };
        Some(Self {
            rounds: rounds.parse().ok()?,
            wrong: wrong.parse().ok()?,
            said: said.replace("started", "").trim().to_owned(),
        })
    }
}

/// One activity.
pub struct Work {
    name: String,
    kind: Kind,
}

enum Kind {
    InGuest(Running),
    OnHost {
        ended: Arc<AtomicBool>,
        thread: JoinHandle<Result<u64>>,
    },
}

impl Work {
    /// A program of the guest that repeats its round until SIGTERM.
    ///
    /// # Errors
    ///
    /// If it does not start.
    pub fn program(scene: &Scene<'_>, args: &[&str]) -> Result<Self> {
        let running = scene.guest.spawn(args)?;
        running.wait_for_stdout("started", START_LIMIT)?;
        Ok(Self {
            name: args.join(" "),
            kind: Kind::InGuest(running),
        })
    }

    /// Lines for the guest's shell, again and again; a command that fails ends the round, and makes it a wrong one. After the
    /// last round `reset` is run.
    ///
    /// # Errors
    ///
    /// If the shell does not start.
    pub fn shell(scene: &Scene<'_>, name: &str, round: &str, reset: &str) -> Result<Self> {
        let [before, behind] = LOOP;
        let script = format!("{before}{round}{behind}\n{reset}");
        let work = Self::program(scene, &["sh", "-c", &script])?;
        Ok(Self {
            name: name.to_owned(),
            ..work
        })
    }

    /// Something that is done on the host, again and again, in a thread of its own.
    pub fn on_host(name: &str, mut round: impl FnMut() -> Result<()> + Send + 'static) -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            let mut rounds = 0;
            while !end.load(Ordering::Relaxed) {
                round()?;
                rounds += 1;
            }
            Ok(rounds)
        });
        Self {
            name: name.to_owned(),
            kind: Kind::OnHost { ended, thread },
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Ends it after its present round.
    ///
    /// # Errors
    ///
    /// If it has ended by itself, does not end, or does not say what it did.
    pub fn end(self, scene: &Scene<'_>) -> Result<Rounds> {
        let failed = |why: String| format!("{}: {why}", self.name);
        match self.kind {
            Kind::InGuest(running) => {
                scene.guest.text(&["kill", "-TERM", &running.pid().to_string()])?;
                let output = running.wait(END_LIMIT)?;
                let text = String::from_utf8_lossy(&output.stdout);
                Ok(Rounds::of(&text).ok_or_else(|| failed(format!("{output:?}")))?)
            }
            Kind::OnHost { ended, thread } => {
                ended.store(true, Ordering::Relaxed);
                let result = thread.join().map_err(|_| failed("its thread panicked".to_owned()))?;
                let rounds = result.map_err(|error| failed(error.to_string()))?;
                Ok(Rounds {
                    rounds,
                    ..Rounds::default()
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_went_wrong_first_comes_before_the_numbers() {
        let rounds = Rounds {
            rounds: 12,
            wrong: 3,
            said: "wrong: fork: out of memory".to_owned(),
        };
        assert_eq!(
            Rounds::of("started\nwrong: fork: out of memory\nrounds 12 wrong 3\n"),
            Some(rounds)
        );
        assert_eq!(Rounds::of("started\n"), None);
    }
}
