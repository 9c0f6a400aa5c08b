#!/usr/bin/env bash
# Property tests of the daemon's API: every operation and body of its own OpenAPI document, valid and invalid, against a daemon that runs.
# SEED and EXAMPLES say which and how many. Arguments are passed on to schemathesis.
set -euo pipefail
cd "$(dirname "$0")/../.."
repository=$PWD
coppice=${COPPICE_DEBUG:-${CARGO_TARGET_DIR:-target}/debug/coppice}
folder=$(mktemp -d)
chmod 755 "$folder"
cp "$coppice" "$folder/coppice"
cp "$coppice-tools" "$folder/coppice-tools"
mkdir -m 700 "$folder/home"
user=()
if [ "$(id -u)" = 0 ]; then
    # Requests name files at random: nobody can write to few.
    chown 65534:65534 "$folder/home"
    user=(setpriv --reuid=65534 --regid=65534 --clear-groups)
fi
# A guest that runs takes /dev/kvm, which may be root's alone: then the daemon sees a node of its own in that place.
see=()
if [ -c /dev/kvm ] && ! "${user[@]}" test -w /dev/kvm && [ "$(id -u)" = 0 ]; then
    cp -a /dev/kvm "$folder/kvm"
    chown 65534:65534 "$folder/kvm"
    see=(unshare --mount sh -c 'mount --bind "$0" /dev/kvm && exec "$@"' "$folder/kvm")
fi
daemon='' relay=''
finish() {
    [ -z "$relay" ] || kill "$relay" 2>/dev/null || true
    [ -z "$daemon" ] || { kill "$daemon" && wait "$daemon"; } 2>/dev/null || true
    rm -rf "$folder"
}
trap finish EXIT
env XDG_CACHE_HOME="$folder/home/cache" "${see[@]}" "${user[@]}" "$folder/coppice" serve --socket "$folder/home/s" --state "$folder/home/state" \
    --stop-guests 0 --max-vms 32 --log warn 2>"$folder/log" &
daemon=$!
until [ -S "$folder/home/s" ]; do
    kill -0 "$daemon" || { cat "$folder/log"; exit 1; }
    sleep 0.05
done
python3 resources/schemathesis/relay.py "$folder/home/s" >"$folder/port" &
relay=$!
until [ -s "$folder/port" ]; do sleep 0.05; done
url=http://127.0.0.1:$(cat "$folder/port")

# Streams without an end, and what is not there yet, are not for it. That a body has the right form is not enough for it to be done (files
# have to be there): so a refusal of a valid one is no failure, but of an invalid one it is wanted. 507 says that there is no room.
status=0
schemathesis=$(realpath -s "${SCHEMATHESIS:-target/python/bin/schemathesis}")
# It leaves notes where it works.
cd "$folder"
check() {
    "$schemathesis" --config-file "$folder/config.toml" run "$url/openapi.json" --url "$url" --checks all \
        --max-examples "${EXAMPLES:-25}" --seed "${SEED:-1}" --workers 2 --request-timeout 30 "$@" || status=$?
}
printf '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", 507]\n' >"$folder/config.toml"
check --exclude-tag 'the guest'"'"'s own API' --exclude-checks positive_data_acceptance \
    --exclude-operation-id events --exclude-operation-id console_output "$@"

# The guest's own API, of one that is there. As Firecracker's, it answers 400 to a method that it does not know.
curl -fsS --unix-socket "$folder/home/s" -d '{"id": "there", "start": false}' -o /dev/null http://localhost/vms
printf '[parameters]\n"path.id" = "there"\n' >>"$folder/config.toml"
check --include-tag 'the guest'"'"'s own API' \
    --exclude-checks positive_data_acceptance,unsupported_method,allow_header_conformance --phases coverage,fuzzing "$@"
# And of one that runs, with a disk of its own and a balloon: what is refused there is refused for what it asks, and not for the state.
python3 "$repository/resources/schemathesis/kernel.py" "$folder/kernel"
"${user[@]}" "$folder/coppice" disk create --size 8M "$folder/home/disk.vhdx" >/dev/null
curl -fsS --unix-socket "$folder/home/s" -o /dev/null http://localhost/vms -d '{"id": "running", "config": {
    "boot-source": {"kernel_image_path": "'"$folder"'/kernel"}, "machine-config": {"vcpu_count": 1, "mem_size_mib": 4},
    "drives": [{"drive_id": "data", "path_on_host": "'"$folder"'/home/disk.vhdx", "is_root_device": false}], "entropy": {},
    "balloon": {"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1, "free_page_hinting": true}}}'
sed -i 's/"there"/"running"\n"path.drive" = "data"/' "$folder/config.toml"
check --include-tag 'the guest'"'"'s own API' \
    --exclude-checks positive_data_acceptance,unsupported_method,allow_header_conformance --phases coverage,fuzzing "$@"
if [ "$(curl -sS --unix-socket "$folder/home/s" http://localhost/vms/running | grep -Ec '"state":"(running|paused)"')" != 1 ]; then
    echo "the guest that ran is gone" >&2
    status=1
fi
if ! kill -0 "$daemon" 2>/dev/null || grep -q panicked "$folder/log"; then
    echo "the daemon failed:" >&2
    tail -50 "$folder/log" >&2
    status=1
fi
exit $status
