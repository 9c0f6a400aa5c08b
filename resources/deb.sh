#!/usr/bin/env bash
# Makes the Debian package target/coppice.deb of the static program, which has to be there.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$HOME/.cargo/bin:$PATH

# Pinned, as what it writes into the package's scripts is part of what is tested.
version=3.8.0
if [ "$(cargo deb --version 2>/dev/null)" != "cargo-deb $version" ]; then
    echo "deb: installing cargo-deb $version"
    cargo install --locked --force "cargo-deb@$version"
fi
rm -rf target/install
make --no-print-directory install DESTDIR=target/install PREFIX=/usr
# Policy 12.1: manual pages are compressed, as well as they can be. Without names and times, the same pages are the same package.
gzip -9n target/install/usr/share/man/man1/*
cargo deb --quiet --strip -p coppice --target x86_64-unknown-linux-gnu --no-build -o target/coppice.deb
