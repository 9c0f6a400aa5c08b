#!/usr/bin/env bash
# Runs the tests of all crates, those of their documentation too, and names at the end every test that could not run on
# this machine.
set -euo pipefail
cd "$(dirname "$0")/.."

# Where a test says that it cannot run: see tests/skip. Absolute, as tests run in the folders of their crates.
export COPPICE_SKIPPED=$PWD/target/skipped
mkdir -p target
: > "$COPPICE_SKIPPED"

# Also after a failure: what was not shown is part of the result.
tell_skipped() {
    printf '\n%d skipped, as they cannot run here\n' "$(wc -l < "$COPPICE_SKIPPED")"
    sort "$COPPICE_SKIPPED" | sed 's/^/    /'
}
trap tell_skipped EXIT

resources/step.sh 'unit tests' cargo nextest run --workspace
resources/step.sh 'doc tests' cargo test --workspace --doc --quiet
