#!/usr/bin/env bash
# Fuzzes each target of fuzz/ for FUZZ_SECONDS (60), from the corpus in the repository; fails where one finds a crash, a hang or
# memory without bounds. New inputs go to target/fuzz/corpus, crashes to fuzz/artifacts. With AddressSanitizer where there is a
# nightly toolchain, which it needs. FUZZ=disks leaves out the targets that take long to compile.
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${FUZZ_SECONDS:-60} status=0
# An input may take so many MiB, and 128 at once.
if rustc +nightly --version >/dev/null 2>&1; then
    # The sanitizer has records of memory beside it, and holds back what is freed.
    sanitizer=address memory=1024 fuzz=(cargo +nightly fuzz)
    export ASAN_OPTIONS=quarantine_size_mb=16
else
    echo "fuzz: without AddressSanitizer, which needs a nightly toolchain: rustup toolchain install nightly --profile minimal"
    # libFuzzer needs instrumentation that rustc has behind this switch.
    export RUSTC_BOOTSTRAP=1
    sanitizer=none memory=512 fuzz=(cargo fuzz)
fi
export CARGO_TARGET_DIR=$PWD/target/fuzz/build-$sanitizer
cd fuzz
targets=(open log_replay chain) features=()
if [ "${FUZZ:-all}" = disks ]; then
    echo "fuzz: disks alone; make fuzz has snapshots and records, too"
else
    targets+=(state memory_index records) features=(--features guests)
fi
"${fuzz[@]}" build -s "$sanitizer" "${features[@]}"
for target in "${targets[@]}"; do
    mkdir -p "../target/fuzz/corpus/$target"
    log=../target/fuzz/$target.log
    # 10 s for an input.
    if "${fuzz[@]}" run -s "$sanitizer" "${features[@]}" "$target" "../target/fuzz/corpus/$target" "corpus/$target" -- \
        -max_total_time="$seconds" -rss_limit_mb="$memory" -malloc_limit_mb=128 -timeout=10 >"$log" 2>&1; then
        echo "fuzz: $target: $(grep -o '^Done .*' "$log")"
    else
        echo "fuzz: $target FAILED:" >&2
        tail -40 "$log" >&2
        status=1
    fi
done
exit $status
