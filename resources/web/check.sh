#!/usr/bin/env bash
# Opens the daemon's page in a headless Chromium, and looks at what has become of it: guests are there, nothing was refused, and text is no markup.
# A first argument is a file for a picture of it.
set -euo pipefail
cd "$(dirname "$0")/../.."
coppice=${COPPICE_DEBUG:-${CARGO_TARGET_DIR:-target}/debug/coppice}
folder=$(mktemp -d)
daemon=''
finish() {
    [ -z "$daemon" ] || { kill "$daemon" && wait "$daemon"; } 2>/dev/null || true
    rm -rf "$folder"
}
trap finish EXIT
ask() { curl -sS --unix-socket "$folder/s" -o /dev/null "$@"; }
"$coppice" serve --socket "$folder/s" --state "$folder/state" --web 127.0.0.1:0 --stop-guests 0 2>"$folder/log" &
daemon=$!
until address=$(grep -o 'address=127.0.0.1:[0-9]*' "$folder/log"); do
    kill -0 "$daemon" || { cat "$folder/log"; exit 1; }
    sleep 0.05
done
address=http://${address#address=}
for id in web-1 web-2; do
    ask -d "{\"id\": \"$id\", \"start\": false}" http://localhost/vms
done
# A reason that would be markup if it were let.
kernel='/nowhere/<b id=evil>'
ask -d "{\"id\": \"sly\", \"start\": false}" http://localhost/vms
ask -X PUT -d "{\"kernel_image_path\": \"$kernel\"}" http://localhost/vms/sly/boot-source
spec="{\"id\": \"ended\", \"start\": false, \"config\": {\"boot-source\": {\"kernel_image_path\": \"$folder/<b id=evil>\"}}}"
touch "$folder/<b id=evil>"
ask -d "$spec" http://localhost/vms
ask -d '{"timeout_s": 0}' http://localhost/vms/ended/stop
rm "$folder/<b id=evil>"
ask -X POST http://localhost/vms/ended/start

open_page() {
    chromium --headless --no-sandbox --disable-gpu --user-data-dir="$folder/profile" --window-size=1100,900 --virtual-time-budget=6000 "$@" "$address/" 2>"$folder/browser"
}
open_page --dump-dom >"$folder/dom"
wrong() {
    echo "web: $1" >&2
    cat "$folder/dom" "$folder/browser" >&2
    exit 1
}
grep -q 'data-looks=' "$folder/dom" || wrong "the page did not come to its data"
grep -q '4 guests, 0 of them running' "$folder/dom" || wrong "guests are missing"
for id in web-1 web-2 ended; do
    grep -q "<td>$id</td>" "$folder/dom" || wrong "$id is missing"
done
grep -q 'class="private" style="width:' "$folder/dom" || wrong "there are no bars"
grep -q '<polyline id="held" points="[0-9]' "$folder/dom" || wrong "there is no chart"
grep -q '&lt;b id=evil&gt;' "$folder/dom" || wrong "the reason of an end is missing"
! grep -q '<b id="\?evil' "$folder/dom" || wrong "text became markup"
! grep -qi 'content security policy\|uncaught' "$folder/browser" || wrong "the browser refused a part of the page"
[ -z "${1:-}" ] || open_page --screenshot="$1" >/dev/null
echo "web: the page shows its guests"
