#!/usr/bin/env bash
# Fuzzes each target of fuzz/ for FUZZ_SECONDS (60), from the corpus in the repository; fails where one finds a crash, a hang or
# memory without bounds. New inputs go to target/fuzz/corpus, crashes to fuzz/artifacts.
set -euo pipefail
cd "$(dirname "$0")/.."
# libFuzzer needs instrumentation that rustc has behind this switch; no sanitizer, as those need a nightly toolchain.
export RUSTC_BOOTSTRAP=1 CARGO_TARGET_DIR=$PWD/target/fuzz/build
seconds=${FUZZ_SECONDS:-60} status=0
cd fuzz
cargo fuzz build -s none
for target in $(cargo fuzz list); do
    mkdir -p "../target/fuzz/corpus/$target"
    log=../target/fuzz/$target.log
    # 512 MiB of memory, 128 MiB at once, 10 s for an input.
    if cargo fuzz run -s none "$target" "../target/fuzz/corpus/$target" "corpus/$target" -- \
        -max_total_time="$seconds" -rss_limit_mb=512 -malloc_limit_mb=128 -timeout=10 >"$log" 2>&1; then
        echo "fuzz: $target: $(grep -o '^Done .*' "$log")"
    else
        echo "fuzz: $target FAILED:" >&2
        tail -40 "$log" >&2
        status=1
    fi
done
exit $status
