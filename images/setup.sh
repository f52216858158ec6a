#!/bin/sh
# Makes a Debian 12 (bookworm) machine fit for vmpatch's demo and tests: the package sources that hold the kernels, QEMU,
# and what building a guest and a livepatch module takes. Safe to run again; where nothing is missing it changes nothing.
#
# Kernels of other Debian releases are only downloaded: their sources are pinned so low that apt upgrades nothing from them.
#
# usage: images/setup.sh     as root, or as a user who may use sudo
set -eu

release=bookworm
qemu_major=10
packages='busybox-static iproute2 xz-utils zstd util-linux gcc-12 libc6-dev make patch flex bison bc libelf-dev libssl-dev dwarves patchelf'
# The daemons are not needed as services: the tests start them where they do not run.
packages="$packages libvirt-daemon libvirt-daemon-driver-qemu libvirt-daemon-system libvirt-clients"
# Other releases, whose kernels and compilers are downloaded and unpacked, never installed.
other_releases='bullseye bullseye-security trixie trixie-backports sid'

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

# The kernels and gcc-12 must be this release's own, so no other release will do.
. /etc/os-release
[ "${VERSION_CODENAME:-}" = "$release" ] || die "needs Debian 12 ($release); this is ${PRETTY_NAME:-an unknown system}"

if [ "$(id -u)" -eq 0 ]; then
    as_root() { env DEBIAN_FRONTEND=noninteractive "$@"; }
else
    command -v sudo >/dev/null || die 'needs root: run it as root, or install sudo'
    as_root() { sudo env DEBIAN_FRONTEND=noninteractive "$@"; }
fi

# "URI suite" for each package list that the machine's apt is set up for.
configured=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE)' 'Identifier: Packages' | sort -u)

# uri_of SUITE DEFAULT: where the machine gets SUITE from already, so that a mirror it was given is kept to.
uri_of() {
    uri=$(echo "$configured" | awk -v suite="$1" '$2 == suite { print $1; exit }')
    echo "${uri:-$2}"
}

missing_suites() {
    for suite in "$release" "$release-updates" "$release-security" "$release-backports" $other_releases; do
        echo "$configured" | awk -v suite="$suite" '$2 == suite { found = 1 } END { exit !found }' || echo "$suite"
    done
}

# deb822 paragraph for one suite; security has an archive of its own.
source_paragraph() {
    case $1 in
        *-security) uri=$(uri_of "$1" http://deb.debian.org/debian-security) ;;
        *) uri=$(uri_of "$release" http://deb.debian.org/debian) ;;
    esac
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$1"
    printf 'Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n'
}

is_installed() { dpkg-query -W -f '${db:Status-Status}\n' "$1" 2>/dev/null | grep -qx installed; }

# The pin of one other release: 1 is below every package of the machine's own release, and below all that is installed
# (apt_preferences(5)).
pin_paragraph() { printf 'Package: *\nPin: release n=%s\nPin-Priority: 1\n\n' "$1"; }

is_other() {
    for suite in $other_releases; do [ "$suite" != "$1" ] || return 0; done
    return 1
}

missing_packages() {
    for package in $packages; do is_installed "$package" || echo "$package"; done
}

qemu_is_recent() {
    is_installed qemu-system-x86 &&
        dpkg --compare-versions "$(dpkg-query -W -f '${Version}' qemu-system-x86)" ge "1:$qemu_major"
}

# Kernels are downloaded by name later on, so apt must have read the lists that name them.
lists_are_read() {
    sources='linux-source-5.10 linux-source-6.1 linux-source-6.12 linux-source-7.2 linux-source-7.3'
    [ "$(apt-cache show --no-all-versions $sources 2>/dev/null | grep -c '^Package: ')" -eq 5 ]
}

suites=$(missing_suites)
wanted=$(missing_packages)
if [ -z "$suites$wanted" ] && qemu_is_recent && lists_are_read; then
    say 'nothing to do'
    exit 0
fi

if [ -n "$suites" ]; then
    say "adding package sources:" $suites
    # Pinned before they are there: no apt run may ever see them without.
    for suite in $suites; do
        if is_other "$suite"; then pin_paragraph "$suite"; fi
    done | as_root tee -a /etc/apt/preferences.d/vmpatch.pref >/dev/null
    for suite in $suites; do source_paragraph "$suite"; done |
        as_root tee -a /etc/apt/sources.list.d/vmpatch.sources >/dev/null
fi

apt_get() { as_root apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"; }

say 'reading package lists'
apt_get update
if [ -n "$wanted" ]; then
    say 'installing:' $wanted
    apt_get install --no-install-recommends $wanted
fi
# qemu-utils, where present, depends on the very version of its siblings: the whole family comes from one suite.
if ! qemu_is_recent; then
    say "installing: qemu-system-x86 from $release-backports"
    apt_get install --no-install-recommends -t "$release-backports" qemu-system-x86
fi
say 'done'
