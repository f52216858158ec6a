//! A running guest: booted with QEMU, commanded over its channel, ended with its QEMU.

mod accel;
mod config;
mod error;
mod qemu;
mod run_folder;

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Output};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

pub use accel::Accel;
pub use config::{GuestConfig, NameSpelling, QmpSpelling, Ram};
pub use error::Error;

use crate::channel::{self, Client, Request, Running};
use crate::host::{Host, Process, ThisMachine};
use crate::kernel::{Kernel, KernelFiles};
use crate::{cache, initramfs, modules};
use qemu::Files;
use run_folder::RunFolder;

/// How long a guest may take from QEMU's start until its agent answers. An emulated Debian guest takes some seconds; this
/// is for a host on which several boot at once.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// How long QEMU may take to open its sockets.
const SOCKET_LIMIT: Duration = Duration::from_secs(10);
/// How long QEMU may take to end once it has closed the channel: a crash writes its core first.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest may take to power off.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);
/// How often to look whether QEMU has opened its sockets.
const POLL: Duration = Duration::from_millis(20);
/// How often to look for what ends a boot, and can't be waited for: a panic on the console, the end of QEMU.
const BOOT_POLL: Duration = Duration::from_millis(200);
/// Lines of the console that an error message shows.
const CONSOLE_TAIL_LINES: usize = 25;
/// What the kernel prints when it gives up (kernel/panic.c).
const PANIC: &str = "Kernel panic - not syncing";
/// The modules that the channel needs, where a kernel has not built them in.
const CHANNEL_MODULES: [&str; 2] = ["virtio_pci", "virtio_console"];

/// A running guest. Dropped, it is killed and its files are removed; killed as this program is, its QEMU dies, too.
#[derive(Debug)]
pub struct Guest {
    // Dropped in this order: the process before the folder with its files.
    process: Box<dyn Process>,
    client: Client,
    files: Files,
    config: GuestConfig,
    name: String,
    kernel_release: String,
    folder: RunFolder,
    host: Arc<dyn Host>,
}

impl Guest {
    /// Boots a guest and returns when it can run commands. Where QEMU itself crashes before that, which it rarely does under TCG,
    /// it is started once more.
    pub fn boot(config: GuestConfig) -> Result<Self, Error> {
        Self::boot_on(Arc::new(ThisMachine), config)
    }

    /// Boots a guest whose QEMU runs on that machine, as [`Guest::boot`] does.
    pub fn boot_on(host: Arc<dyn Host>, config: GuestConfig) -> Result<Self, Error> {
        match Self::boot_once(Arc::clone(&host), config.clone()) {
            Err(Error::QemuEnded { status, log }) if status.signal().is_some() => {
                eprintln!("QEMU crashed while a guest booted, and is started again: {status}: {log}");
                Self::boot_once(host, config)
            }
            booted => booted,
        }
    }

    fn boot_once(host: Arc<dyn Host>, config: GuestConfig) -> Result<Self, Error> {
        let guest = Self::start_on(host, config)?;
        guest.wait_for_boot(1)?;
        Ok(guest)
    }

    /// Starts a guest and returns as soon as QEMU runs: for one that is to be seen in its firmware or early boot, that QEMU
    /// holds paused (`-S`), or that runs no kernel of ours. It runs commands after [`Guest::wait_for_boot`].
    pub fn start(config: GuestConfig) -> Result<Self, Error> {
        Self::start_on(Arc::new(ThisMachine), config)
    }

    /// Starts a guest whose QEMU runs on that machine.
    pub fn start_on(host: Arc<dyn Host>, config: GuestConfig) -> Result<Self, Error> {
        let kernel = config.kernel.as_ref().map(Kernel::fetch).transpose()?;
        let folder = RunFolder::new(Arc::clone(&host))?;
        let files = Files::in_folder(folder.path());
        if let Some(kernel) = &kernel {
            let vmlinuz = &kernel.vmlinuz;
            host.place(vmlinuz).map_err(cache::Error::io("place", vmlinuz))?;
            write_initramfs(&*host, kernel, &config, &files)?;
        }
        let own_name = || format!("vmpatch-{}-{}", std::process::id(), folder.number());
        let name = config.name.clone().unwrap_or_else(own_name);
        let vmlinuz = kernel.as_ref().map(|kernel| kernel.vmlinuz.as_path());
        let args = qemu::arguments(&config, &name, vmlinuz, &files);
        let process = host
            .start(&config.qemu, &args, &files.qemu_log())
            .map_err(|source| Error::Qemu {
                action: "start",
                qemu: config.qemu.clone(),
                source,
            })?;
        let client = connect(&*host, &*process, &config, &files)?;
        let kernel_release = kernel.map(|kernel| kernel.release).unwrap_or_default();
        Ok(Self {
            process,
            client,
            files,
            config,
            name,
            kernel_release,
            folder,
            host,
        })
    }

