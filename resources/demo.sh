#!/usr/bin/env bash
# Boots four guests from one read-only VHDX: on this machine where its KVM can run stock guests, else in the lab.
# `make demo` builds what is needed, and says where in COPPICE and LAB.
set -euo pipefail
cd "$(dirname "$0")/.."

report=$("$COPPICE" doctor --json || true)
if ! python3 -c 'import json, sys; sys.exit(not json.loads(sys.argv[1])["can_run_guests"])' "$report"; then
    echo "demo: this machine's KVM cannot run stock guests:"
    "$COPPICE" doctor | sed 's/^/    /' || true
    echo "demo: booting them in the lab, inside an emulated host with a KVM that can"
    exec "$LAB" run demo
fi

echo "demo: this machine's KVM can run stock guests; booting four from target/guest/root.vhdx"
script='mount -o ro /dev/vda /mnt && echo "GUEST $(uname -r), $(nproc) CPU, $(md5sum /mnt/bin/busybox)"'
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
for guest in 0 1 2 3; do
    "$COPPICE" run --kernel target/guest/vmlinuz --initrd target/guest/initrd.cpio.gz \
        --cmdline "console=ttyS0 reboot=k panic=-1 quiet coppice.sh=$(base64 -w0 <<<"$script")" \
        --disk target/guest/root.vhdx,ro </dev/null >"$logs/$guest" 2>&1 &
done
failed=0
for job in $(jobs -p); do
    wait "$job" || failed=1
done
for guest in 0 1 2 3; do
    grep -a '^GUEST ' "$logs/$guest" | sed "s/^/guest $guest: /" || { cat "$logs/$guest"; failed=1; }
done
exit $failed
