#!/bin/bash
# All tests of vmpatch: makes the machine ready, checks the sources' form, builds, and tests; guests are real Debian kernels in
# QEMU. Takes a Debian 12 machine with Rust, as root or with sudo. The last line is "N passed, N failed".
#
# usage: tests/run.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit

passed=0
failed=0
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# step NAME COMMAND…: one check.
step() {
    local name=$1 start=$SECONDS
    shift
    echo "=== $name"
    if "$@"; then
        passed=$((passed + 1))
        echo "=== $name: passed ($((SECONDS - start)) s)"
    else
        failed=$((failed + 1))
        echo "=== $name: FAILED ($((SECONDS - start)) s)"
    fi
}

end() {
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
    exit
}

# Nothing else can pass on a machine that isn't ready, or with sources that don't compile.
step 'set-up' images/setup.sh
[ "$failed" -eq 0 ] || end
step 'format' cargo fmt --check
step 'clippy' cargo clippy --quiet --workspace --all-targets -- -D warnings
step 'vmpatch builds' cargo build --release --package host-agent --bin vmpatch
step 'tests build' cargo test --workspace --no-run
[ "$failed" -eq 0 ] || end

# tests NAME COMMAND…: tests by cargo, each of which counts.
tests() {
    local name=$1 start=$SECONDS status binaries ended tests_passed tests_failed
    shift
    echo "=== $name"
    "$@" 2>&1 | tee "$log"
    status=${PIPESTATUS[0]}
    # Each test binary is announced, and ends with a line: "test result: ok. 3 passed; 0 failed; 0 ignored; …".
    read -r binaries ended tests_passed tests_failed < <(
        awk '/^ +(Running|Doc-tests) / { binaries++ }
             /^test result: / { ended++; for (i = 2; i <= NF; i++) { if ($i == "passed;") passed += $(i - 1); if ($i == "failed;") failed += $(i - 1) } }
             END { print binaries + 0, ended + 0, passed + 0, failed + 0 }' "$log"
    )
    # One that crashed or was killed has no such line.
    [ "$binaries" -le "$ended" ] || tests_failed=$((tests_failed + binaries - ended))
    [ "$status" -eq 0 ] || [ "$tests_failed" -gt 0 ] || tests_failed=1
    passed=$((passed + tests_passed))
    failed=$((failed + tests_failed))
    echo "=== $name: $tests_passed passed, $tests_failed failed ($((SECONDS - start)) s)"
}

# First what is quick; the guests last, with a table of how long each module of their tests took.
tests 'unit tests' cargo test --workspace --exclude e2e --no-fail-fast
tests 'unit tests of the end-to-end tests' cargo test --package e2e --lib --bins --no-fail-fast
tests 'end-to-end tests' cargo xtask e2e
end
