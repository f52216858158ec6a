#!/bin/sh
# A QEMU that only starts, and runs no guest, breaks the network of another one that holds the same tap.
#
# Seen with QEMU 10.0.2 (Debian bookworm-backports), 2026-11-28.
# A tap has one length of its virtio-net header, kept in the kernel for the whole device, not for each open file. The QEMU that the
# guest runs in has set 12 bytes, as a modern driver asks for. A second QEMU, which gets the same tap by descriptor, as one does that is started to
# take the guest over, sets 10 bytes while it creates its card: before any migration, with -S, and without a driver. It does not set the
# 12 bytes back when it ends. From then on the first one and the kernel cut each packet at different places.
#
# Guess: a device that was never started leaves the tap alone.
# Output seen:
#     header before: 12 bytes
#     header while a second QEMU waits in -S: 10 bytes
#     header after it ended: 10 bytes
#
# Needs Debian 12, apt with bookworm-backports, python3, root and /dev/net/tun. Installs nothing: unpacks the packages in a temporary folder, and removes it.
set -eu
VERSION='1:10.0.2+ds-2+deb13u1~bpo12+1'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
cd "$work"
mkdir -p packages/partial
: >none # no package counts as installed, so apt brings all that QEMU needs
apt-get -qq -y --download-only --no-install-recommends -t bookworm-backports -o Dir::State::status="$work/none" \
    -o Dir::Cache::archives="$work/packages" -o APT::Sandbox::User=root install "qemu-system-x86=$VERSION" >apt.log 2>&1 ||
    { cat apt.log; echo "the packages cannot be had"; exit 2; }
for package in packages/*.deb; do
    case $package in */libc6_*) continue ;; esac # the loader's own
    dpkg-deb -x "$package" root
done
export LD_LIBRARY_PATH="$work/root/usr/lib/x86_64-linux-gnu:$work/root/lib/x86_64-linux-gnu"
QEMU="$work/root/usr/bin/qemu-system-x86_64 -L $work/root/usr/share/qemu -L $work/root/usr/share/seabios -nodefaults -display none -machine q35 -m 64 -S"
export QEMU
python3 - <<'END'
import array, json, os, socket, subprocess, sys, time

def start(arguments, **how):
    global process, stream, link
    process = subprocess.Popen(os.environ["QEMU"].split() + ["-qmp", "unix:qmp,server=on,wait=off"] + arguments, **how)
    for _ in range(600):
        try:
            link = socket.socket(socket.AF_UNIX)
            link.connect("qmp")
            break
        except OSError:
            time.sleep(0.05)
    stream = link.makefile("r")
    greeting = json.loads(stream.readline())["QMP"]["version"]
    print("QEMU", greeting["package"])
    ask("qmp_capabilities")

def ask(command, fd=None, **arguments):
    data = json.dumps({"execute": command, "arguments": arguments}).encode()
    rights = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    link.sendmsg([data], rights)
    while True:
        answer = json.loads(stream.readline())
        if "event" not in answer:
            return answer

def monitor(line):
    return ask("human-monitor-command", **{"command-line": line})["return"].strip()

def end(as_seen):
    process.kill()
    process.wait()
    print("as seen" if as_seen else "NOT as seen")
    sys.exit(0 if as_seen else 1)

import fcntl, struct

# Numbers of linux/if_tun.h.
TUNSETIFF, TUNGETVNETHDRSZ, TUNSETVNETHDRSZ = 0x400454CA, 0x800454D7, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x2, 0x1000, 0x4000

tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", b"finding%d", IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
fcntl.ioctl(tap, TUNSETVNETHDRSZ, struct.pack("i", 12))

def header():
    return struct.unpack("i", fcntl.ioctl(tap, TUNGETVNETHDRSZ, struct.pack("i", 0)))[0]

before = header()
start(["-netdev", f"tap,id=n,fd={tap}", "-device", "virtio-net-pci,netdev=n,romfile="], pass_fds=[tap])
waiting = header()
process.kill()
process.wait()
after = header()
print(f"header before: {before} bytes")
print(f"header while a second QEMU waits in -S: {waiting} bytes")
print(f"header after it ended: {after} bytes")
end((before, waiting, after) == (12, 10, 10))
END
