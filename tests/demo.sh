#!/bin/bash
# vmpatch's main job, shown: boots a real Debian guest, shows two published flaws of its kernel, patches them from outside while
# the guest runs, and takes the patches out again. Takes a Debian 12 machine with Rust, as root or with sudo.
#
# usage: tests/demo.sh
set -euo pipefail
cd "$(dirname "$0")/.."
images/setup.sh
exec cargo run --quiet --release --package e2e --bin demo
