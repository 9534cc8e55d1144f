#!/usr/bin/env bash
# Runs every test of the workspace, with a time for each, and names the ten slowest at the end.
#
#   test.sh [FILTER]     only the tests whose names have FILTER in them
#
# What must stay true: one failure hides no other, and ends this with a status other than 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

cargo="${CARGO:-cargo}"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
# End-to-end tests mostly wait for programs that they started, so twice as many run as there are cores on the smallest machine.
export RUST_TEST_THREADS="${RUST_TEST_THREADS:-4}"
# libtest tells times only with an option that it calls unstable. The variable is set for the test programs alone: build scripts of some
# crates look at it, too, and would build them anew.
host="$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')"
export "CARGO_TARGET_${host}_RUNNER=env RUSTC_BOOTSTRAP=1"

status=0
"$cargo" test --workspace --no-fail-fast --lib --bins --tests -- -Zunstable-options --report-time "$@" 2>&1 | tee "$log" || status=$?
unset "CARGO_TARGET_${host}_RUNNER"
"$cargo" test --workspace --no-fail-fast --doc || status=$?
printf '\nThe slowest tests:\n'
sed -nE 's/^test (.*) \.\.\. ok <([0-9.]+)s>$/\2 s  \1/p' "$log" | sort -rn | sed -n 1,10p
exit "$status"
