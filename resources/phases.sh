#!/usr/bin/env bash
# phases.sh TARGET...: makes each, also after one that failed, and says at the end what passed and how long it took.
set -uo pipefail
summary='' failed=0
for phase in "$@"; do
    echo "== $phase"
    started=$SECONDS
    if make --no-print-directory "$phase"; then
        verdict=passed
    else
        verdict=FAILED
        failed=1
    fi
    summary+="$(printf '== %-6s %s, %d s' "$phase" "$verdict" $((SECONDS - started)))"$'\n'
done
printf '\n%s' "$summary"
exit $failed
