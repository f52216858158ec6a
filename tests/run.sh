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

start=$SECONDS
echo '=== tests'
cargo test --workspace --no-fail-fast 2>&1 | tee "$log"
status=${PIPESTATUS[0]}
echo "=== tests: $((SECONDS - start)) s"

# The lines that each test binary ends with: "test result: ok. 3 passed; 0 failed; 0 ignored; …".
read -r tests_passed tests_failed < <(
    awk '/^test result: / { for (i = 2; i <= NF; i++) { if ($i == "passed;") passed += $(i - 1); if ($i == "failed;") failed += $(i - 1) } }
         END { print passed + 0, failed + 0 }' "$log"
)
passed=$((passed + tests_passed))
failed=$((failed + tests_failed))
# A binary that was killed has no such line.
[ "$status" -eq 0 ] || [ "$tests_failed" -gt 0 ] || failed=$((failed + 1))
end
