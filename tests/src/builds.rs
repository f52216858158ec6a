//! Builds of modules, measured: in caches of their own, which have the packages and nothing made of them.

use std::error::Error;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long a build took.
#[derive(Clone, Copy, Debug)]
pub struct Took {
    /// On the clock.
    pub wall: Duration,
    /// Of processors, with all programs that it ran: on a busy machine the one that says something.
    pub processor: Duration,
}

/// A vmpatch with a cache of its own.
#[derive(Debug)]
pub struct Builder {
    program: PathBuf,
    cache: PathBuf,
}

impl Builder {
    /// With an empty cache in the folder `cache`, which must not exist, but for the packages of another one.
    ///
    /// Errors: the folder could not be made.
    pub fn new(program: &Path, cache: PathBuf, packages: &Path) -> Result<Self> {
        fs::create_dir(&cache)?;
        symlink(packages, cache.join("packages"))?;
        Ok(Self {
            program: program.to_owned(),
            cache,
        })
    }

    /// Runs it with those arguments.
    ///
    /// Errors: it could not be run, or failed.
    pub fn build(&self, arguments: &[&str]) -> Result<Took> {
        let (start, before) = (Instant::now(), processor()?);
        let ended = Command::new(&self.program)
            .args(arguments)
            .env("VMPATCH_CACHE", &self.cache)
            .output()?;
        if !ended.status.success() {
            let said = String::from_utf8_lossy(&ended.stderr);
            return Err(format!("{} {}: {said}", self.program.display(), arguments.join(" ")).into());
        }
        Ok(Took {
            wall: start.elapsed(),
            processor: processor()?.saturating_sub(before),
        })
    }

    /// What the cache takes on the disk, without the packages [bytes].
    ///
    /// Errors: it could not be read.
    pub fn size(&self) -> Result<u64> {
        let said = Command::new("du").args(["-s", "-B1"]).arg(&self.cache).output()?;
        let said = String::from_utf8(said.stdout)?;
        Ok(said.split_whitespace().next().unwrap_or_default().parse()?)
    }
}

/// What ended children of this process took of processors.
fn processor() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let spent = usage.user_time() + usage.system_time();
    Ok(Duration::from_micros(u64::try_from(spent.num_microseconds())?))
}

/// The value in the middle; of an even number of them the lower one of the two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
        .get(sorted.len().saturating_sub(1) / 2)
        .copied()
        .unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_value_in_the_middle() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), median(&[4.0, 1.0])), (2.0, 1.0));
    }
}
