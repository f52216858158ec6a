//! A guest that is busy, seen from outside: a network interface and a disk of its own, work that checks itself, and somebody at
//! the other end of a TCP connection who notices every pause.

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use images::guest::{Guest, GuestConfig};

/// Bytes of the disk: as many as the program in the guest writes.
const DISK: &str = "4M";
/// The port at which the guest echoes.
const PORT: u16 = 7;
/// Where the guest leaves what the work has done.
const RESULT: &str = "/tmp/load";
/// Between two echoes.
const BEAT: Duration = Duration::from_millis(1);
/// How long an echo may take; a TCP connection whose packets are lost again and again, as a guest moves, takes half a minute.
const ECHO_LIMIT: Duration = Duration::from_secs(120);
/// How long a guest is tried to be reached in one go, and in all.
const REACH_TIME: Duration = Duration::from_millis(200);
const REACH_LIMIT: Duration = Duration::from_secs(5);
/// How long the guest may take to end its work.
const END_LIMIT: Duration = Duration::from_secs(20);

/// A tap device with an address of the host, and a disk image. Both are gone when it is dropped.
pub struct Outfit {
    number: u32,
    folder: PathBuf,
}

impl Outfit {
    /// Makes both. Takes root's rights, as the tests have them.
    ///
    /// # Panics
    ///
    /// If they can't be made.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // More than one process uses at a time: others make their outfits while a long test keeps its own.
        let number = std::process::id() % 500 * 32 + COUNT.fetch_add(1, Ordering::Relaxed) % 32;
        let folder = std::env::temp_dir().join(format!("vmpatch-load-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder can be made");
        let outfit = Self { number, folder };
        run("qemu-img", &["create", "-q", "-f", "qcow2", &outfit.disk(), DISK]);
        let interface = outfit.interface();
        let _ = Command::new("ip").args(["link", "del", &interface]).output();
        run("ip", &["tuntap", "add", "mode", "tap", &interface]);
        run(
            "ip",
            &["addr", "add", &format!("{}/30", outfit.address(1)), "dev", &interface],
        );
        run("ip", &["link", "set", &interface, "up"]);
        outfit
    }

    /// A guest with the tap at a network card of that model, for which it needs that module.
    pub fn fit_card(&self, config: GuestConfig, model: &str, module: &str) -> GuestConfig {
        let netdev = format!("tap,id=net0,ifname={},script=no,downscript=no", self.interface());
        let card = format!("{model},netdev=net0,id=card0");
        let words = ["-netdev", &netdev, "-device", &card];
        let config = config.module(module);
        words.iter().fold(config, |config, word| config.qemu_arg(word))
    }

    /// A guest with both.
    pub fn fit(&self, config: GuestConfig) -> GuestConfig {
        let drive = format!("file={},if=none,id=disk0,format=qcow2,cache=none", self.disk());
        self.fit_card(config, "virtio-net-pci", "virtio_net")
            .module("virtio_blk")
            .qemu_arg("-drive")
            .qemu_arg(&drive)
            .qemu_arg("-device")
            .qemu_arg("virtio-blk-pci,drive=disk0,id=block0")
    }

    /// Starts work in the guest: writing that much memory, the disk, and echoing.
    ///
    /// # Panics
    ///
    /// If the guest can't.
    pub fn start_work(&self, guest: &Guest, mib: u32) {
        self.start_load(guest, mib, "/dev/vda");
    }

    /// Starts the echo alone in a guest that is idle otherwise.
    ///
    /// # Panics
    ///
    /// If the guest can't.
    pub fn start_echo(&self, guest: &Guest) {
        self.start_load(guest, 0, "-");
    }

    fn start_load(&self, guest: &Guest, mib: u32, disk: &str) {
        let address = self.address(2);
        let script = format!(
            "(ip addr show dev eth0 | grep -q {address}/ || ip addr add {address}/30 dev eth0) && ip link set eth0 up && \
             (setsid /opt/load {mib} {disk} {PORT} >{RESULT} 2>&1 </dev/null & echo $! >{RESULT}.pid) && \
             until grep -q started {RESULT}; do sleep 0.1; done"
        );
        guest.text(&["sh", "-c", &script]).expect("the guest starts to work");
    }

    /// Ends it, and gives what it says: whether anything was wrong with what it wrote, and how much that was.
    ///
    /// # Panics
    ///
    /// If it has ended before, or finds anything wrong.
    pub fn end_work(&self, guest: &Guest) -> Vec<u64> {
        let script = format!("kill -TERM $(cat {RESULT}.pid) && until grep memory {RESULT}; do sleep 0.1; done");
        let request = guest.command(&["sh", "-c", &script]).limit(END_LIMIT);
        let text = request.text().expect("the work in the guest went on to its end");
        let numbers: Vec<u64> = text.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        assert!(matches!(numbers[..], [_, 0, _, 0]), "wrong: {text}");
        numbers
    }

    /// Somebody who talks to the guest from now on.
    ///
    /// # Panics
    ///
    /// If the guest does not answer.
    pub fn talk(&self) -> Talk {
        Talk::start(&self.address(2))
    }

    /// A thousand datagrams a second to the guest and back, from now on.
    ///
    /// # Panics
    ///
    /// If the host can't send any.
    pub fn beat(&self) -> Beat {
        Beat::start(&self.address(2)).expect("the host sends datagrams")
    }

