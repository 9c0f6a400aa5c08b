#!/usr/bin/env bash
# Installs what building and testing Coppice needs on Debian 12: packages, cargo-nextest. Does nothing where all is there.
set -euo pipefail

# The program, or file, that tells whether a package is there.
declare -A needed=(
    [qemu-system-x86]=qemu-system-x86_64 [qemu-utils]=qemu-img [busybox-static]=busybox [kmod]=modprobe [cpio]=cpio
    [e2fsprogs]=mke2fs [build-essential]=cc [curl]=curl [python3]=python3 [xz-utils]=xz
)

missing=()
for package in "${!needed[@]}"; do
    PATH=$PATH:/sbin:/usr/sbin command -v "${needed[$package]}" >/dev/null || missing+=("$package")
done
# Any busybox is not enough: the guests have no libraries.
if command -v busybox >/dev/null && ! file_type=$(LC_ALL=C ldd "$(command -v busybox)" 2>&1) && [[ $file_type != *"not a dynamic"* ]]; then
    missing+=(busybox-static)
fi

if [ ${#missing[@]} -gt 0 ]; then
    sudo=()
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || { echo "setup: as root, run: apt-get install ${missing[*]}" >&2; exit 1; }
        sudo=(sudo)
    fi
    echo "setup: installing ${missing[*]}"
    "${sudo[@]}" apt-get update -q
    # qemu-system-x86 and qemu-utils come from one source: alone, the first may remove the second, or be refused beside a newer one.
    if [[ " ${missing[*]} " == *" qemu-"* ]]; then
        release=$(. /etc/os-release && echo "$VERSION_CODENAME")
        missing=("${missing[@]/qemu-system-x86/}")
        missing=("${missing[@]/qemu-utils/}")
        missing+=("qemu-system-x86/$release" "qemu-utils/$release")
    fi
    # shellcheck disable=SC2068 # empty entries are to vanish
    DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -q -y --no-install-recommends --allow-downgrades ${missing[@]}
fi

if ! command -v cargo >/dev/null; then
    if [ -x "$HOME/.cargo/bin/cargo" ]; then
        echo "setup: add $HOME/.cargo/bin to PATH" >&2
    else
        echo "setup: Rust is missing; install it from https://rustup.rs (rust-version in Cargo.toml says which)" >&2
    fi
    exit 1
fi
if ! cargo nextest --version >/dev/null 2>&1; then
    cargo install --locked cargo-nextest
fi
