#!/usr/bin/env bash
# step.sh NAME COMMAND...: runs a step of a phase, and says how long it took.
set -uo pipefail
name=$1
shift
started=$EPOCHREALTIME
"$@"
status=$?
printf -- '-- %s: %s s\n' "$name" "$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $started }")"
exit $status
