#!/usr/bin/env bash
# phases.sh TARGET...: makes each, also after one that failed, but none after a setup that failed. Says after each, and
# of all at the end, also when it is stopped half-way, what passed and how long it took. SETUP_SECONDS of setup went
# before.
set -uo pipefail
summary='' failed=0 before=${SETUP_SECONDS:-0}

tell() {
    printf '\n%s== %-6s %d s\n' "$summary" total $((SECONDS + before))
}
trap tell EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

for phase in "$@"; do
    echo "== $phase"
    started=$SECONDS
    if make --no-print-directory "$phase"; then
        verdict=passed
    else
        verdict=FAILED
        failed=1
    fi
    took=$((SECONDS - started))
    if [ "$phase" = setup ]; then
        took=$((took + before))
    fi
    line=$(printf '== %-6s %s, %d s' "$phase" "$verdict" "$took")
    echo "$line"
    summary+=$line$'\n'
    if [ "$phase $verdict" = 'setup FAILED' ]; then
        break
    fi
done
exit $failed
