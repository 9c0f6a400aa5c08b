#!/usr/bin/env bash
# Puts the emulator that runs the lab's host into target/emulator/, without installing it: QEMU with the libraries that it needs, from packages
# of the Debian after this one.
#
# QEMU before 10.2 clears the interrupts of an emulated processor without a lock whenever a nested guest is left (target/i386/tcg,
# `do_vmexit`), and so loses some that another thread raises at that moment: hosts stop, and guests with them. Debian 12 has 7.2.
set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."

least=10.2
suite=trixie
out=$PWD/target/emulator
stamp=$(sha256sum resources/emulator.sh | cut -d' ' -f1)
if [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ]; then
    exit 0
fi
rm -rf "$out"
mkdir -p "$out"
work=$(mktemp -d "$out/.build-XXXXXX")
trap 'rm -rf "$work"' EXIT

# The mirror is the machine's own; its lists of the other suite are kept apart from the machine's.
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 'Component: main' | head -1)
if [ -z "$mirror" ]; then
    echo "emulator: apt-get knows no mirror of Debian" >&2
    exit 1
fi
mkdir -p "$work"/{lists,archives}/partial "$work"/{parts,root}
touch "$work"/{status,preferences}
for name in "$suite" "$suite-backports"; do
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $name main"
done >"$work/sources.list"
cat >"$work/apt.conf" <<CONF
Dir::Etc::sourcelist "$work/sources.list";
Dir::Etc::sourceparts "$work/parts";
Dir::Etc::preferences "$work/preferences";
Dir::Etc::preferencesparts "$work/parts";
Dir::State::lists "$work/lists";
Dir::State::status "$work/status";
Dir::State::extended_states "$work/extended_states";
Dir::Cache::archives "$work/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Sandbox::User "root";
CONF
export APT_CONFIG=$work/apt.conf
echo "emulator: fetching QEMU of $suite-backports"
apt-get update -q >"$work/log" 2>&1 &&
    apt-get install -q -y --download-only --no-install-recommends -t "$suite-backports" qemu-system-x86 >>"$work/log" 2>&1 || {
    cat "$work/log" >&2
    echo "emulator: cannot fetch qemu-system-x86 of $suite-backports; is this machine offline?" >&2
    exit 1
}
for deb in "$work"/archives/*.deb; do
    dpkg-deb -x "$deb" "$work/root"
done

root=$work/root/usr
loader=$root/lib64/ld-linux-x86-64.so.2
libraries=$root/lib/x86_64-linux-gnu
mkdir -p "$out/lib" "$out/share"
cp -L "$loader" "$out/lib/"
"$loader" --library-path "$libraries" --list "$root/bin/qemu-system-x86_64" |
    awk '$3 ~ /^\// { print $3 }' | xargs -d '\n' cp -L -t "$out/lib"
cp "$root/bin/qemu-system-x86_64" "$out/qemu"
cp -r "$root"/share/{seabios,qemu} "$out/share/"
version=$("$out/lib/ld-linux-x86-64.so.2" --library-path "$out/lib" "$out/qemu" --version | sed -n 's/^QEMU emulator version \([0-9.]*\).*/\1/p')
if [ "$(printf '%s\n' "$least" "$version" | sort -V | head -1)" != "$least" ]; then
    echo "emulator: QEMU $least or newer is needed, and the mirror has ${version:-none that starts}" >&2
    exit 1
fi
echo "emulator: QEMU $version"
echo "$stamp" >"$out/stamp"