    /// How often the guest has been seen to boot.
    pub fn boots(&self) -> usize {
        self.client.boots()
    }

    /// Waits until the guest has booted `boots` times since QEMU started, the first boot included, and can run commands.
    pub fn wait_for_boot(&self, boots: usize) -> Result<(), Error> {
        // In short steps, since neither QEMU's end nor a panic wakes anybody.
        let limit = BOOT_LIMIT * self.host.slowness();
        let deadline = Instant::now() + limit;
        let poll = BOOT_POLL * self.host.slowness();
        loop {
            let lost = match self.client.wait_for_boot(boots, poll) {
                Ok(()) => return Ok(()),
                Err(channel::Error::Timeout { .. }) => None,
                Err(error) => Some(error.to_string()),
            };
            let end_limit = if lost.is_some() { END_LIMIT } else { Duration::ZERO };
            if let Some(status) = self.ended_within(end_limit)? {
                return Err(Error::QemuEnded {
                    status,
                    log: self.qemu_log()?,
                });
            }
            let console = self.console()?;
            let panicked = || console.contains(PANIC).then(|| "its kernel panicked".to_owned());
            let late = || (Instant::now() >= deadline).then(|| format!("no answer in {} s", limit.as_secs()));
            if let Some(reason) = lost.or_else(panicked).or_else(late) {
                return Err(Error::NoBoot {
                    reason,
                    console: last_lines(&console, CONSOLE_TAIL_LINES),
                });
            }
        }
    }

    /// Runs a command as root to its end, for a minute at most. An exit status other than 0 is not an error.
    pub fn run(&self, args: &[&str]) -> Result<Output, channel::Error> {
        self.command(args).run()
    }

    /// Runs a command without any privilege.
    pub fn run_as(&self, uid: u32, args: &[&str]) -> Result<Output, channel::Error> {
        self.command(args).uid(uid).run()
    }

    /// Runs a command as root and gives its output; an exit status other than 0 is an error.
    pub fn text(&self, args: &[&str]) -> Result<String, channel::Error> {
        self.command(args).text()
    }

    /// Starts a command as root and returns when it runs.
    pub fn spawn(&self, args: &[&str]) -> Result<Running, channel::Error> {
        self.command(args).spawn()
    }

    /// A command whose user, input and time can be chosen.
    pub fn command(&self, args: &[&str]) -> Request {
        Request::new(&self.client, args)
    }

    /// The connection to its agent.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Writes a file in the guest, with these permissions.
    pub fn push(&self, path: &str, bytes: &[u8], permissions: u32) -> Result<(), channel::Error> {
        let script = r#"cat >"$1" && chmod "$2" "$1""#;
        let request = self.command(&["sh", "-c", script, "push", path, &format!("{permissions:o}")]);
        request.stdin(bytes).text().map(drop)
    }

    /// Reads a file of the guest.
    pub fn pull(&self, path: &str) -> Result<Vec<u8>, channel::Error> {
        let output = self.run(&["cat", path])?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let stderr = String::from_utf8_lossy(&output.stderr).trim_end().to_owned();
        Err(channel::Error::Failed {
            command: format!("cat {path}"),
            status: output.status,
            stderr,
        })
    }

    /// The name on QEMU's command line.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine that its QEMU runs on; the guest's process id and paths are that machine's.
    pub fn host(&self) -> &Arc<dyn Host> {
        &self.host
    }

    /// QEMU's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the guest was booted with.
    pub fn config(&self) -> &GuestConfig {
        &self.config
    }

    /// The kernel's release, as its package names it; empty where the guest has no kernel of ours.
    pub fn kernel_release(&self) -> &str {
        &self.kernel_release
    }

    /// The first QMP socket, which exists unless the guest was configured without any.
    pub fn qmp_path(&self) -> PathBuf {
        self.files.qmp(0)
    }

