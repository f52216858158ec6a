//! Domains of real QEMU processes: found by name, and reached at the sockets that were found.

use host_agent::domains::{self, Domain, DomainError, QmpAddress};
use serde_json::{Value, json};
use std::fs;
use std::io::Write;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const QEMU: &str = "qemu-system-x86_64";
/// For QEMU to come up on a host whose processors are all busy.
const START_TIMEOUT_S: u64 = 60;
/// Between two looks at whether it is there, in milliseconds.
const POLL_MS: u64 = 20;

/// A folder for one test's sockets, removed when the test is over, and a name that no other guest has.
struct Scratch {
    folder: PathBuf,
    name: String,
}

impl Scratch {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!(
            "vm-domains-{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir(&folder).unwrap();
        Self { folder, name }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Runs a command that ends up as a QEMU without a machine, until dropped. The guest's name and its monitors are
    /// in `options`, parted by spaces, with `NAME` and `DIR` for this scratch's own.
    fn run(&self, mut command: Command, options: &str) -> Qemu {
        let options = options
            .replace("NAME", &self.name)
            .replace("DIR", &self.folder.to_string_lossy());
        command.args("-S -nodefaults -display none -machine none -accel tcg".split(' '));
        command.args(options.split(' ').filter(|word| !word.is_empty()));
        command.current_dir(&self.folder).stdin(Stdio::null());
        Qemu(command.spawn().unwrap())
    }

    fn qemu(&self, options: &str) -> Qemu {
        self.run(Command::new(QEMU), options)
    }

    /// The domain of this scratch's name, as soon as `sockets` of its QMP sockets are there.
    fn domain(&self, sockets: usize) -> Domain {
        let mut found = None;
        until("a QEMU with its sockets", || {
            found = domains::find(&self.name).ok();
            let domain = found.as_ref();
            domain.is_some_and(|domain| domain.qmp_paths().filter(|path| is_listening(path)).count() == sockets)
        });
        found.unwrap()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).unwrap();
    }
}

struct Qemu(Child);

