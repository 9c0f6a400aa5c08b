#!/usr/bin/env bash
# phase.sh NAME COMMAND...: runs a command and says how long it took.
set -uo pipefail
name=$1
shift
started=$SECONDS
"$@"
status=$?
echo "== $name: $((SECONDS - started)) s, exit $status"
exit $status
