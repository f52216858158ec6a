#!/bin/sh
# `gdbserver none` removes the character device that its user made, and leaves the one that QEMU made.
#
# Seen with QEMU 10.0.2 (Debian bookworm-backports), 2026-11-28.
# A GDB stub can be opened on a character device that exists (`gdbserver chardev:ID`). QEMU makes a second device beside it, with a generated
# name, for the stub's own monitor. `gdbserver none` removes the user's device, which he did not ask for and may want to use again, and
# leaves its own for as long as the process lives. There is just one of that, however often the stub is opened again.
#
# Guess: what `gdbserver` made goes, and what it was given stays.
# Output seen, labels of `query-chardev` without the monitor's own:
#     at first: []
#     with the user's device: ['mine']
#     with the stub: ['#chrNNN', 'mine']
#     after gdbserver none: ['#chrNNN']
#     after opening and closing it again: ['#chrNNN']
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

def devices():
    import re
    labels = [device["label"] for device in ask("query-chardev")["return"]]
    return sorted(re.sub("[0-9]+", "NNN", label) for label in labels if not label.startswith("compat_monitor"))

def add():
    address = {"type": "unix", "data": {"path": "stub"}}
    socket_device = {"addr": address, "server": True, "wait": False}
    ask("chardev-add", id="mine", backend={"type": "socket", "data": socket_device})

start([])
seen = [("at first", devices())]
add()
seen.append(("with the user's device", devices()))
monitor("gdbserver chardev:mine")
seen.append(("with the stub", devices()))
monitor("gdbserver none")
seen.append(("after gdbserver none", devices()))
os.unlink("stub") if os.path.exists("stub") else None
add()
monitor("gdbserver chardev:mine")
monitor("gdbserver none")
seen.append(("after opening and closing it again", devices()))
for when, labels in seen:
    print(f"{when}: {labels}")
expected = [[], ["mine"], ["#chrNNN", "mine"], ["#chrNNN"], ["#chrNNN"]]
end([labels for _, labels in seen] == expected)
END
