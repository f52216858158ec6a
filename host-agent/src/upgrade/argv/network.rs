//! Network backends: what the new process can make or inherit is carried over, what lives in the old one is refused.

use super::keyed::Keyed;
use super::{Refused, Rewriter};

const SEVERAL_QUEUES: &str = "QEMU detaches the queues of a tap that the guest does not use, and a new one can't take over such a \
                              queue; start the guest with one queue";

/// Whether a key has a time above 0.
fn is_some_time(backend: &Keyed, key: &str) -> bool {
    let number = backend.text(key).and_then(|text| text.parse::<u64>().ok());
    number.is_some_and(|number| number > 0)
}

impl Rewriter<'_> {
    /// A `-netdev` or `-nic`.
    pub(super) fn network(&mut self, option: &str, text: &[u8]) -> Result<Vec<u8>, Refused> {
        let mut backend = Keyed::parse(text, "type");
        let refuse = |reason: &str| Err(Refused::new(option, text, reason));
        match backend.text("type").unwrap_or_default().as_str() {
            "none" | "hubport" | "bridge" => return Ok(text.to_vec()),
            "tap" => self.tap(option, text, &mut backend)?,
            "socket" if backend.text("mcast").is_some() => {}
            // Only with this the new process tries again once the old one has hung up. Its name since QEMU 9.2: `reconnect-ms`.
            "stream"
                if !backend.is_on("server")
                    && ["reconnect", "reconnect-ms"]
                        .iter()
                        .any(|key| is_some_time(&backend, key)) => {}
            "stream" if !backend.is_on("server") => {
                return refuse(
                    "the other end talks to the old process alone, and this one would not connect again; start the guest with \
                     reconnect= (QEMU 9.2 and later: reconnect-ms=), or use a tap",
                );
            }
            "socket" | "stream" | "dgram" => {
                return refuse(
                    "the other end is connected to the old process; use a tap, or `stream` as a client with reconnect=",
                );
            }
            "user" => return refuse("the guest's connections live in the old process; use a tap or a bridge"),
            "vhost-user" | "vhost-vdpa" => return refuse("its backend serves one process alone"),
            _ => return refuse("this kind of network is not known"),
        }
        Ok(backend.render())
    }

    /// A tap device can have one owner. Both processes hold the same one for a while; only the one whose guest runs uses it.
    fn tap(&mut self, option: &str, text: &[u8], backend: &mut Keyed) -> Result<(), Refused> {
        for key in ["fd", "fds", "vhostfd", "vhostfds"] {
            for number in backend.text(key).iter().flat_map(|numbers| numbers.split(':')) {
                self.hand_on(option, text, number)?;
            }
        }
        // Of those that are detached the kernel tells no name (`drivers/net/tun.c`, `tun_chr_show_fdinfo`), so they are not among the taps.
        let queues = backend.text("queues").and_then(|text| text.parse().ok());
        if queues.is_some_and(|queues: u32| queues > 1)
            || backend.text("fds").is_some_and(|numbers| numbers.contains(':'))
        {
            return Err(Refused::new(option, text, SEVERAL_QUEUES));
        }
        if backend.text("fd").or(backend.text("fds")).is_some() {
            return Ok(());
        }
        let interface = backend.text("ifname");
        let taps = &self.context.taps;
        let found: Vec<i32> = match &interface {
            Some(interface) => {
                let ours = taps.iter().filter(|tap| tap.interface == *interface);
                ours.map(|tap| tap.descriptor).collect()
            }
            None if taps.iter().all(|tap| Some(tap) == taps.first()) => {
                taps.first().map(|tap| tap.descriptor).into_iter().collect()
            }
            None => {
                return Err(Refused::new(
                    option,
                    text,
                    "it is not known which interface it is; name it with ifname=",
                ));
            }
        };
        let numbers: Vec<String> = found.iter().map(i32::to_string).collect();
        match numbers.as_slice() {
            [] => {
                return Err(Refused::new(
                    option,
                    text,
                    "the old process does not hold that interface",
                ));
            }
            [one] => backend.set("fd", one),
            _ => return Err(Refused::new(option, text, SEVERAL_QUEUES)),
        }
        // These are for making the interface and for taking it away.
        for key in [
            "ifname",
            "script",
            "downscript",
            "br",
            "helper",
            "queues",
            "sndbuf",
            "vnet_hdr",
        ] {
            backend.remove(key);
        }
        self.result.descriptors.extend(found);
        Ok(())
    }
}
