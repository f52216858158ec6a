#!/bin/sh
# Guest memory can lie in a RAM block that has no name, and two such blocks cannot be told apart in x-query-ramblock.
#
# Seen with QEMU 10.0.2 (Debian bookworm-backports), 2026-11-28.
# A memory backend gets its block's name from the device that takes it: machine memory is "pc.ram" (or the backend's id), virtio-mem's is the
# PCI address with the backend's id behind it. Memory of a virtio-pmem device is in the guest's physical address space all the same, and has
# an empty name; so has a backend that nobody took yet, which is not in it. A reader that splits a line at spaces takes the page size
# for the name, and nothing in the line says which of the two blocks the guest sees.
#
# Guess: a block's name is its backend's id, and no block is without one.
# Output seen, first column by its width (an empty one shown as '-'):
#     names: - - /rom@etc/acpi/rsdp /rom@etc/acpi/tables /rom@etc/table-loader 0000:00:01.0/vmem pc.bios pc.ram pc.rom
#     guest-physical: persistent memory of 2 MiB at 0x108000000
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

open("pmem", "wb").truncate(2 << 20)
start(
    ["-m", "64,maxmem=1G,slots=4"]
    + ["-object", "memory-backend-ram,id=vmem,size=128M", "-device", "virtio-mem-pci,id=vm0,memdev=vmem"]
    + ["-object", "memory-backend-file,id=pm,mem-path=pmem,share=on,size=2M", "-device", "virtio-pmem-pci,id=p0,memdev=pm"]
    + ["-object", "memory-backend-ram,id=unused,size=2M"]
)
lines = ask("x-query-ramblock")["return"]["human-readable-text"].splitlines()
width = lines[0].index("Block Name") + len("Block Name")
names = sorted(line[:width].strip() for line in lines[1:] if line.strip())
print("names:", *(name or "-" for name in names))
persistent = [device["data"] for device in ask("query-memory-devices")["return"] if device["type"] == "virtio-pmem"]
for device in persistent:
    print(f"guest-physical: persistent memory of {device['size'] >> 20} MiB at {device['memaddr']:#x}")
end(names.count("") == 2 and "0000:00:01.0/vmem" in names and len(persistent) == 1)
END
