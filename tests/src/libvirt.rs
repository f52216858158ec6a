//! Guests that libvirt runs: each QEMU is started, watched and ended by libvirt's daemon, as its own user, and libvirt alone has its monitor.

use std::fs::{self, Permissions};
use std::io::{self, Error};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Output};
use std::sync::Mutex;
use std::thread::sleep;
use std::time::{Duration, Instant};

use images::host::{Host, Process, ThisMachine};

/// How long the daemons may take to start.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How often to look whether they have.
const POLL: Duration = Duration::from_millis(50);
/// Where they put their logs; a package that nobody has started as a service has not made it.
const LOGS: &str = "/var/log/libvirt";
/// Hides `/dev/kvm` from the daemons. Where root may use it and QEMU's user may not, libvirt 9.0 asks each QEMU for its capabilities again whenever
/// it needs them: seventeen times for one guest, for a minute.
const HIDE_KVM: &str = "[ ! -e /dev/kvm ] || mount --bind /dev/null /dev/kvm";

/// This machine, with libvirt on it. Where its daemons do not run, they are started, and end with this.
#[derive(Debug)]
pub struct LibvirtHost {
    daemons: Mutex<Vec<Box<dyn Process>>>,
}

impl LibvirtHost {
    /// Starts libvirt, where it does not run.
    ///
    /// # Panics
    ///
    /// If it can't be started.
    pub fn start() -> Self {
        let host = Self {
            daemons: Mutex::new(Vec::new()),
        };
        host.start_daemons();
        host
    }

    /// Starts the daemons again, where they do not run.
    ///
    /// # Panics
    ///
    /// If they can't be started.
    pub fn start_daemons(&self) {
        if virsh(&["version"]).is_ok() {
            return;
        }
        fs::create_dir_all(LOGS).unwrap();
        for program in ["/usr/sbin/virtlogd", "/usr/sbin/libvirtd"] {
            let log = std::env::temp_dir().join(format!("vmpatch-libvirt-{}.log", std::process::id()));
            let script = format!("{HIDE_KVM}; exec {program}");
            let args = ["--mount", "sh", "-c", &script].map(str::to_owned);
            let daemon = ThisMachine.start(Path::new("unshare"), &args, &log).unwrap();
            self.daemons.lock().unwrap().insert(0, daemon);
            fs::remove_file(log).unwrap();
        }
        let deadline = Instant::now() + START_LIMIT;
        while let Err(error) = virsh(&["version"]) {
            assert!(Instant::now() < deadline, "libvirt does not start: {error}");
            sleep(POLL);
        }
    }

    /// Kills the daemons that this has started. Guests go on. False where they run as services of this machine, which are left alone.
    #[must_use]
    pub fn kill_daemons(&self) -> bool {
        let daemons = std::mem::take(&mut *self.daemons.lock().unwrap());
        !daemons.is_empty()
    }
}