    /// All QMP sockets, in the order of [`GuestConfig::qmp`].
    pub fn qmp_paths(&self) -> Vec<PathBuf> {
        (0..self.config.qmp.len()).map(|index| self.files.qmp(index)).collect()
    }

    /// The folder with the guest's sockets and logs, in which a caller may keep files that end with the guest.
    pub fn folder(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// What the guest's console has shown so far: the kernel's warnings and worse. `dmesg` in the guest says more.
    pub fn console(&self) -> Result<String, Error> {
        read_text(&*self.host, &self.files.console())
    }

    /// What QEMU has written so far.
    pub fn qemu_log(&self) -> Result<String, Error> {
        read_text(&*self.host, &self.files.qemu_log())
    }

    /// Reboots the guest in the same QEMU and returns when it can run commands again.
    pub fn reboot(&self) -> Result<(), Error> {
        let boots = self.boots() + 1;
        // The command ends with the boot that it runs in.
        let running = self.spawn(&["reboot", "-f"])?;
        self.wait_for_boot(boots)?;
        drop(running);
        Ok(())
    }

    /// The guest has moved into the QEMU process `pid`, which has taken over the old one's sockets: from here on this is that one.
    /// Commands that were running in the guest run on, but are lost from sight.
    pub fn follow(&mut self, pid: u32) -> Result<(), Error> {
        self.client.close();
        self.process.follow(pid);
        self.client = connect(&*self.host, &*self.process, &self.config, &self.files)?;
        self.wait_for_boot(1)
    }

    /// Powers the guest off and waits for QEMU's end.
    pub fn shutdown(self) -> Result<ExitStatus, Error> {
        let _running = self.spawn(&["poweroff", "-f"])?;
        let limit = POWER_OFF_LIMIT * self.host.slowness();
        let ended = self.ended_within(limit)?;
        ended.ok_or(Error::NoPowerOff { limit })
    }

    /// How QEMU ended; `None` where it still runs after that time.
    fn ended_within(&self, limit: Duration) -> Result<Option<ExitStatus>, Error> {
        self.process.wait(limit).map_err(|source| Error::Qemu {
            action: "watch",
            qemu: self.config.qemu.clone(),
            source,
        })
    }

    /// Whether QEMU still runs.
    pub fn is_running(&self) -> bool {
        matches!(self.process.ended(), Ok(None))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.client.close();
    }
}

fn write_initramfs(host: &dyn Host, kernel: &KernelFiles, config: &GuestConfig, files: &Files) -> Result<(), Error> {
    let wanted = config.modules.iter().map(String::as_str);
    let wanted: Vec<&str> = CHANNEL_MODULES.into_iter().chain(wanted).collect();
    let initramfs = initramfs::build(&modules::with_dependencies(kernel, &wanted)?, &config.files)?;
    let path = files.initramfs();
    Ok(host
        .write(&path, &initramfs)
        .map_err(cache::Error::io("write", &path))?)
}

/// Connects to the channel's socket as soon as QEMU has opened it.
fn connect(host: &dyn Host, process: &dyn Process, config: &GuestConfig, files: &Files) -> Result<Client, Error> {
    let deadline = Instant::now() + SOCKET_LIMIT * host.slowness();
    loop {
        match host.connect(&files.channel()) {
            Ok(stream) => return Ok(Client::new(stream)?),
            Err(source) if Instant::now() >= deadline => {
                return Err(channel::Error::Socket {
                    action: "connect to",
                    source,
                }
                .into());
            }
            Err(_) => {}
        }
        if let Some(status) = ended(process, config)? {
            return Err(Error::QemuEnded {
                status,
                log: read_text(host, &files.qemu_log())?,
            });
        }
        thread::sleep(POLL);
    }
}

fn ended(process: &dyn Process, config: &GuestConfig) -> Result<Option<ExitStatus>, Error> {
    process.ended().map_err(|source| Error::Qemu {
        action: "watch",
        qemu: config.qemu.clone(),
        source,
    })
}

/// A file's text, empty where it does not exist yet.
fn read_text(host: &dyn Host, path: &Path) -> Result<String, Error> {
    match host.read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(cache::Error::io("read", path)(error).into()),
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(count)..)
        .unwrap_or_default()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_of_a_short_text_are_all_of_it() {
        assert_eq!(last_lines("a\nb\nc\n", 2), "b\nc");
        assert_eq!(last_lines("a\n", 2), "a");
    }
}
