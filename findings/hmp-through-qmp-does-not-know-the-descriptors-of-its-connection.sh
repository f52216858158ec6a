#!/bin/sh
# A descriptor that a QMP connection handed to QEMU is unknown to `human-monitor-command` on that very connection.
#
# Seen with QEMU 10.0.2 (Debian bookworm-backports), 2026-11-28.
# `getfd` gives a name to a descriptor that came with the message. QMP commands of this connection find it by that name. A command line that
# goes through `human-monitor-command` on the same connection runs in a monitor of its own, whose table of descriptors is empty. What only
# the human monitor can do (`gdbserver unix:fd=NAME`) can't be given a descriptor so. The way round: make a character device from the descriptor by
# `chardev-add` in QMP, and name that device.
#
# Guess: one connection, one table.
# Output seen:
#     human monitor: Error: File descriptor named 'handed' has not been found
#     QMP: {'return': {}}
#
# Needs Debian 12, apt with bookworm-backports, python3. Installs nothing: unpacks the packages in a temporary folder, and removes it.
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

listener = socket.socket(socket.AF_UNIX)
listener.bind("listener")
listener.listen()
start([])
assert ask("getfd", fd=listener.fileno(), fdname="handed") == {"return": {}}
by_hmp = monitor("chardev-add socket,id=a,fd=handed,server=on,wait=off")
address = {"type": "fd", "data": {"str": "handed"}}
by_qmp = ask("chardev-add", id="b", backend={"type": "socket", "data": {"addr": address, "server": True, "wait": False}})
print("human monitor:", by_hmp)
print("QMP:", by_qmp)
end("has not been found" in by_hmp and by_qmp == {"return": {}})
END