    /// Demands that the guest is reached over its network.
    ///
    /// # Panics
    ///
    /// If no datagram comes back.
    #[track_caller]
    pub fn assert_reached(&self, context: &str) {
        let deadline = Instant::now() + REACH_LIMIT;
        loop {
            let beat = self.beat();
            thread::sleep(REACH_TIME);
            let gap = beat.end();
            if gap.heard > 0 {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "none of {} datagrams came back: {context}",
                gap.sent
            );
        }
    }

    /// The image of the disk.
    pub fn disk(&self) -> String {
        self.folder.join("disk.qcow2").display().to_string()
    }

    /// The folder of both, for what else a test needs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The tap device.
    pub fn interface(&self) -> String {
        format!("vmp{}", self.number)
    }

    fn address(&self, host: u32) -> String {
        // A network of four addresses for each.
        let at = self.number * 4 + host;
        format!("10.231.{}.{}", at >> 8 & 0xff, at & 0xff)
    }
}

impl Default for Outfit {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Outfit {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.interface()]).output();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// A thousand echoes a second on one connection.
pub struct Talk {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<Silence>>,
}

/// How a connection fared.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    /// Echoes that came back, all in their order.
    pub echoes: u64,
    /// The longest time from a word to its echo.
    pub longest: Duration,
}

impl Talk {
    fn start(address: &str) -> Self {
        let deadline = Instant::now() + ECHO_LIMIT;
        let stream = loop {
            match TcpStream::connect((address, PORT)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= deadline => panic!("{address}: {error}"),
                Err(_) => thread::sleep(Duration::from_millis(50)),
            }
        };
        let ended = Arc::new(AtomicBool::new(false));
        let end = Arc::clone(&ended);
        let thread = thread::spawn(move || talk(stream, &end));
        Self { ended, thread }
    }

    /// Ends it.
    ///
    /// # Panics
    ///
    /// If the connection broke, or an echo was not what was said.
    pub fn end(self) -> Silence {
        self.ended.store(true, Ordering::Relaxed);
        let result = self.thread.join().expect("every echo is what was said");
        result.expect("the connection lasts")
    }
}

/// A thousand datagrams a second, which nobody sends again: how long none came back is how long the guest stood.
pub struct Beat {
    ended: Arc<AtomicBool>,
    socket: UdpSocket,
    sent: JoinHandle<u64>,
    heard: JoinHandle<Gap>,
}

/// How the datagrams fared.
#[derive(Clone, Copy, Debug, Default)]
pub struct Gap {
    /// Those that were sent.
    pub sent: u64,
    /// Those that came back.
    pub heard: u64,
    /// The longest time without one.
    pub longest: Duration,
}

impl Beat {
    fn start(address: &str) -> std::io::Result<Self> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((address, PORT))?;
        // So that the end is noticed.
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let ended = Arc::new(AtomicBool::new(false));
        let (sender, sender_end) = (socket.try_clone()?, Arc::clone(&ended));
        let (receiver, receiver_end) = (socket.try_clone()?, Arc::clone(&ended));
        Ok(Self {
            ended,
            socket,
            sent: thread::spawn(move || send(&sender, &sender_end)),
            heard: thread::spawn(move || hear(&receiver, &receiver_end)),
        })
    }

    /// Ends it.
    ///
    /// # Panics
    ///
    /// If it has panicked.
    pub fn end(self) -> Gap {
        self.ended.store(true, Ordering::Relaxed);
        drop(self.socket);
        let sent = self.sent.join().expect("sending does not panic");
        let gap = self.heard.join().expect("hearing does not panic");
        Gap { sent, ..gap }
    }
}

/// One each beat, by the clock: one that is late does not delay those after it.
fn send(socket: &UdpSocket, end: &AtomicBool) -> u64 {
    let (start, mut sent) = (Instant::now(), 0_u64);
    let mut next = BEAT;
    while !end.load(Ordering::Relaxed) {
        // A paused guest is no failure of the sender.
        sent += u64::from(socket.send(&sent.to_be_bytes()).is_ok());
        thread::sleep(next.saturating_sub(start.elapsed()));
        next += BEAT;
    }
    sent
}

fn hear(socket: &UdpSocket, end: &AtomicBool) -> Gap {
    let mut gap = Gap::default();
    let (mut last, mut bytes) = (None::<Instant>, [0; 8]);
    while !end.load(Ordering::Relaxed) {
        if socket.recv(&mut bytes).is_ok() {
            let now = Instant::now();
            gap.heard += 1;
            gap.longest = gap.longest.max(last.map_or(Duration::ZERO, |last| now - last));
            last = Some(now);
        }
    }
    gap
}

fn talk(mut stream: TcpStream, end: &AtomicBool) -> std::io::Result<Silence> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(ECHO_LIMIT))?;
    let mut silence = Silence {
        echoes: 0,
        longest: Duration::ZERO,
    };
    while !end.load(Ordering::Relaxed) {
        let said = silence.echoes.to_be_bytes();
        let start = Instant::now();
        stream.write_all(&said)?;
        let mut heard = [0; 8];
        stream.read_exact(&mut heard)?;
        assert_eq!(said, heard);
        silence.echoes += 1;
        silence.longest = silence.longest.max(start.elapsed());
        thread::sleep(BEAT.saturating_sub(start.elapsed()));
    }
    Ok(silence)
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}
