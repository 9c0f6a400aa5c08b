#!/usr/bin/env bash
# Makes the Debian package target/coppice.deb of the static program of `make build`, with the cargo-deb of `make setup`.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH=$HOME/.cargo/bin:$PATH

rm -rf target/install
make --no-print-directory install DESTDIR=target/install PREFIX=/usr
# Policy 12.1: manual pages are compressed, as well as they can be. Without names and times, the same pages are the same package.
gzip -9n target/install/usr/share/man/man1/*
cargo deb --quiet --strip -p coppice --target x86_64-unknown-linux-gnu --no-build -o target/coppice.deb
