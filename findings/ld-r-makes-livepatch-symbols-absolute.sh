#!/bin/sh
# `ld -r` makes the livepatch symbols of a finished livepatch module absolute and its livepatch relocations plain data, and says nothing.
#
# Seen with binutils 2.40 (Debian bookworm) and 2.44 (trixie), 2026-11-28.
# Such a module has symbols with the section index SHN_LIVEPATCH, and relocations in sections with the flag SHF_RELA_LIVEPATCH (the kernel's
# Documentation/livepatch/module-elf-format.rst). strip and objcopy of the same release keep both. ld copies the bytes of the relocations into a section of type
# LOOS+4, and their symbols get the index SHN_ABS with the value 0. So whoever links a finished module with something else has calls in it that nobody relocates.
#
# Guess: kept, or refused.
# Output seen, with both releases:
#     strip: symbol OS [0xff20], relocations RELA
#     ld -r: symbol ABS, relocations LOOS+0x4
#
# Needs apt with Debian's archive keys, and python3. Installs nothing: unpacks the packages in a temporary folder, and removes it.
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT INT TERM
cd "$work"
mkdir -p lists/partial packages/partial
: >none # no package counts as installed, so apt brings all that binutils needs
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=- -o Dir::State::lists="$work/lists" \
        -o Dir::State::status="$work/none" -o Dir::Cache="$work" -o Dir::Cache::archives="$work/packages" -o APT::Sandbox::User=root "$@" \
        >apt.log 2>&1 || { cat apt.log; echo "the packages cannot be had"; exit 2; }
}
for release in bookworm=2.40-2 trixie=2.44-3; do
    printf 'deb http://deb.debian.org/debian %s main\n' "${release%=*}" >sources.list
    rm -f packages/*.deb
    apt update
    apt -y --download-only --no-install-recommends install "binutils=${release#*=}"
    for package in packages/*.deb; do dpkg-deb -x "$package" "${release#*=}"; done
done
python3 - <<'END'
import pathlib, re, struct, subprocess, sys

SHN_LIVEPATCH, SHF_RELA_LIVEPATCH, SHF_INFO_LINK, SHF_ALLOC, SHT_RELA, R_X86_64_PLT32 = 0xFF20, 0x100000, 0x40, 2, 4, 4
SYMBOL, RELOCATIONS = ".klp.sym.vmlinux.other,0", ".klp.rela.vmlinux..text"
SOURCE = f"""
    .text
    .byte 0xe8, 0, 0, 0, 0
    call another
    .globl "{SYMBOL}"
    .section {RELOCATIONS}, "a", @progbits
    .balign 8
    .quad 0, 0, 0
    .data
    .quad "{SYMBOL}"
"""

def tool(folder, name, *arguments):
    libraries = f"{folder}/usr/lib/x86_64-linux-gnu"
    line = [f"{libraries}/ld-linux-x86-64.so.2", "--library-path", libraries, f"{folder}/usr/bin/x86_64-linux-gnu-{name}"]
    if not pathlib.Path(line[0]).exists():
        line[0] = f"{folder}/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
        line[2] += f":{folder}/lib/x86_64-linux-gnu"
    return subprocess.run([*line, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout

def make(path):
    """Gives the object what the format of livepatch modules asks for: one symbol, one relocation of .text by it."""
    data = bytearray(path.read_bytes())
    start, = struct.unpack_from("<Q", data, 40)
    count, names_at = struct.unpack_from("<HH", data, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, start + 64 * i) for i in range(count)]
    def text(table, offset):
        at = headers[table][4] + offset
        return data[at:data.index(0, at)].decode()
    names = [text(names_at, header[0]) for header in headers]
    symbols = headers[names.index(".symtab")]
    # The relocation in .data was there only to have the symbol in the table.
    struct.pack_into("<I", data, start + 64 * names.index(".rela.data") + 4, 0)
    for i in range(symbols[5] // 24):
        at = symbols[4] + 24 * i
        if text(symbols[6], struct.unpack_from("<I", data, at)[0]) == SYMBOL:
            struct.pack_into("<H", data, at + 6, SHN_LIVEPATCH)
            index = i
    section = names.index(RELOCATIONS)
    at = start + 64 * section
    struct.pack_into("<IQ", data, at + 4, SHT_RELA, SHF_RELA_LIVEPATCH | SHF_INFO_LINK | SHF_ALLOC)
    struct.pack_into("<II", data, at + 40, names.index(".symtab"), names.index(".text"))
    struct.pack_into("<Q", data, at + 56, 24)
    struct.pack_into("<QIIq", data, headers[section][4], 1, R_X86_64_PLT32, index, -4)
    path.write_bytes(data)

def seen(folder, path):
    lines = tool(folder, "readelf", "-SsW", path).splitlines()
    symbol = next(line for line in lines if line.endswith(SYMBOL))
    section = next(line for line in lines if RELOCATIONS in line and "[" in line)
    symbol = re.search(r"DEFAULT +(.*?) +\.klp", symbol)[1]
    return f"symbol {symbol}, relocations {section.split(RELOCATIONS)[1].split()[0]}"

expected = {"strip": "symbol OS [0xff20], relocations RELA", "ld -r": "symbol ABS, relocations LOOS+0x4"}
for folder in ["2.40-2", "2.44-3"]:
    pathlib.Path("module.s").write_text(SOURCE)
    tool(folder, "as", "module.s", "-o", "module.o")
    make(pathlib.Path("module.o"))
    tool(folder, "strip", "-g", "module.o", "-o", "stripped.o")
    tool(folder, "ld", "-r", "module.o", "-o", "linked.o")
    found = {"strip": seen(folder, "stripped.o"), "ld -r": seen(folder, "linked.o")}
    print(folder, *(f"{name}: {text}" for name, text in found.items()), sep="\n    ")
    if found != expected:
        sys.exit("not what was seen before")
END