impl Qemu {
    fn pid(&self) -> i32 {
        i32::try_from(self.0.id()).unwrap()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // A test may have ended it already.
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(START_TIMEOUT_S);
    while !is_so() {
        assert!(Instant::now() < end, "{what} did not come within {START_TIMEOUT_S} s");
        thread::sleep(Duration::from_millis(POLL_MS));
    }
}

/// Abstract names are no files: connecting to them waits for QEMU anyway.
fn is_listening(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().starts_with(b"\0") || path.exists()
}

/// The name of the guest at the other end of a QMP socket.
fn name_at(path: &Path) -> String {
    let connect = || match path.as_os_str().as_encoded_bytes().strip_prefix(b"\0") {
        Some(name) => UnixStream::connect_addr(&SocketAddr::from_abstract_name(name)?),
        None => UnixStream::connect(path),
    };
    let mut connected = None;
    // The path is there a moment before QEMU listens.
    until("a listener", || {
        connected = connect().ok();
        connected.is_some()
    });
    let mut stream = connected.unwrap();
    let limit = Duration::from_secs(START_TIMEOUT_S);
    stream.set_read_timeout(Some(limit)).unwrap();
    let mut messages = serde_json::Deserializer::from_reader(stream.try_clone().unwrap()).into_iter::<Value>();
    let mut next = || messages.next().unwrap().unwrap();
    assert!(next().get("QMP").is_some(), "a greeting");
    for command in ["qmp_capabilities", "query-name"] {
        writeln!(stream, "{}", json!({ "execute": command })).unwrap();
    }
    next();
    let reply = next();
    reply
        .pointer("/return/name")
        .unwrap_or_else(|| panic!("{reply}"))
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn every_spelling_of_a_qmp_socket_leads_to_the_process() {
    let scratch = Scratch::new();
    let qemu = scratch.qemu(
        "-name guest=NAME,debug-threads=on -uuid 8d0e9a3e-8b1c-4f0e-9d1b-2a1c3e4d5f60 \
         -mon chardev=late,mode=control \
         -qmp unix:DIR/long,server=on,wait=off -qmp unix:DIR/short,server,nowait -qmp unix:DIR/a,,b,server,nowait \
         -qmp-pretty unix:DIR/pretty,server=on,wait=off -qmp unix:relative,server=on,wait=off \
         -chardev socket,id=late,path=DIR/late,server=on,wait=off \
         -chardev socket,id=early,server=on,wait=off,path=DIR/early -mon early,mode=control,pretty=on \
         -chardev socket,id=lent,server=on,wait=off,path=DIR/lent -qmp chardev:lent \
         -qmp unix:NAME,server=on,wait=off,abstract=on \
         -chardev socket,id=wide,server=on,wait=off,path=NAME,abstract=on,tight=off -mon wide,mode=control \
         -monitor unix:DIR/people,server=on,wait=off \
         -qmp tcp:127.0.0.1:0,server=on,wait=off",
    );
    let domain = scratch.domain(10);
    assert_eq!(domain.pid, qemu.pid());
    assert_eq!(domain.name.as_deref(), Some(scratch.name.as_str()));
    assert_eq!(domain.uuid.as_deref(), Some("8d0e9a3e-8b1c-4f0e-9d1b-2a1c3e4d5f60"));
    let binary = domain.binary.as_ref().unwrap();
    assert!(binary.path.ends_with(QEMU) && !binary.deleted, "{binary:?}");
    let files = ["late", "long", "short", "a,b", "relative", "lent"];
    let files: Vec<PathBuf> = files.iter().map(|name| scratch.path(name)).collect();
    let abstracts = [format!("\0{}", scratch.name), format!("\0{:\0<107}", scratch.name)];
    // Pretty ones come last: not every client understands them.
    let pretty = [scratch.path("pretty"), scratch.path("early")];
    let found: Vec<&Path> = domain.qmp_paths().collect();
    let plain: Vec<PathBuf> = files.into_iter().chain(abstracts.map(PathBuf::from)).collect();
    assert_eq!(found, plain.iter().chain(&pretty).collect::<Vec<_>>());
    for path in found {
        assert_eq!(name_at(path), scratch.name, "{}", path.display());
    }
    assert_eq!(
        domain.qmp.last().unwrap().address,
        QmpAddress::Tcp("127.0.0.1:0".to_owned())
    );
}

#[test]
fn a_domain_is_found_by_its_socket_however_that_is_spelled() {
    let scratch = Scratch::new();
    let qemu = scratch.qemu("-name NAME -qmp unix:DIR/q,server=on,wait=off");
    let domain = scratch.domain(1);
    let spelled = scratch.path("../").join(&scratch.name).join("q");
    let domains = domains::all().unwrap();
    assert_eq!(domains.by_qmp(&spelled), Some(&domain));
    assert_eq!(domains.by_qmp(&scratch.path("other")), None);
    let of_peer = Domain::of_peer(qemu.pid(), &spelled).unwrap();
    assert_eq!(
        (of_peer.pid, of_peer.start_time, of_peer.name.clone()),
        (qemu.pid(), domain.start_time, domain.name)
    );
    assert_eq!(of_peer.qmp_paths().collect::<Vec<_>>(), [spelled.as_path()]);
}

#[test]
fn a_daemons_relative_socket_is_found_where_it_was_started() {
    let scratch = Scratch::new();
    let mut command = Command::new(QEMU);
    // A shell does this.
    command.env("PWD", &scratch.folder);
    let mut starter = scratch.run(command, "-name NAME -daemonize -qmp unix:q,server=on,wait=off");
    assert!(starter.0.wait().unwrap().success());
    let domain = scratch.domain(1);
    assert_eq!(domain.qmp_socket().unwrap(), scratch.path("q"));
    assert_eq!(name_at(&scratch.path("q")), scratch.name);
    let ended = Command::new("kill").arg(domain.pid.to_string()).status().unwrap();
    assert!(ended.success());
    until("the daemon's end", || domains::find(&scratch.name).is_err());
}

#[test]
fn a_monitor_in_a_configuration_file_is_found() {
    let scratch = Scratch::new();
    let text = "[chardev \"m\"]\n  backend = \"socket\"\n  path = \"q\"\n  server = \"on\"\n  wait = \"off\"\n\
                [mon]\n  chardev = \"m\"\n  mode = \"control\"\n";
    fs::write(scratch.path("vm.conf"), text).unwrap();
    let _qemu = scratch.qemu("-name NAME -readconfig vm.conf");
    assert_eq!(name_at(&scratch.domain(1).qmp_socket().unwrap()), scratch.name);
    fs::remove_file(scratch.path("vm.conf")).unwrap();
    let error = domains::find(&scratch.name).unwrap_err();
    assert!(error.to_string().contains("not read: vm.conf"), "{error}");
}

#[test]
fn two_of_one_name_are_refused_with_their_pids() {
    let scratch = Scratch::new();
    let one = scratch.qemu("-name NAME -qmp unix:DIR/1,server=on,wait=off");
    scratch.domain(1);
    let other = scratch.qemu("-name NAME,process=other -qmp unix:DIR/2,server=on,wait=off");
    let mut pids = [one.pid(), other.pid()];
    pids.sort_unstable();
    // Just after its start, a process has no command line yet.
    until("two QEMUs", || domains::find(&scratch.name).is_err());
    match domains::find(&scratch.name) {
        Err(DomainError::SeveralOfThatName { pids: found, .. }) => assert_eq!(found, pids),
        found => panic!("{found:?}"),
    }
    drop(one);
    assert_eq!(domains::find(&scratch.name).unwrap().pid, other.pid());
}

#[test]
fn a_domain_without_a_socket_for_qmp_is_refused() {
    let scratch = Scratch::new();
    let _qemu = scratch.qemu("-name NAME -monitor unix:DIR/people,server=on,wait=off");
    let is_missing = |found: &Result<_, _>| matches!(found, Err(DomainError::NoneOfThatName { .. }));
    until("QEMU", || !is_missing(&domains::find(&scratch.name)));
    let error = domains::find(&scratch.name).unwrap_err();
    assert!(matches!(&error, DomainError::NoQmpSocket { .. }), "{error}");
    assert!(error.to_string().contains("has no QMP monitor"), "{error}");
}

#[test]
fn a_binary_that_was_replaced_under_a_running_guest_is_marked() {
    let scratch = Scratch::new();
    let path = scratch.path(QEMU);
    fs::copy(Path::new("/usr/bin").join(QEMU), &path).unwrap();
    let mut command = Command::new(&path);
    command.arg0("kvm");
    let _qemu = scratch.run(command, "-name NAME -qmp unix:DIR/q,server=on,wait=off");
    scratch.domain(1);
    fs::remove_file(&path).unwrap();
    let binary = scratch.domain(1).binary.unwrap();
    assert_eq!((binary.path, binary.deleted), (path, true));
}

#[test]
fn a_socket_in_another_mount_namespace_is_reached_through_the_process() {
    let scratch = Scratch::new();
    fs::create_dir(scratch.path("inside")).unwrap();
    let mut command = Command::new("unshare");
    command.args([
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        "mount -t tmpfs none inside && exec \"$@\"",
        "sh",
        QEMU,
    ]);
    let qemu = scratch.run(
        command,
        "-name NAME -qmp unix:DIR/inside/q,server=on,wait=off -qmp unix:inside/r,server=on,wait=off",
    );
    let domain = scratch.domain(2);
    assert!(!scratch.path("inside/q").exists());
    for path in domain.qmp_paths() {
        assert!(path.starts_with(format!("/proc/{}", qemu.pid())), "{}", path.display());
        assert_eq!(name_at(path), scratch.name);
    }
}

#[test]
fn the_process_that_tears_a_guest_down_later_is_no_second_domain() {
    let scratch = Scratch::new();
    let qemu = scratch.qemu("-name NAME -run-with async-teardown=on -qmp unix:DIR/q,server=on,wait=off");
    assert_eq!(scratch.domain(1).pid, qemu.pid());
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", qemu.pid())).unwrap();
    assert_ne!(children, "", "QEMU has its helper");
}

#[test]
fn processes_that_vanish_while_they_are_read_do_no_harm() {
    let scratch = Scratch::new();
    let stop = AtomicBool::new(false);
    let churn = || {
        while !stop.load(Ordering::Relaxed) {
            // Ends at once: there is no such machine.
            let mut command = Command::new(QEMU);
            command
                .args(["-machine", "absent", "-name", &scratch.name])
                .stderr(Stdio::null());
            command.status().unwrap();
        }
    };
    thread::scope(|scope| {
        scope.spawn(churn);
        for _ in 0..200 {
            domains::all().unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    let error = domains::find(&scratch.name).unwrap_err();
    assert!(matches!(&error, DomainError::NoneOfThatName { .. }), "{error}");
}
