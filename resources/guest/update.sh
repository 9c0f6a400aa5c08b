#!/usr/bin/env bash
# Pins the versions of the guest's, and of the lab's machine's, packages that the mirror has today.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
for lock in "$here"/{packages,machine}.lock; do
    next=$(mktemp "$lock.XXXXXX")
    trap 'rm -f "$next"' EXIT
    while read -r name version; do
        case $name in
            '' | '#'*) echo "$name $version" ;;
            *)
                # The kernel's package is named after its ABI: the newest is what the metapackage depends on.
                [[ $name != linux-image-* ]] ||
                    name=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends: linux-image/ { print $2; exit }')
                echo "$name $(apt-cache policy "$name" | awk '/Candidate:/ { print $2 }')"
                ;;
        esac
    done <"$lock" >"$next"
    chmod 644 "$next"
    mv "$next" "$lock"
done
