//! A process that has given up its rights and is told to misbehave: it opens no file, starts no program, and reaches no other process.
//!
//! This program runs itself for each attempt: once as it is, where the attempt must succeed, and once behind
//! [`restrict`](host_agent::sandbox::restrict), as vmpatch runs the process that reads a guest.

use host_agent::sandbox::{Layer, User, restrict};
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, dup, execv, fork};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSliceMut, Read};
use std::net::{TcpListener, TcpStream};
use std::num::NonZero;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode};

/// What is there for the attempts.
struct World {
    folder: PathBuf,
    /// A process of the same user that the restricted one becomes, and an address of its memory that holds [`WORD`].
    victim: Pid,
    word: usize,
    port: u16,
}

const WORD: u64 = 0x7665_6c69_7465_6d6f;

type Attempt = fn(&World) -> io::Result<()>;

const ATTEMPTS: &[(&str, Attempt)] = &[
    ("reads a file that all may read", |_| {
        File::open("/etc/passwd").map(drop)
    }),
    ("lists a folder", |_| fs::read_dir("/").map(drop)),
    ("opens a device", |_| File::open("/dev/zero").map(drop)),
    ("writes a file that all may write", |world| {
        OpenOptions::new().write(true).open(world.folder.join("open")).map(drop)
    }),
    ("makes a file", |world| File::create(world.folder.join("new")).map(drop)),
    ("removes a file", |world| fs::remove_file(world.folder.join("gone"))),
    ("renames a file", |world| {
        fs::rename(world.folder.join("from"), world.folder.join("to"))
    }),
    ("opens itself anew", |_| File::open("/proc/self/mem").map(drop)),
    ("opens another process's memory", |world| {
        File::open(format!("/proc/{}/mem", world.victim)).map(drop)
    }),
    ("starts a program", |_| Ok(execv(c"/bin/true", &[c"true"]).map(drop)?)),
    ("makes a process", |_| {
        // SAFETY: this process has one thread.
        match unsafe { fork() }? {
            ForkResult::Parent { child } => Ok(waitpid(child, None).map(drop)?),
            ForkResult::Child => std::process::exit(0),
        }
    }),
    ("makes a thread", |_| {
        std::thread::Builder::new()
            .spawn(|| ())?
            .join()
            .map_err(|_| io::ErrorKind::Other.into())
    }),
    ("signals a process", |world| Ok(kill(world.victim, Signal::SIGCONT)?)),
    ("asks whether it may", |world| Ok(kill(world.victim, None)?)),
    ("traces a process", |world| {
        Ok(ptrace::seize(world.victim, ptrace::Options::empty())?)
    }),
    ("reads a process", |world| {
        let mut bytes = [0; 8];
        let len = bytes.len();
        let remote = [RemoteIoVec { base: world.word, len }];
        let read = process_vm_readv(world.victim, &mut [IoSliceMut::new(&mut bytes)], &remote)?;
        assert_eq!((read, u64::from_ne_bytes(bytes)), (8, WORD));
        Ok(())
    }),
    ("gets a hold of a process", |world| {
        let pid = world.victim.as_raw();
        // SAFETY: takes numbers, and gives a descriptor.
        let descriptor = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
        // SAFETY: it was just made, and nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
        Ok(())
    }),
    ("connects to a port", |world| {
        TcpStream::connect(("127.0.0.1", world.port)).map(drop)
    }),
    ("listens at a port", |_| TcpListener::bind(("127.0.0.1", 0)).map(drop)),
    ("connects to a socket of this host", |world| {
        let own = socket(AddressFamily::Unix, SockType::Stream, SockFlag::empty(), None)?;
        Ok(connect(own.as_raw_fd(), &UnixAddr::new(&world.folder.join("socket"))?)?)
    }),
    ("makes a socket", |_| UnixDatagram::unbound().map(drop)),
    ("has memory with code", |_| {
        let (len, flags) = (NonZero::<usize>::MIN, MapFlags::MAP_PRIVATE);
        // SAFETY: new memory, which nobody uses.
        Ok(unsafe { mmap_anonymous(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_EXEC, flags) }.map(drop)?)
    }),
    ("changes its root", |world| {
        // A user namespace is what anyone needs for it.
        // SAFETY: takes a number.
        Errno::result(unsafe { libc::unshare(libc::CLONE_NEWUSER) })?;
        Ok(nix::unistd::chroot(&world.folder)?)
    }),
    ("types into its terminal", |_| {
        // The one call on an open descriptor that reaches others; asked for something harmless here.
        let mut count = 0;
        let input = File::from(dup(io::stdin())?);
        // SAFETY: writes one number, which is there.
        let done = unsafe { libc::ioctl(input.as_raw_fd(), libc::FIONREAD, &mut count) };
        Ok(Errno::result(done).map(drop)?)
    }),
    ("has the kernel work for it", |_| {
        let mut parameters = [0_u8; 120];
        // SAFETY: a structure of 120 bytes (include/uapi/linux/io_uring.h), which is there; gives a descriptor.
        let descriptor = Errno::result(unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) })?;
        let descriptor = i32::try_from(descriptor).map_err(io::Error::other)?;
        // SAFETY: it was just made, and nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(descriptor) });
        Ok(())
    }),
];

/// What it must still be able to do.
const NEEDS: &[(&str, Attempt)] = &[
    ("has memory", |_| {
        let bytes = vec![1_u8; 64 << 20];
        assert_eq!(bytes.iter().map(|byte| usize::from(*byte)).sum::<usize>(), bytes.len());
        Ok(())
    }),
    ("waits", |_| {
        std::thread::sleep(std::time::Duration::from_millis(1));
        Ok(())
    }),
    ("prints", |_| {
        println!("it prints");
        Ok(())
    }),
];

