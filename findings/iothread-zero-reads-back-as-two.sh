#!/bin/sh
# A QEMU 11.1 takes the value 0 for an iothread's poll-grow and poll-shrink, says nothing, and tells 2 from then on.
#
# Seen with QEMU 10.0.13 (Debian trixie) and 11.1.3 (trixie-backports), 2026-11-28.
# Zero leaves the choice to QEMU, in both. 10.0 tells the zero that it was given, and zero where nobody gave one; 11.1 tells what it chose. So whoever sets
# what the old process told, and reads it back to be sure, as one does who moves a guest into a newer QEMU, never finds it.
#
# Guess: what was set is what is told.
# Output seen:
#     10.0: poll-grow 0 poll-shrink 0, after setting 0: poll-grow 0 poll-shrink 0
#     11.1: poll-grow 2 poll-shrink 2, after setting 0: poll-grow 2 poll-shrink 2
#
# Needs apt with Debian's archive keys, and python3. Installs nothing: unpacks the packages in a temporary folder, and removes it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
cd "$work"
mkdir -p lists/partial packages/partial
: >none # no package counts as installed, so apt brings all that QEMU needs
printf 'deb http://deb.debian.org/debian %s main\n' trixie trixie-backports >sources.list
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$work/lists" \
        -o Dir::State::status="$work/none" -o Dir::Cache="$work" -o Dir::Cache::archives="$work/packages" -o APT::Sandbox::User=root "$@" \
        >apt.log 2>&1 || { cat apt.log; echo "the packages cannot be had"; exit 2; }
}
apt update
for version in '1:10.0.13+ds-0+deb13u1' '1:11.1.3+ds-1~bpo13+1'; do
    rm -f packages/*.deb
    apt -y --download-only --no-install-recommends install "qemu-system-x86=$version" "qemu-system-common=$version" "qemu-system-data=$version"
    for package in packages/*.deb; do dpkg-deb -x "$package" "${version#1:}"; done
done
python3 - <<'END'
import glob, json, subprocess, sys

def values(folder):
    libraries = f"{folder}/usr/lib/x86_64-linux-gnu"
    loader = f"{libraries}/ld-linux-x86-64.so.2"
    line = [loader, "--library-path", libraries, f"{folder}/usr/bin/qemu-system-x86_64", "-machine", "none", "-nodefaults"]
    line += ["-display", "none", "-object", "iothread,id=io0", "-qmp", "stdio"]
    qemu = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    qemu.stdout.readline()

    def ask(command, **arguments):
        print(json.dumps({"execute": command, "arguments": arguments}), file=qemu.stdin, flush=True)
        return json.loads(qemu.stdout.readline())["return"]

    def told():
        thread = ask("query-iothreads")[0]
        return thread["poll-grow"], thread["poll-shrink"]

    ask("qmp_capabilities")
    first = told()
    for name in ["poll-grow", "poll-shrink"]:
        assert ask("qom-set", path="/objects/io0", property=name, value=0) == {}
    second = told()
    qemu.kill()
    qemu.wait()
    return first, second

found = {}
for folder in sorted(glob.glob("1*")):
    version = folder[:4]
    found[version] = values(folder)
    (grow, shrink), (grow_after, shrink_after) = found[version]
    print(f"{version}: poll-grow {grow} poll-shrink {shrink}, after setting 0: poll-grow {grow_after} poll-shrink {shrink_after}")
as_seen = found == {"10.0": ((0, 0), (0, 0)), "11.1": ((2, 2), (2, 2))}
print("as seen" if as_seen else "NOT as seen")
sys.exit(0 if as_seen else 1)
END