/// Runs virsh, and gives its output.
///
/// # Errors
///
/// It fails, or is not there.
pub fn virsh(args: &[&str]) -> io::Result<String> {
    let output = Command::new("virsh")
        .args(["-q", "-c", "qemu:///system"])
        .args(args)
        .output()?;
    match output.status.success() {
        true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        false => Err(Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

impl Host for LibvirtHost {
    fn place(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn place_program(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn output(&self, args: &[&str], folder: &Path) -> io::Result<Output> {
        ThisMachine.output(args, folder)
    }

    fn start(&self, program: &Path, args: &[String], log: &Path) -> io::Result<Box<dyn Process>> {
        let folder = log.parent().ok_or_else(|| Error::other("a log without a folder"))?;
        let domain = Description { program, args, folder };
        let file = folder.join("domain.xml");
        // QEMU runs as another user, who may not read the cache.
        let kernel = domain
            .option("-kernel")
            .ok_or_else(|| Error::other("a guest without a kernel"))?;
        fs::copy(kernel, domain.kernel())?;
        fs::set_permissions(folder, Permissions::from_mode(0o777))?;
        fs::write(&file, domain.xml()?)?;
        virsh(&["create", &file.display().to_string()])?;
        let name = domain.name()?;
        let pid = fs::read_to_string(format!("/run/libvirt/qemu/{name}.pid"))?;
        let pid = pid.trim().parse().map_err(Error::other)?;
        Ok(Box::new(Domain { name, pid }))
    }

    fn connect(&self, socket: &Path) -> io::Result<UnixStream> {
        ThisMachine.connect(socket)
    }

    fn make_folder(&self, name: &str) -> io::Result<PathBuf> {
        ThisMachine.make_folder(name)
    }

    fn remove_folder(&self, folder: &Path) -> io::Result<()> {
        ThisMachine.remove_folder(folder)
    }

    fn read(&self, file: &Path) -> io::Result<Vec<u8>> {
        ThisMachine.read(file)
    }

    fn write(&self, file: &Path, bytes: &[u8]) -> io::Result<()> {
        ThisMachine.write(file, bytes)
    }

    fn slowness(&self) -> u32 {
        1
    }
}

/// A domain's description, made of the command line that its QEMU would have without libvirt.
struct Description<'a> {
    program: &'a Path,
    args: &'a [String],
    folder: &'a Path,
}

impl Description<'_> {
    fn option(&self, name: &str) -> Option<&str> {
        let at = self.args.iter().position(|arg| arg == name)?;
        self.args.get(at + 1).map(String::as_str)
    }

    fn needed(&self, name: &str) -> io::Result<&str> {
        self.option(name).ok_or_else(|| Error::other(format!("no {name}")))
    }

    fn name(&self) -> io::Result<String> {
        Ok(self.needed("-name")?.trim_start_matches("guest=").to_owned())
    }

    fn kernel(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    fn xml(&self) -> io::Result<String> {
        let memory = self.needed("-m")?.trim_end_matches('M');
        // Shared RAM is libvirt's memfd; without it, RAM is private.
        let backing = match self.args.iter().any(|arg| arg.starts_with("memory-backend-memfd,")) {
            true => "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>",
            false => "",
        };
        Ok(format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>{memory}</memory>{backing}<vcpu>{vcpus}</vcpu>\
             <os><type arch='x86_64' machine='q35'>hvm</type><kernel>{kernel}</kernel><initrd>{initrd}</initrd>\
             <cmdline>{append}</cmdline></os>\
             <features><acpi/><apic/></features><cpu mode='maximum'/>\
             <devices><emulator>{program}</emulator><memballoon model='none'/>\
             <serial type='file'><source path='{console}'/></serial>\
             <channel type='unix'><source mode='bind' path='{channel}'/>\
             <target type='virtio' name='org.vmpatch.guest'/></channel></devices></domain>",
            name = escape(&self.name()?),
            vcpus = self.needed("-smp")?,
            kernel = self.kernel().display(),
            initrd = self.needed("-initrd")?,
            append = escape(self.needed("-append")?),
            program = self.program_path()?.display(),
            console = self.chardev("console")?,
            channel = self.chardev("channel")?,
        ))
    }

    /// The emulator: libvirt wants its whole path.
    fn program_path(&self) -> io::Result<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = std::env::split_paths(&path).map(|folder| folder.join(self.program));
        found
            .into_iter()
            .find(|program| program.is_file())
            .ok_or_else(|| Error::other(format!("{} is not in the PATH", self.program.display())))
    }

    /// The path of the character device of that id.
    fn chardev(&self, id: &str) -> io::Result<&str> {
        let of_id = self.args.iter().find(|arg| arg.contains(&format!(",id={id},")));
        let path = of_id.and_then(|arg| arg.split_once("path="));
        path.map(|(_, path)| path)
            .ok_or_else(|| Error::other(format!("no character device {id}")))
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('\'', "&apos;")
}

/// A running domain; dropped, it is destroyed.
#[derive(Debug)]
struct Domain {
    name: String,
    pid: u32,
}

impl Process for Domain {
    fn pid(&self) -> u32 {
        self.pid
    }

    fn follow(&mut self, pid: u32) {
        self.pid = pid;
    }

    /// libvirt does not tell how it ended.
    fn ended(&self) -> io::Result<Option<ExitStatus>> {
        let runs = Path::new(&format!("/proc/{}", self.pid)).exists();
        Ok((!runs).then(|| ExitStatus::from_raw(0)))
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // Its daemon may have been killed by the test.
        if virsh(&["destroy", &self.name]).is_err() {
            drop(Command::new("kill").args(["-KILL", &self.pid.to_string()]).status());
        }
    }
}