/// Exit codes of an attempt.
const DONE: i32 = 0;
const DENIED: i32 = 41;
const OTHER: i32 = 42;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [_, "victim"] => be_victim(),
        [_, "without", layer] => without(layer),
        [_, "attempt", name, restricted, ref world @ ..] => attempt(name, restricted == "true", world),
        _ => all(),
    }
}

/// Waits to be reached: as that user, and as one that this user may trace.
fn be_victim() -> ExitCode {
    let User { user, group } = own_user();
    if nix::unistd::geteuid().is_root() {
        nix::unistd::setgroups(&[]).unwrap();
        nix::unistd::setresgid(group.into(), group.into(), group.into()).unwrap();
        nix::unistd::setresuid(user.into(), user.into(), user.into()).unwrap();
        nix::sys::prctl::set_dumpable(true).unwrap();
    }
    let word = Box::new(WORD);
    println!("{}", std::ptr::from_ref(&*word).addr());
    let _ = io::stdin().read(&mut [0]);
    drop(word);
    ExitCode::SUCCESS
}

/// On a host that lacks a layer, the others are taken on, and it is named.
fn without(layer: &str) -> ExitCode {
    let (layer, call) = match layer {
        "landlock" => (Layer::Landlock, libc::SYS_landlock_create_ruleset),
        _ => (Layer::Seccomp, libc::SYS_seccomp),
    };
    let missing_call = SeccompFilter::new(
        [(call, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.cast_unsigned()),
        TargetArch::x86_64,
    );
    let program: BpfProgram = missing_call.unwrap().try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
    let missing = restrict(&[], own_user(), None);
    let layers: Vec<_> = missing.iter().map(|missing| missing.layer).collect();
    assert_eq!(layers, [layer], "{missing:?}");
    let opened = File::open("/etc/passwd").unwrap_err();
    assert_eq!(opened.kind(), io::ErrorKind::PermissionDenied);
    std::process::exit(DONE)
}

fn attempt(name: &str, restricted: bool, world: &[&str]) -> ExitCode {
    let [folder, victim, word, port] = world else {
        panic!("{world:?}")
    };
    let world = World {
        folder: folder.into(),
        victim: Pid::from_raw(victim.parse().unwrap()),
        word: word.parse().unwrap(),
        port: port.parse().unwrap(),
    };
    let (_, work) = ATTEMPTS.iter().chain(NEEDS).find(|(known, _)| *known == name).unwrap();
    if restricted {
        let left_open = File::open("/etc/passwd").unwrap().into_raw_fd();
        let kept = File::open("/etc/passwd").unwrap().into_raw_fd();
        let missing = restrict(&[kept], own_user(), None);
        assert!(missing.is_empty(), "{missing:?}");
        // SAFETY: descriptors of this process, which nobody else uses.
        let [left_open, mut kept] = [left_open, kept].map(|number| unsafe { File::from_raw_fd(number) });
        assert!((&left_open).read(&mut [0]).is_err(), "a descriptor that was not kept");
        assert_eq!(kept.read(&mut [0]).unwrap(), 1, "one that was");
        std::mem::forget(left_open);
    }
    let code = match work(&world) {
        Ok(()) => DONE,
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => DENIED,
        Err(error) => {
            println!("{name}: {error}");
            OTHER
        }
    };
    std::process::exit(code)
}

/// The user that is tried as: not root, where this is root.
fn own_user() -> User {
    let (user, group) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    User { user, group }.or_nobody()
}

fn all() -> ExitCode {
    let folder = std::env::temp_dir().join(format!("vmpatch-sandbox-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let _socket = UnixListener::bind(folder.join("socket")).unwrap();
    let port = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut failed = 0;
    let mut tell = |name: &str, restricted: bool, expected: i32| {
        for file in ["open", "gone", "from"] {
            fs::write(folder.join(file), "").unwrap();
        }
        let mut victim = Victim::start();
        let status = own(&["attempt", name, &restricted.to_string()])
            .arg(&folder)
            .args([victim.child.id().to_string(), victim.word.clone()])
            .arg(port.local_addr().unwrap().port().to_string())
            .stdin(std::process::Stdio::piped())
            .status()
            .unwrap();
        let lives = victim.child.try_wait().unwrap().is_none();
        let is_right = status.code() == Some(expected) && lives;
        failed += usize::from(!is_right);
        let how = if restricted { "without rights" } else { "as it is" };
        println!("{name}, {how}: {status}{}", if is_right { "" } else { " WRONG" });
    };
    for (name, _) in ATTEMPTS {
        tell(name, false, DONE);
        tell(name, true, DENIED);
    }
    for (name, _) in NEEDS {
        tell(name, true, DONE);
    }
    for layer in ["landlock", "seccomp"] {
        let status = own(&["without", layer]).status().unwrap();
        println!("without {layer}: {status}");
        failed += usize::from(!status.success());
    }
    fs::remove_dir_all(&folder).unwrap();
    let (outcome, passed) = if failed == 0 { ("ok", 1) } else { ("FAILED", 0) };
    // As the tests of the standard harness end: `tests/run.sh` counts by it.
    println!("\ntest result: {outcome}. {passed} passed; {failed} failed; 0 ignored");
    ExitCode::from(u8::from(failed > 0))
}

fn own(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(arguments);
    command
}

/// A process that is to be reached, of the user that the restricted one becomes.
struct Victim {
    child: Child,
    word: String,
}

impl Victim {
    fn start() -> Self {
        use std::process::Stdio;
        let mut child = own(&["victim"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut word = String::new();
        io::BufRead::read_line(&mut io::BufReader::new(child.stdout.take().unwrap()), &mut word).unwrap();
        let word = word.trim().to_owned();
        Self { child, word }
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
